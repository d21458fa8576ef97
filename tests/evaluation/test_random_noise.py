"""The measure on random noise: seeded, kept, and of the drift from the first generator."""

import pytest
import torch

from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure
from oneshot_fast.generators.loading import load_generator


def test_measure_is_seeded_kept_and_measures_drift_from_the_first_generator(tmp_path):
    generator = load_generator("tiny", device="cpu")
    prompts = ["a handwritten digit one", "a handwritten digit two"]
    measure = RandomNoiseMeasure(prompts * 3, (4, 8, 8), samples=12, seed=1)
    base = measure.measure(generator, tmp_path / "base")
    assert base["samples"] == 12
    assert base["drift"] == 0
    assert base["diversity"] > 0
    with torch.no_grad():
        generator.pipe.unet.conv_out.bias.add_(1)
    moved = measure.measure(generator, tmp_path / "moved")
    assert moved["drift"] == pytest.approx(generator.step.sigma, rel=1e-4)
    assert measure.measure(generator, tmp_path / "base") == base  # kept, not measured again
    other = RandomNoiseMeasure(prompts, (4, 8, 8), samples=12, seed=2)
    assert not torch.equal(other.eps, measure.eps)
