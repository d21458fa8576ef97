"""The E-step end to end on the embedded model: what is found, kept, warned about and refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from samples import NOISE, ROUNDING, assign_batch, batch_of, noises_of, rows_of, same_results
from torch import Tensor

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.generators.base import Conditioning, Generator, Prediction
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.objective import matching_loss
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.report.assign import print_summary, write_assign_report
from oneshot_fast.runtime.files import read_metadata
from oneshot_fast.runtime.seeds import derived_seed, gaussian

Call = Callable[..., Any]


def flags(data: Path, folder: Path, *more: object) -> list[object]:
    fixed = f"--data_root {data} --output_root {folder} --model_id tiny --steps 3 --num_images 0"
    fixed += " --assign_method rotation --lr 0.15"
    return [*fixed.split(), *more]


def test_a_run_has_its_files_and_its_loss_falls(assigned: Path, small_data: Path) -> None:
    names = {path.name for path in assigned.iterdir()} - {".lock"}
    files = (
        "diagnostics.json failures.jsonl files.jsonl history.jsonl images manifest.jsonl noises "
    )
    files += "report.html"
    assert names == {*files.split(), "run.json", "summary.json"}
    rows, summary = (
        rows_of(assigned / "manifest.jsonl"),
        json.loads((assigned / "summary.json").read_text()),
    )
    assert [row["index"] for row in rows] == list(range(6))
    assert {"samples": 6, "failed": 0, "truncated_prompts": 0}.items() <= summary.items()
    assert summary["best_loss"] < 0.98 * summary["initial_loss"]
    assert len(summary["losses"]) == 4 and summary["settings"]["steps"] == 3
    for row in rows:
        assert row["losses"][0] == row["initial_loss"] and min(row["losses"]) == row["best_loss"]
        assert row["losses"][row["best_step"]] == row["best_loss"] < row["initial_loss"]
    assert len(list((assigned / "images").iterdir())) == 2 * 3
    assert len(rows_of(assigned / "history.jsonl")) == 2
    assert read_manifest(assigned / "manifest.jsonl")[1] == []


def test_noises_are_rotations_that_reproduce_the_reported_loss(
    assigned: Path, tiny: Generator
) -> None:
    targets = TargetImages(tiny)
    for row in rows_of(assigned / "manifest.jsonl"):
        shard = load_file(assigned / row["noise_path"])
        z, q = (shard[key][row["noise_index"]] for key in ("z", "q"))
        assert read_metadata(assigned / row["noise_path"], "rows")[row["noise_index"]] == row
        assert row["seed"] == derived_seed(0, row["id"])
        eps = gaussian([row["seed"]], z.shape)[0]
        torch.testing.assert_close(z.norm(), eps.norm(), rtol=1e-5, atol=0)
        assert (z - eps).abs().max() > 1e-3
        torch.testing.assert_close(q @ q.T, torch.eye(len(q)), rtol=0, atol=1e-5)
        target = targets.latent((assigned / row["target_image_path"]).resolve(), "crop")
        with torch.no_grad():
            prompts = tiny.encode_prompts([row["prompt"]])
            x0 = tiny.latents(z[None], prompts)[0]
        assert (x0 - target).square().mean().item() == pytest.approx(row["best_loss"], rel=ROUNDING)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_results_do_not_depend_on_batches(
    assigned: Path, small_data: Path, tmp_path: Path, call: Call, batch_size: int
) -> None:
    flagged = flags(small_data, tmp_path / "run", "--batch_size", batch_size)
    assert call("assign", *flagged).code == 0
    same_results(assigned, tmp_path / "run")


def test_results_do_not_depend_on_order_or_shards(
    assigned: Path, data: Path, tmp_path: Path, call: Call
) -> None:
    lines = (data / "pairs.jsonl").read_text().splitlines()
    (data / "pairs.jsonl").write_text("\n".join(reversed(lines)))
    assert call("assign", *flags(data, tmp_path / "all")).code == 0
    same_results(assigned, tmp_path / "all")
    for start in (0, 4):
        shard = ("--start_index", start, "--max_samples", 4)
        assert call("assign", *flags(data, tmp_path / f"part{start}", *shard)).code == 0
    merged = noises_of(tmp_path / "part0") | noises_of(tmp_path / "part4")
    for name, z in noises_of(assigned).items():
        torch.testing.assert_close(merged[name], z, rtol=0, atol=NOISE)


@pytest.mark.parametrize(
    "options",
    [
        AssignOptions("rotation", steps=4),
        AssignOptions("rotation", steps=4, rotation_groups=2),
        AssignOptions("rotation", steps=4, patch_size=4),
        AssignOptions("rotation", steps=4, rotation_optimizer="raw_adam"),
        AssignOptions("sphere", steps=4),
        AssignOptions("white", steps=4),
        AssignOptions("sphere", steps=4, latent_loss_weight=0.0, pixel_l1_weight=1.0),
    ],
    ids=["rotation", "tiles", "patch", "raw", "sphere", "white", "pixels"],
)
def test_every_way_to_match_lowers_the_loss_that_it_reports(
    tiny: Generator, small_data: Path, options: AssignOptions
) -> None:
    eps, prompts, latents, images = batch_of(tiny, small_data)
    result = assign_batch(tiny, eps, prompts, latents, images, options)
    assert result.z.shape == eps.shape
    D, G = 4 * options.patch_size**2, options.rotation_groups
    if options.mover == "rotation":
        assert result.q.shape == ((6, D, D) if G == 1 else (6, G, G, D, D))
    else:
        assert result.q is None
    torch.testing.assert_close(result.z.flatten(1).norm(dim=1), eps.flatten(1).norm(dim=1))
    assert (result.best_loss < result.losses[0]).all()
    with torch.no_grad():
        target = {"latents": latents, "images": images}
        again = matching_loss(tiny, result.z, prompts, target, options)
    torch.testing.assert_close(again, result.best_loss, rtol=ROUNDING, atol=0)


def test_the_best_step_is_kept_when_the_search_overshoots(
    tiny: Generator, small_data: Path
) -> None:
    eps, prompts, latents, _ = batch_of(tiny, small_data)
    options = AssignOptions("rotation", steps=5, lr=3.0)
    result = assign_batch(tiny, eps, prompts, latents, None, options)
    assert (result.best_step < 5).any() and torch.equal(result.best_loss, result.losses.amin(0))
    with torch.no_grad():
        again = matching_loss(tiny, result.z, prompts, {"latents": latents}, options)
    torch.testing.assert_close(again, result.best_loss, rtol=ROUNDING, atol=0)


def test_drift_regularisation_keeps_the_noise_near_its_base(
    tiny: Generator, small_data: Path
) -> None:
    eps, prompts, latents, _ = batch_of(tiny, small_data)
    drifts = []
    for weight in (0.0, 1e5):
        options = AssignOptions(steps=4, noise_l2_weight=weight)
        result = assign_batch(tiny, eps, prompts, latents, None, options)
        drifts.append((result.z - eps).square().mean().item())
    assert drifts[1] < 0.5 * drifts[0]


class Poisoned:
    """A generator whose output for one row is not finite, from the second evaluation on."""

    def __init__(self, generator: Generator, row: int, value: float) -> None:
        self.generator, self.row, self.value, self.calls = generator, row, value, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def predict(self, eps: Tensor, prompts: Conditioning) -> Prediction:
        self.calls += 1
        made = self.generator.predict(eps, prompts)
        poison = torch.zeros_like(made.output)
        if self.calls > 1 and len(eps) > self.row:
            poison[self.row] = self.value
        return dataclasses.replace(made, output=made.output + poison * made.x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_fails_its_target_only(
    tiny: Generator, small_data: Path, assigned: Path, tmp_path: Path, value: float
) -> None:
    records, _ = read_pairs(small_data)
    poisoned: Any = Poisoned(tiny, 2, value)
    run = AssignRun(
        poisoned,
        records,
        tmp_path,
        AssignOptions("rotation", steps=3, lr=0.15),
        batch_size=6,
        num_images=0,
        targets=TargetImages(tiny),
    )
    summary = run.run()
    assert (summary["samples"], summary["failed"]) == (5, 1)
    (failure,) = rows_of(tmp_path / "failures.jsonl")
    assert failure["id"] == records[2].id and "NaN or infinite" in failure["reason"]
    expected = noises_of(assigned)
    found = noises_of(tmp_path)
    assert found.keys() == expected.keys() - {records[2].id}
    for name, z in found.items():
        torch.testing.assert_close(z, expected[name], rtol=0, atol=NOISE)


class NoLoss:
    """A generator that makes NaN of the first noise of a pool, for the first so many pools."""

    def __init__(self, generator: Generator, pools: int) -> None:
        self.generator, self.pools = generator, pools

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def latents(self, eps: Tensor, prompts: Conditioning) -> Tensor:
        made = self.generator.latents(eps, prompts)
        self.pools -= 1
        return made.index_fill(0, torch.tensor([0]), float("nan")) if self.pools >= 0 else made


@pytest.mark.parametrize("pools", [1, 6])
def test_means_are_over_finite_losses_and_the_others_null(
    tiny: Generator, small_data: Path, tmp_path: Path, capsys: Any, pools: int
) -> None:
    records, _ = read_pairs(small_data)
    poisoned: Any = NoLoss(tiny, pools)
    options = AssignOptions("pool", candidates=3)
    run = AssignRun(poisoned, records, tmp_path, options, num_images=0, targets=TargetImages(tiny))
    summary = run.run()
    assert (summary["samples"], summary["failed"]) == (6, 0)
    first = [row["initial_loss"] for row in rows_of(tmp_path / "manifest.jsonl")]
    finite = [loss for loss in first if loss is not None]
    assert len(finite) == 6 - pools
    expected = sum(finite) / len(finite) if finite else None
    assert summary["initial_loss"] == pytest.approx(expected)
    for path in (*tmp_path.glob("*.json"), *tmp_path.glob("*.jsonl")):
        assert not {"NaN", "Infinity"} & {*path.read_text().replace(",", " ").split()}
    print_summary(summary, tmp_path)
    write_assign_report(tmp_path, {})
    said = capsys.readouterr().out
    assert "nan" not in said and "inf" not in said.replace("infinite", "")


def test_failures_are_recorded_and_the_rest_is_done(data: Path, tmp_path: Path, call: Call) -> None:
    lines = (data / "pairs.jsonl").read_text().splitlines()
    pair = json.loads(lines[1])
    (data / pair["image"]).write_bytes(b"not an image")
    lines[3] = lines[3][:-1]
    long = json.dumps({**json.loads(lines[4]), "prompt": "a digit\u2028 " * 60})
    (data / "pairs.jsonl").write_text("\n".join([*lines[:4], long, "", lines[5]]))
    ended = call("assign", *flags(data, tmp_path / "run"))
    assert ended.code == 1 and "2 records failed" in ended.err
    assert (
        ended.err.count('1 prompts are longer than 77 tokens; cut off, the first of them "a') == 1
    )
    failures = {row["line"]: row for row in rows_of(tmp_path / "run" / "failures.jsonl")}
    assert failures.keys() == {2, 4} and failures[2]["image"] == pair["image"]
    assert "not an image" in failures[2]["reason"] and "broken JSON" in failures[4]["reason"]
    rows = rows_of(tmp_path / "run" / "manifest.jsonl")
    assert [row["prompt_truncated"] for row in rows] == [False, False, True, False]
    # Once the image is restored, the same command adds what is missing.
    shutil.copy(data / rows[0]["target_image_path"].split("data/")[1], data / pair["image"])
    again = call("assign", *flags(data, tmp_path / "run"))
    assert again.code == 1 and len(rows_of(tmp_path / "run" / "manifest.jsonl")) == 5


def test_a_single_target(small_data: Path, tmp_path: Path, call: Call) -> None:
    pair = json.loads((small_data / "pairs.jsonl").read_text().splitlines()[0])
    ended = call(
        "assign", "--prompt", pair["prompt"], "--target-image-path", small_data / pair["image"],
        "--output-dir", tmp_path / "one", "--model-id", "tiny", "--steps", 2, "--seed", 7,
    )  # fmt: skip
    assert ended.code == 0 and "assigned 1 of 1" in ended.out
    (row,) = rows_of(tmp_path / "one" / "manifest.jsonl")
    assert row["best_loss"] < row["initial_loss"] and row["seed"] == derived_seed(7, row["id"])
    assert len(list((tmp_path / "one" / "images").iterdir())) == 3


def test_a_hugging_face_folder_gives_the_same(data: Path, tmp_path: Path, call: Call) -> None:
    pairs = rows_of(data / "pairs.jsonl")[:2]
    renamed: Sequence[dict[str, str]] = [
        {"file_name": pair["image"], "text": pair["prompt"]} for pair in pairs
    ]
    assert call("assign", *flags(data, tmp_path / "ours", "--max_samples", 2)).code == 0
    (data / "pairs.jsonl").unlink()
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    assert call("assign", *flags(data, tmp_path / "theirs")).code == 0
    same_results(tmp_path / "ours", tmp_path / "theirs")


def test_another_seed_gives_other_noises(
    assigned: Path, small_data: Path, tmp_path: Path, call: Call
) -> None:
    assert call("assign", *flags(small_data, tmp_path / "run", "--seed", 1)).code == 0
    new = noises_of(tmp_path / "run")
    assert all((z - new[name]).abs().max() > 0.1 for name, z in noises_of(assigned).items())


def test_a_finished_run_is_not_done_again(small_data: Path, assigned: Path, call: Call) -> None:
    before = {path: path.stat().st_mtime_ns for path in assigned.rglob("*.safetensors")}
    assert call("assign", *flags(small_data, assigned)).code == 0
    assert before == {path: path.stat().st_mtime_ns for path in assigned.rglob("*.safetensors")}
