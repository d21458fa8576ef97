"""The M-step end to end on the embedded model: what is trained, kept, resumed and refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from samples import rows_of
from torch import Tensor

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.pairs import Examples
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.sft import main
from oneshot_fast.training.batch import Batch, batches
from oneshot_fast.training.losses.base import OneStepLoss
from oneshot_fast.training.losses.preserve import Preserve, PreservePool
from oneshot_fast.training.trainer import Trainer

Call = Callable[..., Any]


def flags(manifest: Path, folder: Path, *more: object) -> list[object]:
    fixed = "--model_id tiny --epochs 2 --batch_size 4 --lr 2e-5 --preserve_pool_size 8"
    return ["--manifest_path", manifest, "--output_dir", folder, *fixed.split(), *more]


def unet_of(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, assigned: Path) -> Path:
    """A finished training on the shared assignment."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main([str(v) for v in flags(assigned / "manifest.jsonl", folder)]) == 0
    return folder


def test_a_run_has_its_files_and_its_loss_falls(trained: Path, assigned: Path) -> None:
    names = {path.name for path in trained.iterdir()} - {".lock"}
    files = "failures.jsonl files.jsonl history.jsonl preserve.safetensors report.html run.json "
    files += "summary.json"
    assert names == {*files.split(), "checkpoint-best", "checkpoint-final"}
    summary, history = (
        json.loads((trained / "summary.json").read_text()),
        rows_of(trained / "history.jsonl"),
    )
    assert {"samples": 6, "steps": 4, "failed": 0}.items() <= summary.items()
    before = json.loads((assigned / "summary.json").read_text())["best_loss"]
    assert summary["matched_loss_before"] == pytest.approx(before, rel=1e-4)
    assert summary["matched_loss_after"] < 0.99 * before
    assert [row["step"] for row in history] == [2, 4]
    assert history[1]["matching"] < history[0]["matching"]
    assert summary["best_epoch"] == 1 + (history[1]["loss"] < history[0]["loss"])


def test_checkpoints_are_pipelines_with_the_trained_unet(trained: Path, tiny: Generator) -> None:
    final = trained / "checkpoint-final"
    generator = load_generator(final, variant="fp16")
    pipe = StableDiffusionXLPipeline.from_pretrained(final)
    pipe.set_progress_bar_config(disable=True)
    assert equal(pipe.unet.state_dict(), unet_of(final))
    assert not equal(tiny.denoiser.state_dict(), unet_of(final))
    assert equal(tiny.pipe.vae.state_dict(), pipe.vae.state_dict())
    eps, prompt = gaussian([3], (4, 8, 8)), "a handwritten digit one"
    with torch.no_grad():
        ours = generator.latents(eps, generator.encode_prompts([prompt]))
    theirs = pipe(prompt, num_inference_steps=1, guidance_scale=0.0, latents=eps,
                  output_type="latent").images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["best_epoch"] == 2  # so the best weights are the last ones
    assert equal(unet_of(trained / "checkpoint-best"), unet_of(final))
    assert load_generator(trained / "checkpoint-best").fingerprint() == generator.fingerprint()


def test_the_best_epoch_is_kept_when_training_diverges(assigned: Path, tmp_path: Path) -> None:
    pairs, _ = read_manifest(assigned / "manifest.jsonl")

    def train(name: str, epochs: int) -> dict[str, Any]:
        generator = load_generator("tiny", master_weights=True)
        options = SftOptions(
            epochs=epochs, lr=0.05, preserve_latent_weight=0.0, preserve_pixel_weight=0.0
        )
        summary = SftRun(generator, pairs, tmp_path / name, options).run()
        assert equal(generator.denoiser.state_dict(), unet_of(tmp_path / name / "checkpoint-final"))
        return summary

    best = train("whole", 3)["best_epoch"]
    assert best < 3
    train("short", best)
    kept, short = (tmp_path / f for f in ("whole/checkpoint-best", "short/checkpoint-final"))
    assert equal(unet_of(kept), unet_of(short))


def test_the_reference_workflow_gives_the_same_training(
    trained: Path, assigned: Path, tmp_path: Path, call: Call
) -> None:
    lines = []
    for pair in read_manifest(assigned / "manifest.jsonl")[0]:
        torch.save(
            {"z": read_noise(pair.noise_path, pair.noise_index)[None]}, tmp_path / f"{pair.id}.pt"
        )
        lines.append({"prompt": pair.prompt, "target_image_path": str(pair.image_path),
                      "best_input_noise_path": str(tmp_path / f"{pair.id}.pt")})  # fmt: skip
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert call("sft", *flags(tmp_path / "manifest.jsonl", tmp_path / "run")).code == 0
    assert equal(unet_of(tmp_path / "run/checkpoint-final"), unet_of(trained / "checkpoint-final"))


def test_images_that_lose_much_are_counted(assigned: Path, tmp_path: Path, call: Call) -> None:
    pair = read_manifest(assigned / "manifest.jsonl")[0][0]
    noise = {"z": read_noise(pair.noise_path, pair.noise_index)[None]}
    torch.save(noise, tmp_path / "z.pt")
    lines = []
    for name, size in (("a", (64, 64)), ("b", (64, 200)), ("c", (300, 64)), ("d", (64, 200))):
        Image.new("L", size, 99).save(tmp_path / f"{name}.png")
        row = {"prompt": pair.prompt, "target_image_path": f"{name}.png"}
        lines.append(row | {"best_input_noise_path": "z.pt"})
    lines[3]["resize_mode"] = "pad"
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ended = call("sft", *flags(tmp_path / "manifest.jsonl", tmp_path / "run"))
    assert ended.code == 0, ended.err
    assert ended.err.count("warning: 2 images lose more than a third, most ") == 1
    assert f'{tmp_path / "c.png"} (79%); "resize_mode": "pad" in the manifest' in ended.err


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["HARM"],)


def test_pickled_code_is_not_run_and_the_rest_is_trained(
    assigned: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    pairs, _ = read_manifest(assigned / "manifest.jsonl")
    torch.save({"z": read_noise(pairs[0].noise_path, pairs[0].noise_index)}, tmp_path / "good.pt")
    torch.save(
        {"z": read_noise(pairs[0].noise_path, pairs[0].noise_index), "more": Harmful()},
        tmp_path / "bad.pt",
    )
    torch.save(torch.zeros(4, 6, 6), tmp_path / "small.pt")
    pair = {"prompt": pairs[0].prompt, "target_image_path": str(pairs[0].image_path)}
    lines = [pair | {"best_input_noise_path": f"{name}.pt"} for name in ("bad", "good", "small")]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ended = call("sft", *flags(tmp_path / "manifest.jsonl", tmp_path / "run"))
    assert ended.code == 1 and "2 pairs failed" in ended.err
    assert not (tmp_path / "harm").exists()
    reasons = [row["reason"] for row in rows_of(tmp_path / "run" / "failures.jsonl")]
    assert "pickled code is never run" in reasons[0]
    assert "[4, 6, 6], the model takes [4, 8, 8]" in reasons[1]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 1


def test_a_moved_run_still_trains(small_data: Path, tmp_path: Path, call: Call) -> None:
    shutil.copytree(small_data, tmp_path / "here" / "data")
    root = tmp_path / "here"
    places = ("--data_root", root / "data", "--output_root", root / "runs" / "a")
    assert call("assign", *places, "--model_id", "tiny", "--steps", 1, "--max_samples", 2).code == 0
    root.rename(tmp_path / "there")
    manifest = tmp_path / "there" / "runs" / "a" / "manifest.jsonl"
    assert str(tmp_path) not in manifest.read_text()
    assert call("sft", *flags(manifest, tmp_path / "there" / "s", "--epochs", 1)).code == 0


def preserved(generator: Generator, folder: Path, count: int) -> Batch:
    prompts = ["a handwritten digit one", "a handwritten digit two"]
    options = SftOptions(preserve_pool_size=20)
    pool = PreservePool.build(generator, options, prompts, (64, 64), 0, folder)
    assert pool is not None
    return Batch(preserve=pool.rows(generator, count, 5))


def test_the_preserve_loss_starts_at_zero_and_sees_any_change(tmp_path: Path) -> None:
    generator = load_generator("tiny", master_weights=True)
    loss = OneStepLoss(preserve=Preserve(0.5, 0.5))
    batch = preserved(generator, tmp_path, 7)
    with torch.no_grad():
        assert 0 <= loss(generator, batch)["preserve"].item() < 1e-5
        next(iter(generator.denoiser.parameters())).add_(0.01)
        assert loss(generator, batch)["preserve"].item() > 1e-4
    # The pool on disk is of the base generator, so a resumed run is held to the same targets.
    again = preserved(generator, tmp_path, 7)
    kept = [rows["preserve"].extra["latents"] for rows in (batch, again)]
    assert torch.equal(*kept)


def test_random_noise_and_pixels_train_differently(
    trained: Path, assigned: Path, tmp_path: Path, call: Call
) -> None:
    manifest = assigned / "manifest.jsonl"
    more = {"random": ("--noise", "random"), "pixels": ("--pixel_l1_weight", 1.0)}
    results = [unet_of(trained / "checkpoint-final")]
    for name, extra in more.items():
        assert call("sft", *flags(manifest, tmp_path / name, *extra)).code == 0
        results.append(unet_of(tmp_path / name / "checkpoint-final"))
    assert not any(equal(results[k], results[k - 1]) for k in range(3))


Train = Callable[[Path], Generator]


@pytest.fixture(scope="module")
def train(small_model: Path, small_assigned: Path) -> Train:
    """A training that validates, with the same flags in any folder."""
    pairs, _ = read_manifest(small_assigned / "manifest.jsonl")
    options = SftOptions(
        max_steps=5, batch_size=4, lr=1e-4, lr_warmup_steps=2, preserve_pool_size=6,
        lr_scheduler="cosine_with_restarts", lr_num_cycles=2, validation_steps=2,
    )  # fmt: skip

    def run(folder: Path) -> Generator:
        generator = load_generator(str(small_model), master_weights=True)
        SftRun(generator, pairs, folder, options, seed=1, save_minutes=0).run()
        return generator

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, train: Train) -> tuple[Path, Generator]:
    """One that nothing interrupted, and what it made."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(folder)


@pytest.mark.parametrize("killed_at", [1, 2, 4])
def test_a_resumed_training_equals_the_uninterrupted_one(
    whole: tuple[Path, Generator],
    train: Train,
    tmp_path: Path,
    killed_at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update, (folder, trained) = Trainer.update, whole

    def dying(self: Trainer) -> None:
        if self.step == killed_at:
            raise KeyboardInterrupt
        update(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "update", dying)
        train(tmp_path / "parts")
    resumed = train(tmp_path / "parts")
    for name in ("best", "final"):
        old, new = (unet_of(f / f"checkpoint-{name}") for f in (folder, tmp_path / "parts"))
        assert equal(old, new)
    assert equal(resumed.denoiser.state_dict(), trained.denoiser.state_dict())
    for name in ("history.jsonl", "validation/00000002.png", "validation/00000004.png"):
        assert (folder / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert [row["step"] for row in rows_of(folder / "history.jsonl")] == [2, 4, 5]
    assert not (tmp_path / "parts" / "state.safetensors").exists()
    again = train(tmp_path / "parts")  # finished: nothing is trained, the weights are taken over
    assert equal(again.denoiser.state_dict(), trained.denoiser.state_dict())


def without_times(path: Path) -> object:
    rows = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    times = ("seconds", "steps_per_second")
    found = [json.loads(row) for row in rows]
    return [
        {k: v for k, v in row.items() if k not in times} if isinstance(row, dict) else row
        for row in found
    ]


@pytest.mark.slow
def test_equal_trainings_leave_equal_files(
    small_model: Path, small_assigned: Path, tmp_path: Path, forks: Any, one_thread: None
) -> None:
    """In this process and in one that hashes differently, of all weights and of an adapter."""
    manifest = small_assigned / "manifest.jsonl"
    more = ("--model_id", small_model, "--epochs", 1, "--keep_checkpoints", 1, "--lora_rank")
    one, other = (
        [[*map(str, flags(manifest, tmp_path / name / str(rank), *more, rank))] for rank in (0, 2)]
        for name in "ab"
    )
    assert not any(map(main, one))
    assert not any(forks.run("sft", argv, tmp_path).code for argv in other)
    one, other = tmp_path / "a", tmp_path / "b"
    names, twins = ({p.relative_to(x) for p in x.rglob("*") if p.is_file()} for x in (one, other))
    assert names == twins and len([name for name in names if name.suffix == ".safetensors"]) >= 12
    for name in names:
        if name.name in ("files.jsonl", "report.html"):  # which have the times, too
            continue
        if name.suffix in (".json", ".jsonl"):
            assert without_times(one / name) == without_times(other / name), name
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_every_epoch_takes_every_pair_once_and_a_resumed_one_goes_on() -> None:
    all_steps = list(batches([0] * 10, 4, 0, 0, 9))
    for epoch in range(3):
        taken = itertools.chain(*all_steps[3 * epoch : 3 * epoch + 3])
        assert sorted(taken) == list(range(10))
    assert all_steps[:3] != all_steps[3:6]
    assert list(batches([0] * 10, 4, 0, 4, 9)) == all_steps[4:]
    assert list(batches([0] * 10, 4, 1, 0, 9)) != all_steps
    assert derived_seed(0, "a", 1) != derived_seed(0, "a1")


def test_latents_are_encoded_once_and_anew_where_the_image_changed(
    tiny: Any, assigned: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image.png"
    first, second, *_ = (
        replace(pair, image_sha256=None) for pair in read_manifest(assigned / "manifest.jsonl")[0]
    )
    shutil.copy(first.image_path, image)
    pairs, folder = [replace(first, image_path=image), second], tmp_path / "latents"

    def read() -> Examples:
        return Examples(tiny, TargetImages(tiny), pairs, [], folder)

    began = read()
    (file,) = folder.iterdir()
    written, before = file.stat().st_mtime_ns, began.latents([0, 1])
    assert read().contents == began.contents and file.stat().st_mtime_ns == written
    shutil.copy(second.image_path, image)
    after = read()
    assert after.contents != began.contents
    assert torch.equal(after.latents([1])[0], before[1])
    assert torch.equal(after.latents([0])[0], before[1])
