"""The registry of rewards, their weighted sum, those that need no download, and preprocessing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.embedded.digits import (
    BASE_STYLE,
    TARGET_STYLE,
    Style,
    load_digits,
    prompt_of,
    render,
)
from oneshot_fast.errors import UserError
from oneshot_fast.rewards import REWARDS, Reward, WeightedRewards, load_rewards, parse_reward


def digits(level: float = 0.36) -> tuple[Tensor, list[str]]:
    """Twenty drawn digits, [20, 3, 64, 64], and their prompts."""
    grey, labels = load_digits("heldout")
    style = Style(torch.tensor(level), BASE_STYLE.ink, BASE_STYLE.paper)
    return render(grey[:20], style), [prompt_of(k) for k in labels[:20].tolist()]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("clip", ("clip", 1.0)),
        ("clip:0.01", ("clip", 0.01)),
        ("hpsv2.1:5", ("hpsv2.1", 5.0)),
        ("digit:-1e-2", ("digit", -0.01)),
        ("python:a.b.c", ("python:a.b.c", 1.0)),
        ("python:a.b.c:2", ("python:a.b.c", 2.0)),
    ],
)
def test_a_reward_is_a_name_and_a_weight(spec: str, expected: tuple[str, float]) -> None:
    assert parse_reward(spec) == expected


@pytest.mark.parametrize("spec", ["", "clop", "clip:x", "clip:nan", "clip:inf", "python:", ":1"])
def test_a_senseless_reward_is_one_line(spec: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_reward(spec)
    assert "\n" not in str(caught.value)


def test_no_reward_and_one_twice_are_refused() -> None:
    with pytest.raises(UserError, match="no reward is named"):
        load_rewards([])
    with pytest.raises(UserError, match="digit is named twice"):
        load_rewards(["digit", "thickness", "digit:2"])


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("clip", "CLIP-ViT-L-14"),
        ("aesthetic", "Aesthetic"),
        ("hybrid", "Aesthetic"),
        ("pickscore", "PickScore_v1"),
        ("imagereward", "ImageReward"),
        ("hpsv2", "HPSv2"),
    ],
)
def test_a_missing_model_tells_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command = f"python -m oneshot_fast.download --only {model}"
    with pytest.raises(UserError) as caught:
        load_rewards([name])
    assert str(caught.value).endswith(command)
    with pytest.raises(UserError) as caught:
        load_rewards([name], models_dir=Path("elsewhere"))
    assert str(caught.value).endswith(f"{command} --models_dir elsewhere")


class Brightness(Reward):
    """Mean of the images plus the prompt's length; counts what it encodes."""

    name = "brightness"

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[str] = []

    def encode(self, prompts: Sequence[str]) -> Tensor:
        self.encoded += prompts
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        return images.mean((1, 2, 3)) + features


class Peak(Reward):
    """Greatest value, as a score without a gradient."""

    name, differentiable = "peak", False

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        assert features.shape == (len(images), 0) and not images.requires_grad
        return torch.as_tensor(images.numpy().max((1, 2, 3)))


def test_the_sum_is_weighted_and_prompts_are_encoded_once() -> None:
    brightness = Brightness()
    rewards = WeightedRewards([(brightness, 2.0), (Peak(), -0.5)])
    images, prompts = torch.rand(4, 3, 8, 8), ["a", "bcd", "a", "ef"]
    expected = 2 * (images.mean((1, 2, 3)) + torch.tensor([1.0, 3.0, 1.0, 2.0]))
    expected -= 0.5 * images.amax((1, 2, 3))
    torch.testing.assert_close(rewards(images, prompts), expected)
    torch.testing.assert_close(rewards(images[[1, 0]], ["bcd", "ghij"])[0], expected[1])
    assert brightness.encoded == ["a", "bcd", "ef", "ghij"]
    assert list(rewards.scores(images, prompts)) == ["brightness", "peak"]
    with pytest.raises(ValueError, match="expected 4 prompts"):
        rewards(images, ["a"])


def test_a_score_without_gradient_leaves_the_others_theirs() -> None:
    rewards = WeightedRewards([(Brightness(), 2.0), (Peak(), 1.0)])
    assert not rewards.differentiable and WeightedRewards([(Brightness(), 1.0)]).differentiable
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    rewards(images, ["a", "b"]).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 2 / 48))


def test_checkpointing_changes_neither_scores_nor_gradients() -> None:
    drawn, prompts = digits()
    results = []
    for checkpointing in (False, True):
        images = drawn.clone().requires_grad_()
        rewards = load_rewards(["digit", "thickness:0.1"], checkpointing=checkpointing)
        total = rewards(images, prompts)
        total.sum().backward()
        results.append((total.detach(), images.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_digit_is_the_classifiers_log_probability() -> None:
    images, prompts = digits()
    scores = load_rewards(["digit"])(images, prompts)
    chances = load_classifier()(images).double().softmax(1)
    labels = load_digits("heldout")[1][:20]
    expected = chances[torch.arange(20), labels].log()
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)
    wrong = load_rewards(["digit"])(images, [prompt_of((k + 1) % 10) for k in labels.tolist()])
    assert (scores > wrong).all() and (scores <= 0).all()
    with pytest.raises(UserError, match="names no digit"):
        load_rewards(["digit"])(images[:1], ["a boat"])


@pytest.mark.parametrize("width", [2, 5, 9])
def test_thickness_of_a_bar_is_area_over_half_its_outline(width: int) -> None:
    images = torch.ones(1, 3, 64, 64)
    images[..., 8:56, 20 : 20 + width] = torch.tensor([0.2, 0.1, 0.4]).view(3, 1, 1)
    expected = width * 48 / (width + 48)
    assert load_rewards(["thickness"])(images, ["bar"]).item() == pytest.approx(expected, rel=0.02)


def test_thickness_sees_strokes_and_not_colours() -> None:
    thickness = load_rewards(["thickness"])
    grey = load_digits("heldout")[0][:20]
    prompts = [""] * 20
    means = [thickness(digits(level)[0], prompts).mean() for level in (0.5, 0.36, 0.25, 0.15)]
    assert all(thin + 0.5 < thick for thin, thick in pairwise(means))
    level = torch.tensor(0.36)
    base = thickness(render(grey, BASE_STYLE), prompts)
    for ink, paper in ((TARGET_STYLE.ink, TARGET_STYLE.paper), (BASE_STYLE.paper, BASE_STYLE.ink)):
        other = thickness(render(grey, Style(level, ink, paper)), prompts)
        torch.testing.assert_close(other, base, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["digit", "thickness"])
def test_the_embedded_generator_gains_by_the_rewards_gradient(tiny: Any, name: str) -> None:
    prompts = [prompt_of(k) for k in range(4)]
    encoded, rewards = tiny.encode_prompts(prompts), load_rewards([name])

    def score(eps: Tensor) -> Tensor:
        raw = tiny.decode_raw(tiny.latents(eps, encoded))
        return rewards((raw / 2 + 0.5).clamp(0, 1), prompts)

    eps = torch.randn(4, *tiny.noise_shape(64, 64), requires_grad=True)
    before = score(eps)
    (gradient,) = torch.autograd.grad(before.sum(), eps)
    step = 0.5 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert (score(eps + step) > before).all()


def test_the_documentation_names_all_and_its_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert all(any(f"`{name}" in row for row in rows) for name in REWARDS)
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    exec(compile("\n".join(blocks), "docs/rewards.md", "exec"), {})
    assert "contrast" in capsys.readouterr().out


MODULE = """
import torch
from oneshot_fast.rewards import Reward

def bright(images, prompts):
    assert isinstance(prompts, list)
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])

def stubborn(images, prompts):
    return [image.detach().numpy().max() for image in images]

def searched(images, prompts):
    return [float(image.numpy().max()) for image in images]

searched.differentiable = False

def one(images, prompts):
    return images.mean()

number = 3

class Sharp(Reward):
    def encode(self, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    def forward(self, images, features):
        return images.diff(dim=-1).abs().mean((1, 2, 3)) + features
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the working directory; its name."""
    (tmp_path / "rewards_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/"])
    monkeypatch.delitem(__import__("sys").modules, "rewards_of_mine", raising=False)
    return "python:rewards_of_mine"


def test_a_function_of_the_users_own(module: str) -> None:
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    rewards = load_rewards([f"{module}.bright:3", f"{module}.searched"])
    assert rewards.weights == {f"{module}.bright": 3, f"{module}.searched": 1}
    assert not rewards.differentiable
    expected = 3 * (images.mean((1, 2, 3)) + torch.tensor([1, 2])) + images.amax((1, 2, 3))
    total = rewards(images, ["a", "bc"])
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(rewards(images[[1]], ["bc"]), expected[[1]])
    total.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 3 / 192))


def test_a_class_of_the_users_own(module: str) -> None:
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    rewards = load_rewards([f"{module}.Sharp:2", f"{module}.bright"])
    own = rewards.by_name[f"{module}.Sharp"]
    assert isinstance(own, Reward) and rewards.differentiable
    edges = images.diff(dim=-1).abs().mean((1, 2, 3))
    expected = 2 * (edges + torch.tensor([1, 2])) + images.mean((1, 2, 3)) + torch.tensor([1, 2])
    torch.testing.assert_close(rewards(images, ["a", "bc"]), expected)


def test_a_function_that_does_not_fit_is_one_line(module: str) -> None:
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(UserError, match="expected one score for each of 2 images"):
        load_rewards([f"{module}.one"])(images, ["a", "b"])
    stubborn = load_rewards([f"{module}.stubborn"])
    torch.testing.assert_close(stubborn(images, ["a", "b"]), images.amax((1, 2, 3)))
    with pytest.raises(UserError, match="returned no gradient"):
        stubborn(images.clone().requires_grad_(), ["a", "b"])
    for name in (f"{module}.absent", f"{module}.number", "python:absent.f", "python:bright"):
        with pytest.raises(UserError, match="reward python:"):
            load_rewards([name])
