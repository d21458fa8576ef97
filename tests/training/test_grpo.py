"""SubGRPO's pieces against the authors' numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import family_samples
import pytest
import torch

from oneshot_fast.generators.few_step import Transition
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.training.losses.grpo import (
    advantages,
    chosen_steps,
    clip_bounds,
    is_clipped,
    nats_of_mean,
    original_seed,
    policy_loss,
)  # fmt: skip

VECTORS = json.loads((Path(family_samples.__file__).parent / "rtdmd_vectors.json").read_text())


def test_advantages_of_the_authors_code() -> None:
    case = VECTORS["advantage_weighted"]
    rewards = {name: torch.tensor(values).double() for name, values in case["rewards"].items()}
    found = advantages(rewards, case["weights"], case["prompts"])
    expected = torch.tensor(case["advantages"]).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    equal = [k for k, prompt in enumerate(case["prompts"]) if prompt == "c"]
    assert not found[equal].any()  # theirs keeps 2e-16
    single = VECTORS["advantage_single"]
    rewards = {"one": torch.tensor(single["rewards"])}
    found = advantages(rewards, {"one": 1.0}, single["prompts"])
    once = torch.tensor(single["global_std"])  # of one reward, before the sum is made std 1
    expected = once / (once.std(correction=0) + 1e-4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", range(3, 9))
def test_equal_rewards_teach_nothing(count: int) -> None:
    prompts = [name for name in "abc" for _ in range(count)]
    flat = torch.tensor([0.21, 0.22, 0.23]).repeat_interleave(count)  # as scores are: float32
    weights = {"flat": 1.0, "other": 1.0}
    near = flat * (1 + torch.arange(3 * count) % 2 * 2**-23)  # of equal images, in other batches
    for values in (flat, near):
        assert not advantages({"flat": values}, weights, prompts).any()
    other = flat.clone()
    other[0] += 1e-3
    found = advantages({"flat": flat, "other": other}, weights, prompts)
    assert found[:count].all() and not found[count:].any()


def test_log_probabilities_of_the_authors_code() -> None:
    # theirs are means over elements, with the constants; their std is before the root of the time
    for step, time in zip(VECTORS["sde_logprob"]["steps"], (0.15, 0.25), strict=True):
        means, stds, found = (torch.tensor(step[name]) for name in ("mean", "std", "prev"))
        for k, std in enumerate((stds * math.sqrt(time)).tolist()):
            nats = Transition(means[k, None], std).log_probability(found[k, None])
            mean = nats / means[k].numel() - math.log(std) - math.log(2 * math.pi) / 2
            torch.testing.assert_close(mean[0], torch.tensor(step["log_prob"][k]))


def test_the_clipped_loss_of_the_authors_code() -> None:
    case = VECTORS["ppo_clip"]
    now = torch.tensor(case["log_prob"]).requires_grad_()
    limit = case["adv_clip"]
    advantage = torch.tensor(case["advantage"]).clamp(-limit, limit)
    loss = policy_loss(
        now, torch.tensor(case["log_prob_old"]), advantage, clip_bounds(case["clip"])
    )
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(case["loss"]), rtol=1e-6, atol=1e-6)
    expected = torch.tensor(case["grad_log_prob"])
    torch.testing.assert_close(now.grad, expected, rtol=1e-6, atol=1e-6)


def test_the_steps_of_the_authors_code() -> None:
    case = VECTORS["step_selection"]
    for epoch, expected in case["epochs"].items():
        found = chosen_steps(case["range"][1] + 1, case["count"], case["seed"], int(epoch))
        assert found == sorted(expected)
    assert chosen_steps(1, 2, 0, 0) == [0]


def test_the_clip_of_the_authors_code() -> None:
    assert 1e-5 * nats_of_mean(0.74, 65_536) == pytest.approx(0.6, rel=0.01)
    assert 1e-5 * nats_of_mean(0.74, 256) == pytest.approx(0.0024, rel=0.05)
    *steps, last = VECTORS["cps_logprob"]["steps"]
    assert last["std"] == [0, 0]
    with pytest.raises(ValueError, match="draws nothing"):
        nats_of_mean(0.0, 8)
    for step in steps:
        old, now, std = (
            torch.tensor(step[name]).double()
            for name in ("log_prob", "log_prob_of_prev_under_v_plus_0.125", "std")
        )
        elements = torch.tensor(step["mean"])[0].numel()
        nats = nats_of_mean(float(std[0]), elements)
        # each smaller and larger than an image's way, in both directions
        for one, other, sign in ((now, old, -1.0), (old, now, 1.0)):
            for clip in (old - now).abs().tolist():
                for factor in (0.5, 2.0, 20.0):
                    ratio, bound = (one - other).exp(), factor * clip
                    theirs = ratio > 1 + bound if sign > 0 else ratio < 1 - bound
                    advantage = torch.full((2,), sign)
                    bounds = clip_bounds(bound, nats)
                    found = is_clipped(nats * one, nats * other, advantage, bounds)
                    assert torch.equal(found, theirs)


def test_the_noise_of_the_authors_code() -> None:
    case = VECTORS["shared_noise"]
    seeds = [original_seed(text, case["step"], case["epoch"]) for text in case["prompts"]]
    assert seeds == case["seeds"]
    expected = torch.tensor(case["out"])
    assert torch.equal(gaussian(seeds, expected.shape[1:]), expected)
