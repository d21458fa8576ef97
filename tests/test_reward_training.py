"""Training on rewards: the reward rises, the preserve loss holds, found images become targets."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from oneshot_fast.data import load_noise, read_manifest
from oneshot_fast.generator import OneStepGenerator
from oneshot_fast.loading import load_generator
from oneshot_fast.reward_training import (
    RewardTrainingOptions,
    _loss,
    _Pool,
    train_on_rewards,
    write_training_pairs,
)
from oneshot_fast.rewards import load_rewards
from oneshot_fast.seeds import gaussian

Call = Callable[..., Any]
PROMPTS = ["a handwritten digit three", "a handwritten digit seven"]
SHORT = {"epochs": 2, "steps": 6, "batch_size": 4, "pool_size": 16, "measured": 12}


def train(generator: OneStepGenerator, **options: Any) -> list[dict[str, Any]]:
    return train_on_rewards(
        generator,
        load_rewards(["thickness"]),
        PROMPTS,
        RewardTrainingOptions(**{**SHORT, **options}),
        judge=load_rewards(["digit"]),
    )


@pytest.fixture(scope="module")
def histories() -> dict[float, list[dict[str, Any]]]:
    return {w: train(load_generator("tiny"), preserve_weight=w) for w in (0.0, 30.0)}


def test_the_reward_rises_and_everything_is_reported(
    histories: dict[float, list[dict[str, Any]]],
) -> None:
    rows = histories[0.0]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[0]["drift"] == 0 and rows[0]["loss"] is None
    assert rows[2]["reward"] > rows[0]["reward"] + 0.5
    assert rows[2]["drift"] > rows[1]["drift"] > 0
    assert {"reward", "thickness", "judge digit", "drift", "diversity"} <= rows[0].keys()


def test_the_preserve_loss_holds_the_generator_back(
    histories: dict[float, list[dict[str, Any]]],
) -> None:
    free, held = histories[0.0][-1], histories[30.0][-1]
    assert held["drift"] < 0.7 * free["drift"] and held["reward"] < free["reward"]


def test_a_training_repeats_itself(histories: dict[float, list[dict[str, Any]]]) -> None:
    again = train(load_generator("tiny"))
    assert again[0].pop("loss") is histories[0.0][0]["loss"] is None
    for row, expected in zip(again, histories[0.0], strict=True):
        assert row == pytest.approx({name: expected[name] for name in row}, rel=1e-3, abs=1e-5)


def test_gradient_is_the_rewards() -> None:
    """Against a difference quotient along the gradient."""
    generator = load_generator("tiny")
    rewards = load_rewards(["thickness"])
    pool = _Pool(generator, PROMPTS, 4, 0)
    weight = generator.unet.conv_out.weight.requires_grad_(True)
    loss = _loss(generator, rewards, pool, [0, 1, 2], preserve_weight=0.1)
    (gradient,) = torch.autograd.grad(loss, weight)
    step = 1e-4 * gradient / gradient.norm()
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight.add_(sign * step)
            ends.append(_loss(generator, rewards, pool, [0, 1, 2], preserve_weight=0.1).item())
            weight.sub_(sign * step)
    slope = (ends[0] - ends[1]) / 2e-4
    assert slope == pytest.approx(gradient.norm().item(), rel=0.05)


def test_lora_trains_the_adapter_alone() -> None:
    pytest.importorskip("peft")
    generator = load_generator("tiny")
    before = copy.deepcopy(generator.unet.state_dict())
    rows = train(generator, lora_rank=4, lr=5e-3)
    assert rows[-1]["reward"] > rows[0]["reward"] and rows[-1]["drift"] > 0
    after = {
        name.replace(".base_layer", ""): value
        for name, value in generator.unet.state_dict().items()
        if "lora" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("method", ["best_of_n", "sphere"])
def test_found_images_become_targets_of_their_base_noises(
    tmp_path: Path, call: Call, method: str
) -> None:
    folder = tmp_path / "run"
    flags = ["--model_id", "tiny", "--reward", "digit", "--output_dir", folder]
    flags += ["--method", method, "--candidates", 3, "--steps", 2, "--batch_size", 2]
    prompts = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    assert call("optimize", *flags, *prompts, "--num_images_per_prompt", 2).code == 0
    assert write_training_pairs(folder) == 4
    manifest = folder / "training" / "manifest.jsonl"
    pairs, failures = read_manifest(manifest)
    assert not failures and [pair.prompt for pair in pairs] == [p for p in PROMPTS for _ in "ab"]
    found, _ = read_manifest(folder / "manifest.jsonl")
    for pair, best in zip(pairs, found, strict=True):
        assert pair.image_path.resolve() == best.image_path.resolve()
    rows = [json.loads(line) for line in manifest.open()]
    for pair, row in zip(pairs, rows, strict=True):
        assert torch.equal(load_noise(pair), gaussian([row["seed"]], (4, 8, 8))[0])
    trained = call(
        "sft", "--manifest_path", manifest, "--model_id", "tiny", "--output_dir", tmp_path / "sft",
        "--epochs", 1, "--preserve_pool_size", 4,
    )  # fmt: skip
    assert trained.code == 0, trained.err


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run oneshot_fast\.optimize first"):
        write_training_pairs(tmp_path)
    with pytest.raises(ValueError, match="epochs"):
        train(load_generator("tiny"), epochs=0)
    rewards = load_rewards(["python:optimize_samples.darkness"])
    with pytest.raises(ValueError, match="gradient"):
        train_on_rewards(load_generator("tiny"), rewards, PROMPTS, RewardTrainingOptions())
