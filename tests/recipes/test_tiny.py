"""The embedded default: the packaged generator, classifier and data set, and their recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from oneshot_fast.embedded import digits as dataset
from oneshot_fast.embedded.classifier import DigitClassifier, classifier_path, load_classifier
from oneshot_fast.embedded.pipeline import (
    OTHER_WORDS,
    build_tokenizer,
    model_path,
    random_pipeline,
)
from oneshot_fast.evaluation.measures import frechet_distance, pairwise_diversity, prompt_accuracy
from oneshot_fast.recipes.tiny.evaluate import reconstruction_psnr, sample_digits
from oneshot_fast.tiny import main

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    return load_classifier()


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
    files = [path for path in model_path().rglob("*") if path.is_file()] + [classifier_path()]
    assert sum(path.stat().st_size for path in files) <= 8 * MEGABYTE
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl"}]
    plain = StableDiffusionXLPipeline.from_pretrained(model_path())
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert getattr(plain, name).dtype == torch.float32, name


def test_each_known_word_is_one_token_and_any_text_survives():
    tokenizer = build_tokenizer()
    for word in dataset.DIGIT_WORDS + OTHER_WORDS:
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


def test_one_step_samples_are_the_prompted_digits_and_differ(pipeline, classifier):
    labels = torch.arange(10).repeat(20)
    samples = sample_digits(pipeline, labels, seed=3)
    digits, real_labels = dataset.load_digits("heldout")
    real = dataset.render(digits, dataset.BASE_STYLE)
    assert prompt_accuracy(classifier(samples), labels) >= 0.9
    assert pairwise_diversity(samples, labels) >= 0.5 * pairwise_diversity(real, real_labels)


def test_classifier_knows_the_digits_of_writers_it_has_not_seen(classifier):
    digits, labels = dataset.load_digits("heldout")
    for style in (dataset.BASE_STYLE, dataset.TARGET_STYLE):
        assert prompt_accuracy(classifier(dataset.render(digits, style)), labels) >= 0.97


def test_classifier_features_tell_the_styles_apart(classifier):
    pairs = {split: digits for split, (digits, _) in dataset.choose_pairs().items()}
    target = classifier.features(dataset.render(pairs["heldout"], dataset.TARGET_STYLE))
    same = classifier.features(dataset.render(pairs["train"], dataset.TARGET_STYLE))
    base = classifier.features(dataset.render(pairs["train"], dataset.BASE_STYLE))
    assert frechet_distance(base, target) > 3 * frechet_distance(same, target)


def test_vae_reconstructs_both_styles(pipeline):
    digits, _ = dataset.load_digits("heldout")
    for style in (dataset.BASE_STYLE, dataset.TARGET_STYLE):
        assert reconstruction_psnr(pipeline.vae, dataset.render(digits[:50], style)) >= 22


def read_pairs(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_default_dataset_is_complete_disjoint_balanced_and_deterministic(tmp_path):
    dataset.write_default_dataset(tmp_path / "a")
    dataset.write_default_dataset(tmp_path / "b")
    seen: dict[str, set[bytes]] = {}
    for split, least in (("train", 96), ("heldout", 48)):
        pairs = read_pairs(tmp_path / "a" / split)
        assert len(pairs) >= least
        assert pairs == read_pairs(tmp_path / "b" / split)
        counts = np.bincount([dataset.digit_of(pair["prompt"]) for pair in pairs], minlength=10)
        assert counts.max() - counts.min() <= 1
        seen[split] = set()
        for pair in pairs:
            path = tmp_path / "a" / split / pair["image"]
            assert path.read_bytes() == (tmp_path / "b" / split / pair["image"]).read_bytes()
            with Image.open(path) as image:
                assert (image.size, image.mode) == ((64, 64), "RGB")
            seen[split].add(path.read_bytes())
        assert len(seen[split]) == len(pairs)
    assert not seen["train"] & seen["heldout"]


def test_default_dataset_keeps_what_is_there_and_refuses_a_foreign_folder(tmp_path):
    dataset.write_default_dataset(tmp_path)
    pairs = tmp_path / "train" / "pairs.jsonl"
    stamp = pairs.stat().st_mtime_ns
    dataset.write_default_dataset(tmp_path)
    assert pairs.stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout", "train"]

    foreign = tmp_path / "foreign"
    (foreign / "train").mkdir(parents=True)
    (foreign / "train" / "mine.txt").write_text("mine")
    with pytest.raises(OSError, match="train"):
        dataset.write_default_dataset(foreign)
    assert [path.name for path in foreign.iterdir()] == ["train"]


def test_packaged_digits_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    parts = [dataset.load_digits(split) for split in ("train", "heldout")]
    images, labels = (torch.cat(both) for both in zip(*parts, strict=True))
    assert np.array_equal(images.numpy() * 16, sklearn.images)
    assert np.array_equal(labels.numpy(), sklearn.target)


def test_no_writer_is_both_in_training_and_held_out():
    train, _ = dataset.load_digits("train")
    heldout, _ = dataset.load_digits("heldout")
    assert (len(train), len(heldout)) == (1397, 400)
    with pytest.raises(ValueError, match="split"):
        dataset.load_digits("test")


@pytest.mark.parametrize(
    ("prompt", "digit"),
    [
        ("a handwritten digit three", 3),
        ("A Handwritten Digit THREE.", 3),
        ("the number 7", 7),
        ("three or four", None),
        ("someone is often alone", None),
        ("42", None),
        ("", None),
    ],
)
def test_digit_of(prompt, digit):
    assert dataset.digit_of(prompt) == digit


@pytest.mark.slow
def test_recipe_runs_resumes_and_repeats(tmp_path):
    quick = ["--vae_steps=3", "--latent_copies=1", "--teacher_steps=3", "--solver_steps=2"]
    quick += ["--distill_pairs=32", "--distill_steps=3", "--classifier_steps=3", "--batch_size=8"]
    for name in ("a", "b"):
        command = ["train", f"--output_dir={tmp_path / name}", *quick]
        assert main([*command, "--stage=vae"]) == 0
        stamp = (tmp_path / name / "vae.safetensors").stat().st_mtime_ns
        assert main(command) == 0
        assert (tmp_path / name / "vae.safetensors").stat().st_mtime_ns == stamp
    for name in ("vae", "teacher", "pairs", "student", "classifier"):
        a, b = ((tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("a", "b"))
        assert a == b, name
    command = ["evaluate", f"--model_id={tmp_path / 'a' / 'pipeline'}", "--samples_per_digit=2"]
    command += [f"--classifier={tmp_path / 'a' / 'classifier.safetensors'}"]
    command += [f"--output={tmp_path / 'm.json'}", f"--grid={tmp_path / 'grid.png'}"]
    assert main(command) == 0
    assert json.loads((tmp_path / "m.json").read_text())["samples"] == 20
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (640, 128)
