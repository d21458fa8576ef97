"""SubGRPO's pieces against the authors' numbers."""

from __future__ import annotations

import json
from pathlib import Path

import family_samples
import torch

from oneshot_fast.training.losses.grpo import advantages, chosen_steps, policy_loss

VECTORS = json.loads((Path(family_samples.__file__).parent / "rtdmd_vectors.json").read_text())


def test_advantages_of_the_authors_code() -> None:
    case = VECTORS["advantage_weighted"]
    rewards = {name: torch.tensor(values).double() for name, values in case["rewards"].items()}
    found = advantages(rewards, case["weights"], case["prompts"])
    expected = torch.tensor(case["advantages"]).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    equal = [k for k, prompt in enumerate(case["prompts"]) if prompt == "c"]
    assert not found[equal].any()  # theirs keeps 2e-16
    same = {name: torch.ones(8) for name in rewards}
    assert not advantages(same, case["weights"], case["prompts"]).any()


def test_the_clipped_loss_of_the_authors_code() -> None:
    case = VECTORS["ppo_clip"]
    now = torch.tensor(case["log_prob"]).requires_grad_()
    limit = case["adv_clip"]
    advantage = torch.tensor(case["advantage"]).clamp(-limit, limit)
    loss = policy_loss(now, torch.tensor(case["log_prob_old"]), advantage, case["clip"])
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
