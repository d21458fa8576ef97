"""Rewards on small checkpoints of the published layouts, against their formulas in fp64."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_folders import write_models
from reward_samples import SMALL_BLIP, SMALL_CLIP, head_score, hps_score, imagereward_score
from torch import Tensor

from oneshot_fast.rewards import WeightedRewards, load_rewards
from oneshot_fast.rewards.aesthetic import HEAD_FILE
from oneshot_fast.runtime.tensor_files import read_pickle

PROMPTS = ["a red boat", "the water on a boat on the red water", "a red boat"]
MODEL_OF = {
    "clip": "CLIP-ViT-L-14",
    "aesthetic": "Aesthetic",
    "hybrid": "Aesthetic",
    "pickscore": "PickScore_v1",
    "imagereward": "ImageReward",
    "hpsv2": "HPSv2",
    "hpsv2.0": "HPSv2",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a small one of every kind."""
    return write_models(tmp_path_factory.mktemp("models"))


def load(models: Path, *specs: str, **options: Any) -> WeightedRewards:
    return load_rewards(specs, models_dir=models, **options)


def some_images(size: int = 28) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(3))


def clip_tokens(models: Path, name: str) -> Tensor:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(models / name)
    options = {"padding": "max_length", "max_length": 16, "truncation": True}
    return tokenizer(PROMPTS, return_tensors="pt", **options).input_ids


@functools.cache
def clip_outputs(folder: Path) -> Any:
    """What transformers' own CLIPModel says of the images and prompts, in fp64."""
    from transformers import CLIPModel
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    model = CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels = ((some_images() - mean) / std).double()
    with torch.no_grad():
        return model(input_ids=clip_tokens(folder.parent, folder.name), pixel_values=pixels)


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_clip_and_pickscore_are_clips_own_logits(models: Path, name: str) -> None:
    scores = load(models, name).scores(some_images(), PROMPTS)[name]
    expected = clip_outputs(models / MODEL_OF[name]).logits_per_image.diagonal()
    assert expected.std() > 0.1
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)


def test_aesthetic_and_hybrid_score_the_unit_embedding(models: Path) -> None:
    tensors = {k: v.double() for k, v in read_pickle(models / "Aesthetic" / HEAD_FILE).items()}
    outputs = clip_outputs(models / "CLIP-ViT-L-14")
    rating = head_score(tensors, "", outputs.image_embeds)
    cosine = (outputs.image_embeds * outputs.text_embeds).sum(1)
    scores = load(models, "aesthetic", "hybrid").scores(some_images(), PROMPTS)
    torch.testing.assert_close(scores["aesthetic"].double(), rating, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores["hybrid"].double(), rating + cosine / 4, rtol=1e-4, atol=1e-5)


def test_prompts_that_are_cut_are_said_once(
    models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rewards = load(models, "clip", "hybrid", "aesthetic", "imagereward", "pickscore", "hpsv2")
    short, long = "a red boat", "the water on a boat " * 4  # of 22 tokens, CLIP's here reads 16
    longest = long + long
    for prompts in ([short, long, longest, long], [long, short], [short]):
        rewards.warn_of_cut(iter(prompts))
    said = sorted(capfd.readouterr().err.splitlines())
    both = [f"2 prompts are longer than the 16 tokens that reward {name} reads" for name in
            ("clip", "hpsv2", "hybrid", "pickscore")]  # fmt: skip
    one = "1 prompts are longer than the 35 tokens that reward imagereward reads"
    assert len(said) == 5 and all(f"warning: {x}; cut off, the f" in y for x, y in
                                  zip([one, *both], said, strict=True))  # fmt: skip
    assert f'"{longest:.60}..."' in said[0] and f'"{long:.60}..."' in said[1]


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.0"])
def test_hpsv2_is_the_cosine_of_open_clips_towers(models: Path, name: str) -> None:
    file = "HPS_v2_compressed.pt" if name == "hpsv2.0" else "HPS_v2.1_compressed.pt"
    expected = hps_score(
        read_pickle(models / "HPSv2" / file),
        SMALL_CLIP,
        some_images(),
        clip_tokens(models, "HPSv2"),
    )
    scores = load(models, name).scores(some_images(), PROMPTS)[name]
    assert expected.std() > 0.02
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-6)


def test_imagereward_is_blips_score(models: Path) -> None:
    words = (models / "ImageReward" / "vocab.txt").read_text().split()
    tokens = torch.zeros(3, 35, dtype=torch.int64)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        ids = [words.index(word) for word in ("[CLS]", *prompt.split(), "[SEP]")]
        row[: len(ids)] = torch.tensor(ids)
    expected = imagereward_score(
        read_pickle(models / "ImageReward" / "ImageReward.pt"),
        SMALL_BLIP,
        some_images(32),
        tokens,
        tokens > 0,
    )
    scores = load(models, "imagereward").scores(some_images(32), PROMPTS)["imagereward"]
    assert expected.std() > 0.02
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODEL_OF)
def test_scores_have_the_gradient_of_the_images(models: Path, name: str) -> None:
    reward = load(models, name)
    images = some_images(40).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert reward.differentiable and all(p.grad is None for p in reward.parameters())
    direction = images.grad / images.grad.norm()
    step = 0.1
    up, down = (reward(images.detach() + sign * step * direction, PROMPTS) for sign in (1, -1))
    slope = (up - down).double().sum() / (2 * step)
    torch.testing.assert_close(slope, images.grad.norm().double(), rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("name", MODEL_OF)
def test_bfloat16_scores_are_near_and_float32(models: Path, name: str) -> None:
    exact = load(models, name)(some_images(), PROMPTS)
    half = load(models, name, dtype=torch.bfloat16)(some_images(), PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rewards_of_one_model_share_it_and_its_embedding(models: Path, checkpointing: bool) -> None:
    names = ("clip", "aesthetic", "hybrid", "pickscore")
    rewards = load(models, *names, checkpointing=checkpointing)
    encoders = {reward.encoder for reward in rewards.rewards}
    assert len(encoders) == 2
    seen: list[Tensor] = []
    for encoder in encoders:
        encoder.model.vision_model.register_forward_hook(lambda _, x, y: seen.append(x[0]))
    images = some_images().requires_grad_()
    total = rewards(images, PROMPTS)
    assert len(seen) == 2
    (gradient,) = torch.autograd.grad(total.sum(), images)
    alone = [load(models, name)(images, PROMPTS) for name in names]
    (expected,) = torch.autograd.grad(torch.stack(alone).sum(), images)
    torch.testing.assert_close(total, torch.stack(alone).sum(0))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        other = rewards(images.flip(0), PROMPTS)
    assert len(seen) == (4 if not checkpointing else 6) and not torch.equal(other, total)
