"""Target images: decoded once for all that reads them, and kept as long as there is room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from oneshot_fast.errors import UserError
from oneshot_fast.generators import target_images
from oneshot_fast.generators.target_images import TargetImages


def test_an_image_is_decoded_once(
    tiny: Any, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    load = target_images.load_image
    monkeypatch.setattr(
        target_images, "load_image", lambda path, *more: (loaded.append(path), load(path, *more))[1]
    )
    paths = sorted((small_data / "images").iterdir())[:2]
    targets = TargetImages(tiny)
    latents = targets.latents([(path, "crop") for path in paths])
    images = targets.images([(path, "crop") for path in paths])
    assert loaded == paths
    assert torch.equal(latents[1], tiny.encode_image(images[1]))
    targets.image(paths[0], "squash")
    assert loaded == [*paths, paths[0]]


def test_the_oldest_are_forgotten(tiny: Any, small_data: Path) -> None:
    paths = sorted((small_data / "images").iterdir())[:3]
    targets = TargetImages(tiny, latent_bytes=2 * 4 * 8 * 8 * 4)
    targets.latents([(path, "crop") for path in paths])
    assert [path for path, *_ in targets._latents] == paths[1:]


def test_a_resolution_must_fit(tiny: Any) -> None:
    with pytest.raises(UserError, match="resolution 60 is not a positive multiple of 8"):
        TargetImages(tiny, 60)


def test_a_model_of_another_size_is_warned_of(tiny, tmp_path, capsys):
    for side in (8, 9):
        Image.new("RGB", (64, side)).save(tmp_path / f"{side}.png")
    targets = TargetImages(tiny)
    targets.warn_of_size(tmp_path / "9.png")
    targets.warn_of_size(tmp_path / "absent.png")
    assert capsys.readouterr().err == ""
    targets.warn_of_size(tmp_path / "8.png")
    assert "the model is made for 64 x 64 pixels, " in capsys.readouterr().err
    TargetImages(tiny, 8).warn_of_size(tmp_path / "9.png")
    assert "is taken at 8: take larger images, or a model of that size" in capsys.readouterr().err
