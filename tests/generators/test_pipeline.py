"""Another pipeline of diffusers becomes a family by little more than its conditioning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from generator_samples import OneEncoder

from oneshot_fast.embedded.pipeline import model_path
from oneshot_fast.errors import ModelError
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.sd import SdGenerator
from oneshot_fast.generators.target_images import TargetImages

OUTSIDE = "python:generator_samples.OneEncoder"
PROMPTS = ["a handwritten digit three", "the number 7 in blue ink"]


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with one text encoder; its UNet has random weights."""
    plain = {"addition_embed_type": None, "projection_class_embeddings_input_dim": None}
    width = tiny.pipe.text_encoder.config.hidden_size
    unet = UNet2DConditionModel.from_config(
        {**tiny.denoiser.config, **plain, "cross_attention_dim": width}
    )
    parts = {name: tiny.pipe.components[name] for name in ("vae", "text_encoder", "tokenizer")}
    parts["scheduler"] = EulerAncestralDiscreteScheduler.from_config(
        tiny.pipe.scheduler.config,
        steps_offset=1,  # this pipeline warns of 0
    )
    lacking = {"safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(**parts, **lacking, unet=unet, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("family") / "model"
    OneEncoder(pipe).save(folder)
    return folder


def test_one_step_equals_the_pipeline(folder: Path) -> None:
    generator = load_generator(f"{OUTSIDE}:{folder}")
    assert isinstance(generator, OneEncoder) and generator.image_size == 64
    eps = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        conditioning = generator.encode_prompts(PROMPTS)
        latents = generator.latents(eps, conditioning)
        expected = generator.pipe(
            PROMPTS, num_inference_steps=1, guidance_scale=0.0, latents=eps, output_type="latent"
        ).images
    assert conditioning.pooled is None
    assert conditioning.embeds.shape == generator.blank_prompts(2).embeds.shape
    bound = 2e-5 * expected.abs().max().item()
    torch.testing.assert_close(latents, expected, rtol=0, atol=bound)


def test_encodings_are_kept_on_disk(folder: Path, small_data: Path, tmp_path: Path) -> None:
    generator = load_generator(f"{OUTSIDE}:{folder}")
    image, found = next((small_data / "images").iterdir()), []
    for cached in (False, True, True):
        other = load_generator(f"{OUTSIDE}:{folder}")
        if cached:
            other.use_cache(tmp_path)
        latent = TargetImages(other).latent(image, "crop")
        found.append((other.encode_prompts(PROMPTS).embeds, latent))
    assert len([*tmp_path.rglob("*.safetensors")]) == 3
    for embeds, latent in found[1:]:
        assert torch.equal(embeds, found[0][0]) and torch.equal(latent, found[0][1])
    assert other.fingerprint() == generator.fingerprint()
    # the same weights, but a config that says how they are used otherwise
    config = shutil.copytree(folder, tmp_path / "scaled") / "vae" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"scaling_factor": 2 * values["scaling_factor"]}))
    scaled = load_generator(f"{OUTSIDE}:{tmp_path / 'scaled'}")
    scaled.use_cache(tmp_path)
    assert scaled.fingerprint() != generator.fingerprint()
    torch.testing.assert_close(TargetImages(scaled).latent(image, "crop"), 2 * found[0][1])


def test_heads_of_a_text_encoder_are_in_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    config = shutil.copytree(folder, tmp_path / "heads") / "text_encoder" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"num_attention_heads": 1}))
    found = {load_generator(path).fingerprint() for path in (folder, config.parents[1])}
    assert values["num_attention_heads"] > 1 and len(found) == 2


def test_ours_for_the_same_pipeline_gives_the_same(folder: Path) -> None:
    ours, theirs = load_generator(folder), load_generator(f"{OUTSIDE}:{folder}")
    assert type(ours) is SdGenerator and ours.fingerprint() == theirs.fingerprint()
    with pytest.raises(ModelError, match="told of more than text"):
        load_generator(f"python:oneshot_fast.generators.sd.SdGenerator:{model_path()}")
