"""Run folders: one writer, equal settings, no leftovers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oneshot_fast.errors import RunError
from oneshot_fast.runtime.files import read_json, write_folder, write_json, write_safetensors
from oneshot_fast.runtime.folder import RunFolder

OUTPUTS = ("results", "summary.json")


def test_other_settings_are_named_and_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {"lr": 0.1, "steps": 3, "sides": (1, 2)}, OUTPUTS):
        (tmp_path / "results").mkdir()
    with RunFolder(tmp_path, {"lr": 0.1, "steps": 3, "sides": (1, 2)}, OUTPUTS):
        pass
    with (
        pytest.raises(RunError, match=r"\(lr: 0.1 then, 0.2 now; seed: None then, 5 now\).*over"),
        RunFolder(tmp_path, {"lr": 0.2, "steps": 3, "sides": (1, 2), "seed": 5}, OUTPUTS),
    ):
        pass
    assert (tmp_path / "results").exists()


def test_a_folder_of_before_goes_on_where_a_new_setting_is_as_it_was(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {"lr": 0.1}, OUTPUTS):
        pass
    with RunFolder(tmp_path, {"lr": 0.1, "lr_unit": "radians"}, OUTPUTS):
        pass
    with (
        pytest.raises(RunError, match="lr_unit: radians then, matrix now"),
        RunFolder(tmp_path, {"lr": 0.1, "lr_unit": "matrix"}, OUTPUTS),
    ):
        pass


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    run, inner = tmp_path / "run", tmp_path / "run" / "results" / "inner"
    run.mkdir()
    (run / "mine.txt").touch()
    with RunFolder(run, {"lr": 1}, OUTPUTS):
        write_json(run / "results" / "a.json", {})
        with write_folder(run / "results" / "model") as folder:
            (folder / "weights").touch()
        with RunFolder(inner, {}, OUTPUTS):
            write_json(inner / "summary.json", {})
    (run / "results" / "mine.png").touch()
    (inner / "mine.png").touch()
    (run / "summary.json").write_text("mine")
    with RunFolder(run, {"lr": 2}, OUTPUTS, overwrite=True):
        found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
        kept = {"mine.txt", "summary.json", "results/mine.png", "results/inner/mine.png"}
        assert found == {*kept, ".lock", "files.jsonl", "run.json"}
        write_json(run / "summary.json", {"is": "ours"})
    assert (run / "summary.json.old").read_text() == "mine"
    assert read_json(run / "run.json") == {"lr": 2}


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_neither_mixed_in_nor_removed(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "results").mkdir()
    folder = RunFolder(tmp_path, {}, OUTPUTS, overwrite)
    with pytest.raises(RunError, match="results, which no run of ours wrote"), folder:
        pass
    assert (tmp_path / "results").exists() and not (tmp_path / "run.json").exists()


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}, OUTPUTS):
        (tmp_path / "results").mkdir()
    for name in (".tmp-run.json", ".tmp-old-results", ".tmp-summary.json", "results/.tmp-0"):
        (tmp_path / name).touch()
    with RunFolder(tmp_path, {}, OUTPUTS):
        assert sorted(os.listdir(tmp_path)) == [".lock", "files.jsonl", "results", "run.json"]
        assert not os.listdir(tmp_path / "results")


@pytest.mark.parametrize("way", ["whole", "cut", "zeroed"])
def test_what_a_kill_left_without_its_hash_tells_of_itself(tmp_path: Path, way: str) -> None:
    files = [tmp_path / name for name in ("summary.json", "results/a.safetensors")]
    with contextlib.suppress(KeyboardInterrupt), RunFolder(tmp_path, {}, OUTPUTS) as run:
        write_json(files[0], {"a": [1, 2, 3]})
        write_safetensors(files[1], {"a": torch.ones(9)}, {})
        for path in files:
            run.ledger.claim(path)  # to replace it
        raise KeyboardInterrupt
    for path in files if way != "whole" else ():
        data = path.read_bytes()
        path.write_bytes(data[:20] if way == "cut" else bytes(len(data)))
    with RunFolder(tmp_path, {}, OUTPUTS) as run:
        assert [path.exists() for path in files] == [way == "whole"] * 2
        assert len(run.damaged) == (0 if way == "whole" else 2)


def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with (
            pytest.raises(RunError, match="in use by another process"),
            RunFolder(tmp_path, {}, OUTPUTS),
        ):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with RunFolder(tmp_path, {}, OUTPUTS):
            assert (tmp_path / "run.json").exists()
