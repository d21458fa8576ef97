"""Encodings kept on disk: what is found again, by whom, and what is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.generators.target_images import TargetImages

PROMPT = "a handwritten digit one"


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def load(folder: Path) -> tuple[SdxlGenerator, list[str]]:
    """A generator with a cache, and what its encoders were run for."""
    generator = load_generator("tiny")
    generator.use_cache(folder)
    run: list[str] = []
    for name, module in (
        ("text", generator.pipe.text_encoder),
        ("vae", generator.pipe.vae.encoder),
    ):
        module.register_forward_pre_hook(lambda *_, name=name: run.append(name))
    return generator, run


def test_another_run_finds_the_same_values(tmp_path: Path, small_data: Path) -> None:
    image, folder = next((small_data / "images").iterdir()), tmp_path / "cache"
    plain = load_generator("tiny")
    expected = plain.encode_prompts([PROMPT]), TargetImages(plain).latent(image, "crop")
    for wanted in (["text", "vae"], []):
        generator, run = load(folder)
        encoding = generator.encode_prompts([PROMPT])
        latent = TargetImages(generator).latent(image, "crop")
        assert torch.equal(encoding.embeds, expected[0].embeds)
        assert torch.equal(encoding.pooled, expected[0].pooled)
        assert torch.equal(latent, expected[1])
        assert run == wanted and len(files(folder)) == 2


def test_what_differs_is_encoded_anew(tmp_path: Path, small_data: Path) -> None:
    images, folder = sorted((small_data / "images").iterdir()), tmp_path / "cache"
    generator, run = load(folder)
    TargetImages(generator).latent(images[0], "crop")
    generator.encode_prompts([PROMPT])
    copied = shutil.copy(images[0], tmp_path / "other name.png")
    TargetImages(generator).latent(Path(copied), "crop")
    assert run == ["vae", "text"]  # content counts, not the name
    TargetImages(generator).latent(images[1], "crop")
    TargetImages(generator).latent(images[0], "squash")
    TargetImages(generator, 128).latent(images[0], "crop")
    generator.encode_prompts([PROMPT + " two"])
    assert run == ["vae", "text", "vae", "vae", "vae", "text"]
    generator, run = load(folder)
    with torch.no_grad():
        for module in (generator.pipe.text_encoder_2, generator.pipe.vae):
            next(module.parameters()).add_(0.1)
    TargetImages(generator).latent(images[0], "crop")
    generator.encode_prompts([PROMPT])
    assert run == ["vae", "text"]


def test_a_torn_file_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    load(folder)[0].encode_prompts([PROMPT])
    (path,) = files(folder)
    good = {key: value.clone() for key, value in load_file(path).items()}
    os.truncate(path, path.stat().st_size // 2)
    generator, run = load(folder)
    generator.encode_prompts([PROMPT])
    assert run == ["text"] and len(files(folder)) == 1
    assert all(torch.equal(value, good[key]) for key, value in load_file(path).items())


def test_commands_share_it_and_results_stay_the_same(
    small_data: Path, assigned: Path, tmp_path: Path, call: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "cache"
    flags = ["--data_root", small_data, "--model_id", "tiny", "--steps", 3, "--batch_size", 4]
    flags += ["--assign_method", "rotation", "--lr", 0.15]  # as the fixture's
    cache = ["--cache_dir", folder]
    assert call("assign", *flags, "--output_root", tmp_path / "a", *cache).code == 0
    noises = [sorted((run / "noises").iterdir()) for run in (assigned, tmp_path / "a")]
    for old, new in zip(*noises, strict=True):
        assert torch.equal(load_file(old)["z"], load_file(new)["z"])
    kept = files(folder)
    assert kept
    monkeypatch.setattr(SdxlGenerator, "encode_image", None)  # nobody needs it any more
    flags = ["--manifest_path", tmp_path / "a" / "manifest.jsonl", "--model_id", "tiny"]
    flags += ["--output_dir", tmp_path / "sft", "--epochs", 1, "--preserve_pool_size", 4]
    assert call("sft", *flags, *cache).code == 0
    assert files(folder) == kept
