"""The packaged generator, and its shape with random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from oneshot_fast.embedded.classifier import WEIGHTS
from oneshot_fast.embedded.digits import DIGIT_WORDS
from oneshot_fast.embedded.pipeline import (
    OTHER_WORDS,
    build_tokenizer,
    model_path,
    random_pipeline,
)

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=torch.float32)


def test_packaged_pipeline_has_the_shape_of_sdxl_turbo(pipeline):
    assert isinstance(pipeline.text_encoder, CLIPTextModel)
    assert isinstance(pipeline.text_encoder_2, CLIPTextModelWithProjection)
    assert pipeline.unet.config.addition_embed_type == "text_time"
    assert pipeline.vae.config.latent_channels == 4
    assert pipeline.vae_scale_factor == 8
    scheduler = pipeline.scheduler
    assert isinstance(scheduler, EulerAncestralDiscreteScheduler)
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.prediction_type == "epsilon"
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999.0]
    # SDXL-Turbo's largest sigma.
    assert scheduler.sigmas[0].item() == pytest.approx(14.6146, abs=1e-3)


def test_packaged_weights_are_small_and_load_as_fp32_by_default():
    files = [path for path in model_path().rglob("*") if path.is_file()] + [WEIGHTS]
    assert sum(path.stat().st_size for path in files) <= 8 * MEGABYTE
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl"}]
    plain = StableDiffusionXLPipeline.from_pretrained(model_path())
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert getattr(plain, name).dtype == torch.float32, name


def test_each_known_word_is_one_token_and_any_text_survives():
    tokenizer = build_tokenizer()
    for word in DIGIT_WORDS + OTHER_WORDS:
        assert tokenizer.tokenize(word) == [word + "</w>"]
    ids = tokenizer("Une image: 7 chats, naïve 漢字!").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == (
        "uneimage:7chats,naïve漢字!"
    )
    assert len(tokenizer("three", padding="max_length").input_ids) == 77


def test_random_pipeline_is_deterministic_and_leaves_the_global_seed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = random_pipeline(1), random_pipeline(1), random_pipeline(2)
    assert torch.equal(before, torch.get_rng_state())
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        a, b, c = (next(getattr(p, name).parameters()) for p in (one, same, other))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
