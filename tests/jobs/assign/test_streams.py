"""Runs of the E-step as streams: early stopping, interruptions, reading ahead, errors."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import FULL, PATIENT, Limited, noises_of, rows_of, same_results
from torch import Tensor

from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.data.records import Record
from oneshot_fast.generators.base import Conditioning, Generator, Prediction
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.run import AssignRun

SMALL_STEPS = (
    "--assign_method rotation --rotation_optimizer raw_adam --lr 0.155 --steps 12 "
    "--stop_patience 2 --stop_improvement 0.045"
)


def run_of(
    generator: Any, data: Any, folder: Path, options: AssignOptions, size: int = 3, **more: Any
) -> AssignRun:
    return AssignRun(generator, data, folder, options, batch_size=size, num_images=1, **more)


@pytest.fixture(scope="module")
def patient(tiny: Generator, small_data: Path, tmp_path_factory: Any) -> Path:
    """A finished run with early stopping."""
    folder: Path = tmp_path_factory.mktemp("patient")
    run_of(tiny, read_pairs(small_data)[0], folder, PATIENT).run()
    return folder


def test_a_run_with_early_stopping_has_all_results_and_a_report(
    patient: Path, small_data: Path, tmp_path: Path, call: Any
) -> None:
    rows = rows_of(patient / "manifest.jsonl")
    assert [row["index"] for row in rows] == list(range(6))
    assert all(row["nfe"] == 3 * len(row["losses"]) - 2 for row in rows)
    assert len(noises_of(patient)) == 6 and len([*(patient / "noises").iterdir()]) == 2
    flags = f"{SMALL_STEPS} --batch_size 4 --num_images 0"
    ended = call(
        "assign", "--data_root", small_data, "--output_root", tmp_path / "run",
        "--model_id", "tiny", *flags.split(),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    same_results(patient, tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()


def test_ctrl_c_keeps_what_has_finished(
    tiny: Generator, patient: Path, small_data: Path, tmp_path: Path
) -> None:
    records = read_pairs(small_data)[0]
    longest = max(len(row["losses"]) for row in rows_of(patient / "manifest.jsonl"))

    class Interrupted(Limited):
        def predict(self, eps: Tensor, prompts: Conditioning) -> Prediction:
            if len(self.sizes) == longest:
                raise KeyboardInterrupt
            return super().predict(eps, prompts)

    with pytest.raises(KeyboardInterrupt):
        run_of(Interrupted(tiny, 9), records, tmp_path, PATIENT).run()
    kept = {row["id"] for row in rows_of(tmp_path / "manifest.jsonl")}
    assert 0 < len(kept) < 6
    run_of(tiny, records, tmp_path, PATIENT).run()
    same_results(patient, tmp_path)


def test_a_killed_run_with_early_stopping_is_completed(
    forks: Any, patient: Path, small_data: Path, tmp_path: Path
) -> None:
    flags = f"{SMALL_STEPS} --batch_size 1 --num_images 0"
    argv = [
        "--data_root", small_data, "--output_root", tmp_path / "run", "--model_id", "tiny",
        *flags.split(),
    ]  # fmt: skip
    for at in (12, 27):
        killed = forks.run("assign", argv, tmp_path / "run", at=at)
        assert killed.code == -signal.SIGKILL
    assert forks.run("assign", argv, tmp_path / "run").code == 0
    same_results(patient, tmp_path / "run")


def test_reading_ahead_changes_nothing(tiny: Generator, data: Path, tmp_path: Path) -> None:
    records = read_pairs(data)[0]
    records[3].image_path.write_bytes(b"not an image")  # type: ignore[union-attr]
    for name in ("ahead", "inline"):
        run = run_of(tiny, records, tmp_path / name, FULL, 2, read_ahead=name == "ahead")
        assert run.run()["failed"] == 1
    files = [*(tmp_path / "inline").rglob("*.safetensors"), *(tmp_path / "inline").rglob("*.png")]
    assert len(files) == 3 + 3
    for path in (*files, tmp_path / "inline/failures.jsonl", tmp_path / "inline/manifest.jsonl"):
        twin = tmp_path / "ahead" / path.relative_to(tmp_path / "inline")
        assert path.read_bytes() == twin.read_bytes()


@pytest.mark.parametrize("read_ahead", [True, False])
def test_errors_of_reading_and_writing_are_raised(
    tiny: Generator, small_data: Path, tmp_path: Path, read_ahead: bool
) -> None:
    class Stream:
        identity, total = "stream", 6

        def __iter__(self) -> Iterator[Record]:
            yield from read_pairs(small_data)[0][:3]
            raise ConnectionError("the data went away")

    run = run_of(tiny, Stream(), tmp_path / "a", FULL, 2, read_ahead=read_ahead)
    with pytest.raises(ConnectionError, match="went away"):
        run.run()
    (tmp_path / "b").mkdir()
    records = read_pairs(small_data)[0]
    run = run_of(tiny, records, tmp_path / "b", FULL, 2, read_ahead=read_ahead)
    original: Callable[..., Any] = run.targets.image
    run.targets.image = lambda *place: (  # type: ignore[method-assign]
        (tmp_path / "b" / "images").write_text("a file in the folder's place"),
        original(*place),
    )[1]
    with pytest.raises(OSError, match="images"):
        run.run()


def test_a_stream_is_resumed(tiny: Generator, small_data: Path, tmp_path: Path) -> None:
    records = read_pairs(small_data)[0]

    class Stream:
        identity, total, passes = "stream", None, 0

        def __iter__(self) -> Iterator[Record]:
            self.passes += 1
            yield from records[: 3 if self.passes == 1 else 6]
            if self.passes == 1:
                raise ConnectionError

    stream = Stream()
    with pytest.raises(ConnectionError):
        run_of(tiny, stream, tmp_path / "a", FULL, 2).run()
    assert run_of(tiny, stream, tmp_path / "a", FULL, 2).run()["samples"] == 6
    run_of(tiny, records, tmp_path / "b", FULL, 2).run()
    same_results(tmp_path / "a", tmp_path / "b")
    run_of(tiny, stream, tmp_path / "a", FULL, 2).run()
    assert stream.passes == 2


def test_a_dry_run_writes_nothing(small_data: Path, tmp_path: Path, call: Any) -> None:
    flags = ["--data_root", small_data, "--model_id", "tiny", "--dry_run"]
    before = sorted(small_data.rglob("*"))
    ended = call("assign", *flags, "--output_root", tmp_path / "run", "--pixel_l1_weight", 1)
    assert ended.code == 0 and not (tmp_path / "run").exists()
    assert sorted(small_data.rglob("*")) == before
    for part in ("parameters of unet: 2.6 million", "weights of vae", "in all, for 6 targets"):
        assert part in ended.out
    others = ([], ["--pixel_l1_weight", 1, "--decoder_checkpointing"])
    said = [ended.out, *(call("assign", *flags, *more).out for more in others)]
    pixels, plain, less = (float(o.split("activations: ")[1].split(" MB")[0]) for o in said)
    assert plain < less < pixels
