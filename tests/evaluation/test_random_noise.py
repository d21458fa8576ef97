"""The measure on random noise: seeded, kept, and of the drift from the first generator."""

import pytest
import torch

from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.evaluation.features import of_classifier
from oneshot_fast.evaluation.random_noise import (
    RandomNoiseMeasure,
    compare,
    evaluated_prompts,
    shown,
)
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


def test_with_one_prompt_as_many_images_are_shown_as_are_named(tmp_path):
    generator = load_generator("tiny", device="cpu")
    prompts = ["a handwritten digit one"] * 3
    measure = RandomNoiseMeasure(prompts, (4, 8, 8), samples=12, seed=1)
    measure.measure(generator, tmp_path / "base")
    assert len(shown(tmp_path / "base")) == len(measure.described["prompts"]) == 8


def test_prompts_are_as_frequent_as_in_the_data_and_take_turns():
    prompts, labels = evaluated_prompts(["a"] * 6 + ["b"] * 3 + ["c"], 10, 0)
    assert prompts == list("abcabababaaa"[:5]) + prompts[5:]
    assert {k: prompts.count(k) for k in "abc"} == {"a": 6, "b": 3, "c": 1}
    assert [["a", "b", "c"][k] for k in labels] == prompts
    even, _ = evaluated_prompts(["a", "b", "c", "a", "b"], 8, 0)
    assert even == list("abcabcab")


def test_of_many_prompts_so_many_are_taken_that_each_has_two_images():
    prompts, labels = evaluated_prompts([str(k) for k in range(1000)], 100, 0)
    assert len({*prompts}) == 50 and len(prompts) == 100 == len(labels)
    assert len({*evaluated_prompts([str(k) for k in range(1000)], 20, 0)[0]}) == 10


def test_distances_to_real_images_with_errors_and_a_verdict_in_pairs(tmp_path):
    """A generator that leaves the domain is worse; the same one again cannot be told apart."""
    generator = load_generator("tiny", device="cpu")
    prompts = ["a handwritten digit one", "a handwritten digit two"]
    shape = (4, 8, 8)
    real = [generator.decode(generator.latents(torch.randn(1, *shape), generator.encode_prompts(
        [prompt])))[0] for prompt in prompts * 8]  # fmt: skip
    judge = of_classifier(load_classifier())
    measure = RandomNoiseMeasure(
        prompts, shape, samples=20, seed=1, features=judge, real=real, real_prompts=prompts * 8
    )
    base = measure.measure(generator, tmp_path / "base")
    assert base["errors"]["mmd"] > 0 and base["frechet_distance"] > 0
    again = measure.measure(generator, tmp_path / "again")
    assert again == base
    with torch.no_grad():
        generator.pipe.unet.conv_out.weight.mul_(3)
    measure.measure(generator, tmp_path / "other")
    found = compare(tmp_path / "base", tmp_path / "other")
    for name in ("energy_score", "mmd", "frechet_distance"):
        assert found[name].word == "worse", name
    same = compare(tmp_path / "base", tmp_path / "again")
    assert same["energy_score"].word == same["mmd"].word == "cannot be told apart"
