"""Images of other shapes than squares, from the search of a noise to the checkpoint."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from samples import PROMPTS, rows_of

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.data.sizes import Buckets
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.training import batch
from oneshot_fast.training.batch import batches, in_order, steps_per_epoch

Call = Callable[..., Any]
SHAPES = [(128, 64), (64, 128), (36, 128), (100, 100), (128, 62), (64, 64), (512, 64)]  # w, h
BUCKETS = [(48, 80), (80, 48), (112, 32), (64, 64), (48, 80), (64, 64), (32, 128)]  # h, w


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many shapes."""
    root, lines = tmp_path_factory.mktemp("shapes"), []
    for k, size in enumerate(SHAPES):
        Image.linear_gradient("L").resize(size).convert("RGB").save(root / f"{k}.png")
        lines.append(json.dumps({"prompt": PROMPTS[k % 2], "image": f"{k}.png"}))
    (root / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


Flags = Callable[..., list[object]]


@pytest.fixture(scope="module")
def assign(small_model: Path, shapes: Path) -> Flags:
    """Flags of an assignment in buckets into a folder."""
    step = "--method rotation --steps 2 --resize_mode bucket --bucket_step 16 --batch_size 4"
    given = ["--model_id", small_model, "--data_root", shapes, *step.split()]
    return lambda folder, *more: [*given, "--output_dir", folder, *more]


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory: pytest.TempPathFactory, assign: Flags) -> Path:
    """A finished assignment in buckets."""
    from oneshot_fast.assign import main

    folder = tmp_path_factory.mktemp("bucketed") / "run"
    assert main([str(flag) for flag in assign(folder, "--num_images", 2)]) == 0
    return folder


def test_each_image_keeps_its_shape(bucketed: Path, shapes: Path) -> None:
    rows = rows_of(bucketed / "manifest.jsonl")
    assert [tuple(row["target_size"]) for row in rows] == BUCKETS
    assert [tuple(row["original_size"]) for row in rows] == [(h, w) for w, h in SHAPES]
    shards = {row["noise_path"] for row in rows}
    assert len(shards) == len({*BUCKETS})  # a batch, and so a shard, has one size
    for row, (height, width) in zip(rows, BUCKETS, strict=True):
        noise = read_noise(bucketed / row["noise_path"], row["noise_index"])
        assert noise.shape == (4, height // 8, width // 8)
        assert row["best_loss"] < row["initial_loss"]
    with Image.open(bucketed / "images" / f"{rows[0]['id']}-assigned.png") as image:
        assert image.size == BUCKETS[0][::-1]
    summary = json.loads((bucketed / "summary.json").read_text())
    assert summary["cut_images"].startswith("1 images lose more than a third, most ")
    assert "6.png (50%); --resize_mode pad keeps all" in summary["cut_images"]
    found = json.loads((bucketed / "diagnostics.json").read_text())
    assert (found["targets"], found["other_sizes"]) == (2, 5)


def test_sdxl_is_told_what_its_pipeline_is_told(tiny: Any) -> None:
    frame = Buckets.of(64, 16).frame((300, 700))
    (height, width), noise = frame.size, gaussian([1], tiny.noise_shape(*frame.size))
    told = tiny.framed(tiny.encode_prompts(PROMPTS[:1]), [frame])
    how = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"}
    with torch.no_grad():
        ours, plain = (tiny.latents(noise, t) for t in (told, tiny.encode_prompts(PROMPTS[:1])))
        theirs = tiny.pipe(PROMPTS[0], latents=noise, height=height, width=width, **how,
                           **{k: tuple(v) for k, v in frame.fields.items()}).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-4


def test_batches_have_one_size_and_a_resumed_training_goes_on() -> None:
    kinds = [0, 1, 0, 0, 2, 1, 0, 0, 1, 0]
    per_epoch = steps_per_epoch(kinds, 2)
    assert per_epoch == 3 + 2 + 1
    made = list(batches(kinds, 2, 0, 0, 3 * per_epoch))
    for epoch in range(3):
        part = made[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(k for rows in part for k in rows) == list(range(10))
    assert all(len({kinds[k] for k in rows}) == 1 for rows in made)
    assert made[:per_epoch] != made[per_epoch : 2 * per_epoch]
    assert list(batches(kinds, 2, 0, 7, 18)) == made[7:]
    order = [kinds[rows[0]] for rows in made[:per_epoch]]
    assert order != sorted(order)


def test_of_many_pairs_neighbours_are_drawn_together_and_some_are_mixed(monkeypatch: Any) -> None:
    monkeypatch.setattr(batch, "_BUFFER", 16)
    monkeypatch.setattr(batch, "_BLOCK", 4)
    kinds = [k % 3 == 0 for k in range(50)]
    per_epoch = steps_per_epoch(kinds, 3)
    made = list(batches(kinds, 3, 0, 0, 2 * per_epoch))
    for part in (made[:per_epoch], made[per_epoch:]):
        assert sorted(k for rows in part for k in rows) == list(range(50))
        assert all(len({kinds[k] for k in rows}) == 1 for rows in part)
        blocks = {k // 4 for rows in part[:4] for k in rows}
        assert len(blocks) == 4 and blocks != {0, 1, 2, 3}
    assert made[:per_epoch] != made[per_epoch:]
    assert list(batches(kinds, 3, 0, 25, 30)) == made[25:30]
    assert sorted(k for rows in in_order(kinds, 3) for k in rows) == list(range(50))
    assert len(list(in_order(kinds, 3))) == per_epoch


def test_training_on_buckets_resumes_to_the_same_bits(
    small_model: Path, bucketed: Path, tmp_path: Path, forks: Any
) -> None:
    def sft(folder: Path) -> list[object]:
        flags = "--batch_size 4 --epochs 1 --preserve_pool_size 2 --pixel_l1_weight 0.1"
        place = ["--manifest_path", bucketed / "manifest.jsonl", "--output_dir", folder]
        return ["--model_id", small_model, *place, *flags.split(), "--save_minutes", 0]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = forks.run("sft", sft(whole), whole)
    assert ended.code == 0 and f"are of {len({*BUCKETS})} sizes; preserve losses" in ended.err
    ended = forks.run("sft", sft(killed), killed, at="state.safetensors", signal_number=2)
    assert ended.code == 128 + signal.SIGINT
    assert forks.run("sft", sft(killed), killed).code == 0
    summary = json.loads((killed / "summary.json").read_text())
    assert summary["steps"] == len({*BUCKETS}) and summary["failed"] == 0
    assert summary["matched_loss_after"] < summary["matched_loss_before"]
    name = "checkpoint-final/unet/diffusion_pytorch_model.safetensors"
    one, other = (load_file(folder / name) for folder in (whole, killed))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_resumed_assignment_in_buckets_gives_the_same_noises(
    bucketed: Path, assign: Flags, tmp_path: Path, forks: Any
) -> None:
    flags, run = assign(tmp_path / "run", "--num_images", 2), tmp_path / "run"
    ended = forks.run("assign", flags, run, at="00000003.safetensors")
    assert ended.code == -signal.SIGKILL
    assert 0 < len(list((run / "noises").glob("*.safetensors"))) < len({*BUCKETS})
    assert forks.run("assign", flags, run).code == 0
    for path in sorted((bucketed / "noises").iterdir()):
        assert torch.equal(load_file(path)["z"], load_file(run / "noises" / path.name)["z"])


def test_early_stops_and_pools_keep_sizes_apart(assign: Flags, tmp_path: Path, call: Call) -> None:
    for k, more in enumerate(("--stop_patience 1 --stop_improvement 0.5", "--pool_window 3")):
        flags = [*more.split(), *(["--method", "pool+sphere"] if k else [])]
        ended = call("assign", *assign(tmp_path / str(k), "--num_images", 0), *flags)
        assert ended.code == 0, ended.err
        rows = rows_of(tmp_path / str(k) / "manifest.jsonl")
        assert [tuple(row["target_size"]) for row in rows] == BUCKETS


def test_a_bucket_without_its_frame_fails_alone(bucketed: Path, tmp_path: Path) -> None:
    rows = rows_of(bucketed / "manifest.jsonl")
    del rows[2]["original_size"]
    path = bucketed / "broken.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pairs, failures = read_manifest(path)
    path.unlink()
    assert len(pairs) == len(rows) - 1
    assert "resize_mode bucket needs 'original_size'" in failures[0].reason


def test_one_size_that_is_no_square(
    small_model: Path, shapes: Path, tmp_path: Path, call: Call
) -> None:
    wide = ["--width", 96, "--height", 48]
    folder = tmp_path / "em"
    flags = "--num_cycles 1 --assign_steps 1 --train_epochs 1 --eval_samples 12 --num_images 1"
    flags += " --preserve_pool_size 4 --heldout 0.3 --assign_batch_size 4 --train_batch_size 4"
    ended = call("em", "--data_root", shapes, "--work_dir", folder, "--seed", 3,
                 "--initial_model_id", small_model, *flags.split(), *wide)  # fmt: skip
    assert ended.code == 0, ended.err
    run = json.loads((folder / "run.json").read_text())
    assert (run["height"], run["width"]) == (48, 96) and "resolution" not in run
    row = rows_of(folder / "cycle-01/assign/manifest.jsonl")[0]
    assert read_noise(folder / "cycle-01/assign" / row["noise_path"], 0).shape == (4, 6, 12)
    assert "accuracy" in json.loads((folder / "eval/cycle-01.json").read_text())
    assert "width 96" in (folder / "report.html").read_text()
    ended = call("optimize", "--prompt", PROMPTS[0], "--reward", "digit", "--model_id", small_model,
                 "--steps", 1, "--output_dir", tmp_path / "found", *wide)  # fmt: skip
    assert ended.code == 0, ended.err
    with Image.open(tmp_path / "found/images/00000-00-best.png") as image:
        assert image.size == (96, 48)


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        ("assign", "--bucket_step 12 --resize_mode bucket", "12 is not a positive multiple of 8"),
        ("assign", "--resize_mode bucket", "leaves no other size than 64 x 64"),
        ("assign", "--resize_mode bucket --bucket_step 8", "patch_size 2 does not divide"),
        ("assign", "--width 60 --height 64", "width 60 is not a positive multiple of 8"),
        ("assign", "--width 64", "--width and --height go together"),
        ("evaluate", "--resize_mode bucket", "--resize_mode bucket: images are compared at one"),
    ],
)
def test_bad_sizes_are_refused(
    command: str, flags: str, said: str, shapes: Path, tmp_path: Path, call: Call
) -> None:
    more = "--method rotation --patch_size 2" if command == "assign" else ""
    ended = call(command, "--data_root", shapes, "--output_dir", tmp_path / "run", "--model_id",
                 "tiny", *more.split(), *flags.split())  # fmt: skip
    assert ended.code == 2 and said in ended.error
    assert not (tmp_path / "run").exists()
