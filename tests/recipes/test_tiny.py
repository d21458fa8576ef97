"""The recipe of the embedded generator, and what it reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from oneshot_fast.embedded import digits as dataset
from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.embedded.pipeline import model_path, teacher_path
from oneshot_fast.evaluation.measures import pairwise_diversity, prompt_accuracy
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.recipes.tiny import evaluate, material
from oneshot_fast.recipes.tiny.evaluate import reconstruction_psnr, sample_digits
from oneshot_fast.tiny import main


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=torch.float32)


def test_one_step_samples_are_the_prompted_digits_and_differ(pipeline):
    classifier = load_classifier()
    labels = torch.arange(10).repeat(20)
    samples = sample_digits(pipeline, labels, seed=3)
    digits, real_labels = dataset.load_digits("heldout")
    real = dataset.render(digits, dataset.BASE_STYLE)
    assert prompt_accuracy(classifier(samples), labels) >= 0.9
    assert pairwise_diversity(samples, labels) >= 0.5 * pairwise_diversity(real, real_labels)


def test_teacher_samples_in_several_steps_are_the_prompted_digits_and_differ(
    pipeline: StableDiffusionXLPipeline, tmp_path: Path
):
    generator: Any = load_generator("tiny-teacher", device="cpu")
    assert sum(p.stat().st_size for p in teacher_path().rglob("*.*")) <= 5_300_000
    config = generator.pipe.scheduler.config
    assert type(generator.pipe.scheduler) is EulerDiscreteScheduler
    assert config.timestep_spacing == "trailing" and config.prediction_type == "epsilon"
    for name in ("vae", "text_encoder", "text_encoder_2"):
        own, shared = (getattr(pipe, name).state_dict() for pipe in (generator.pipe, pipeline))
        assert all(torch.equal(own[key], shared[key]) for key in shared)

    labels, classifier = torch.arange(10).repeat(6), load_classifier()
    samples = sample_digits(generator.pipe, labels, seed=3, steps=6, guidance=2.0)
    assert prompt_accuracy(classifier(samples), labels) >= 0.95
    assert pairwise_diversity(samples, labels) >= 0.15

    generator.save(tmp_path / "saved")
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved")
    assert type(again.scheduler) is EulerDiscreteScheduler
    assert torch.equal(again.unet.conv_in.weight, generator.pipe.unet.conv_in.weight)


def test_evaluate_refuses_what_makes_no_sense(capsys):
    assert main(["evaluate", "--num_inference_steps=0"]) == 2
    assert "num_inference_steps is 0; give at least 1" in capsys.readouterr().err
    assert main(["evaluate", "--model_id=nowhere/there"]) == 2
    assert "cannot use model nowhere/there" in capsys.readouterr().err


def test_vae_reconstructs_both_styles(pipeline):
    digits, _ = dataset.load_digits("heldout")
    for style in (dataset.BASE_STYLE, dataset.TARGET_STYLE):
        assert reconstruction_psnr(pipeline.vae, dataset.render(digits[:50], style)) >= 22


@pytest.mark.slow
def test_recipe_runs_resumes_and_repeats(tmp_path, monkeypatch):
    """In stages, and at once."""
    few = tuple(part[:40] for part in dataset.load_digits("train"))
    for module in (material, evaluate):
        monkeypatch.setattr(module, "load_digits", lambda _: few)
    quick = ["--vae_steps=3", "--latent_copies=1", "--teacher_steps=3", "--solver_steps=2"]
    quick += ["--distill_pairs=32", "--distill_steps=3", "--classifier_steps=3", "--batch_size=8"]
    staged, whole = (["train", f"--output_dir={tmp_path / name}", *quick] for name in "ab")
    assert main([*staged, "--stage=vae"]) == 0
    stamp = (tmp_path / "a" / "vae.safetensors").stat().st_mtime_ns
    for command in (staged, whole):
        assert main(command) == 0
        assert main([*command, "--stage=packaged_teacher"]) == 0
    assert (tmp_path / "a" / "vae.safetensors").stat().st_mtime_ns == stamp
    for name in ("vae", "teacher", "pairs", "student", "classifier", "packaged_teacher"):
        a, b = ((tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("a", "b"))
        assert a == b, name
    command = ["evaluate", f"--model_id={tmp_path / 'a' / 'pipeline'}", "--samples_per_digit=2"]
    command += [f"--classifier={tmp_path / 'a' / 'classifier.safetensors'}"]
    command += [f"--output={tmp_path / 'm.json'}", f"--grid={tmp_path / 'grid.png'}"]
    assert main(command) == 0
    assert json.loads((tmp_path / "m.json").read_text())["samples"] == 20
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (640, 128)
