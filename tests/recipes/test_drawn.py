"""The recipe of a generator of drawn images."""

import pytest
from diffusers import StableDiffusionXLPipeline

from oneshot_fast.recipes.drawn import train_drawn
from oneshot_fast.recipes.toy.data import shapes


@pytest.mark.slow
def test_the_recipe_runs_and_keeps_its_stages(tmp_path):
    images = shapes("train", 32, 64)
    train_drawn(images, tmp_path, quick=True)
    stamp = (tmp_path / "vae.safetensors").stat().st_mtime_ns
    train_drawn(images, tmp_path, quick=True)
    assert (tmp_path / "vae.safetensors").stat().st_mtime_ns == stamp
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipeline")
    prompt = {"prompt": images.prompts[0], "num_inference_steps": 1, "guidance_scale": 0.0}
    assert pipeline(**prompt).images[0].size == (64, 64)
