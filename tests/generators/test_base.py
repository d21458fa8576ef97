"""What every family shares: rows of prompts, pictures, and families from outside the package."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_samples import Tinted
from PIL import ImageChops
from safetensors.torch import load_file

from oneshot_fast.data.images import to_pil
from oneshot_fast.errors import UserError
from oneshot_fast.generators.base import Conditioning, Prediction
from oneshot_fast.generators.loading import OneStepGenerator, load_generator
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.generators.sdxl import SdxlGenerator

PROMPTS = ["a handwritten digit three", "the number 7 in blue ink"]


@pytest.mark.parametrize("pooled", [torch.arange(6.0).view(3, 2), None], ids=["pooled", "none"])
def test_rows_of_prompts(pooled: torch.Tensor | None) -> None:
    whole = Conditioning(torch.arange(12.0).view(3, 2, 2), pooled)
    again = Conditioning.cat([whole.select([0]), whole.select([1, 2])])
    turned = whole.select(torch.tensor([2, 0, 1])).select([1, 2, 0])
    for other in (again, turned):
        assert other.tensors().keys() == whole.tensors().keys()
        assert all(torch.equal(other.tensors()[k], v) for k, v in whole.tensors().items())


def test_the_latents_of_a_prediction() -> None:
    output, x = torch.randn(2, 3, 4, 2, 2).unbind()
    prediction = Prediction(output, x, 14.6)
    assert torch.equal(prediction.latents, x - 14.6 * output)
    assert torch.equal(prediction.select(slice(1, None)).latents, prediction.latents[1:])


def test_pictures_of_prompts(tiny: SdxlGenerator) -> None:
    generator = OneStepGenerator.from_pretrained("tiny", device="cpu")
    noise = torch.randn(2, 4, 8, 8)
    pictures = generator.generate(PROMPTS, noise)
    with torch.no_grad():
        images = tiny.images(tiny.latents(noise, tiny.encode_prompts(PROMPTS)))
    for picture, image in zip(pictures, images, strict=True):
        difference = ImageChops.difference(picture, to_pil(image))
        assert picture.size == (64, 64)
        assert max(high for _, high in difference.getextrema()) <= 1
    drawn = [generator.generate(PROMPTS, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0][1].tobytes() == drawn[1][1].tobytes() != drawn[2][1].tobytes()
    with pytest.raises(UserError, match="expected 1 noises, one per prompt, got 2"):
        generator.generate(PROMPTS[:1], noise)


def test_a_copy_has_weights_of_its_own(tiny: SdxlGenerator) -> None:
    other = copy.deepcopy(tiny)
    assert other.fingerprint() == tiny.fingerprint()
    assert other.pipe.tokenizer is tiny.pipe.tokenizer
    with torch.no_grad():
        other.denoiser.conv_out.bias.add_(1)
    assert other.fingerprint() != tiny.fingerprint()
    assert other.decoder._vae is other.pipe.vae is not tiny.pipe.vae


def test_a_family_from_outside_does_what_ours_do(tmp_path: Path, call: Any) -> None:
    name = "python:generator_samples.Tinted"
    assert isinstance(load_generator(name), Tinted) and load_generator(name).image_size == 8
    to_pil(torch.rand(3, 8, 8)).save(tmp_path / "image.png")
    ended = call(
        "assign", "--model_id", f"{name}:16", "--prompt", "a prompt", "--target_image_path",
        tmp_path / "image.png", "--output_dir", tmp_path / "run", "--steps", 5, "--num_images", 1,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    (row,) = map(json.loads, (tmp_path / "run" / "manifest.jsonl").read_text().splitlines())
    assert row["losses"][-1] < 0.5 * row["losses"][0]
    noise = load_file(tmp_path / "run" / row["noise_path"])["z"]
    assert noise.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True}, "not compiled"),
        ({"decoder_tiling": 32}, "no decoder"),
        ({"cache_dir": Path("cache")}, "encodes nothing"),
    ],
    ids=["compile", "decoder", "cache"],
)
def test_what_a_family_lacks_is_refused_in_one_line(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelOptions(**options).load("python:generator_samples.Tinted")


def test_wrong_families_are_refused() -> None:
    for name, message in (
        ("python:generator_samples.Absent", "cannot import generator"),
        ("python:generator_samples.Conditioning", "is no subclass of Generator"),
    ):
        with pytest.raises(UserError, match=message):
            load_generator(name)
