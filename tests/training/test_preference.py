"""Objectives on preferences: the originals' numbers, exact gradients, what must change nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oneshot_fast.training.losses.d3po import d3po
from oneshot_fast.training.losses.dpo import GroupDPO, PairDPO, dpo_loss, group_gap
from oneshot_fast.training.losses.drpo import DrPO, drift_loss
from oneshot_fast.training.losses.neighbor_grpo import (
    NeighborGRPO,
    log_policy,
    neighbor_grpo_loss,
    neighbors,
    p_norm_advantages,
)
from oneshot_fast.training.losses.preference import (
    advantages,
    log_prob,
    mean_and_max,
    preferences,
)
from oneshot_fast.training.losses.pso import PSO, pso_loss
from oneshot_fast.training.losses.rebel import REBEL, rebel_loss
from oneshot_fast.training.losses.rlcm import RLCM, ppo_loss

VECTORS = json.loads((Path(__file__).parents[1] / "helpers/preference_vectors.json").read_text())
Sample = tuple[Tensor, Tensor, dict[str, Tensor]]
LOW, HIGH = math.log1p(-0.1), math.log1p(0.1)


def check(loss: Tensor, expected: float, *gradients: tuple[Tensor, Any]) -> None:
    """To 1e-6 of the largest value."""
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=2e-6)
    for tensor, known in gradients:
        want = torch.tensor(known).view_as(tensor)
        assert (tensor.grad - want).abs().max() <= 2e-6 * float(want.abs().max())


def leaf(values: Any) -> Tensor:
    return torch.tensor(values).requires_grad_()


def test_pso_is_the_originals() -> None:
    v = VECTORS["pso_online"]
    d = leaf([v["dlogp_0"], v["dlogp_1"]])
    y = torch.tensor(v["preference"])[:, 0]
    loss = pso_loss(d.T, y, v["beta"], LOW, HIGH, "original").mean()
    check(loss, v["loss"], (d, [v["grad_0"], v["grad_1"]]))

    v = VECTORS["pso_one_step_pairs"]
    d, y = leaf(v["dlogp"]), preferences(torch.tensor(v["rewards"]).view(3, 2).float())
    assert y.tolist() == [1, -1, 0]
    loss = pso_loss(d.view(3, 2), y, v["beta"], LOW, HIGH, "original").sum() / y.abs().sum()
    check(loss, v["loss"], (d, v["grad"]))

    v = VECTORS["d3po"]
    d, y = leaf([v["dlogp_0"], v["dlogp_1"]]), torch.tensor(v["preference"])[:, 0]
    published = d3po(256)
    loss = pso_loss(d.T, y, published.beta, LOW, HIGH, published.form)
    assert published.scale == 1 / 256 and published.clip == v["eps"] and published.beta == v["beta"]
    # in the original each tie adds log 2
    check((loss.sum() + math.log(2)) / 4, v["loss"], (d, [v["grad_0"], v["grad_1"]]))


def test_preferences_are_the_originals_but_for_ties() -> None:
    v = VECTORS["pso_preference"]
    ours = preferences(torch.tensor([v["a"], v["b"]]).T).tolist()
    assert ours == [-1, 0, 1] and [ours[0], ours[2]] == [v["out"][0][0], v["out"][2][0]]


def test_clipping_as_ppo_leaves_a_way_back() -> None:
    d = leaf([[-0.3, -0.05], [0.3, -0.3]])
    pso_loss(d, torch.tensor([1.0, 1.0]), 5.0, LOW, HIGH).sum().backward()
    assert d.grad is not None
    # a winner that became unlikely is pulled back; what is far in the right direction is left
    assert d.grad[0, 0] < 0 and d.grad[1].tolist() == [0, 0]


def test_sums_in_nats_are_the_originals_means() -> None:
    draw = torch.Generator().manual_seed(0)
    d, size = 0.2 * torch.randn(20, 2, generator=draw), 256
    y = torch.randint(-1, 2, (20,), generator=draw)
    means = pso_loss(d, y, 50.0, LOW, HIGH, "original")
    nats = pso_loss(size * d, y, 50.0 / size, size * LOW, size * HIGH, "original")
    torch.testing.assert_close(means, nats)
    x0, base, extra = likely(sample())
    # so wide that nothing is clipped
    on_means = PSO(beta=5.0, clip=0.9, scale=1 / 64)(x0, base, extra)[0]
    in_nats = PSO(beta=5.0 / 64, clip=1e9)(x0, base, extra)[0]
    torch.testing.assert_close(on_means, in_nats)


def test_gaussian_around_clean_latents_is_the_originals() -> None:
    v = VECTORS["gaussian_around_x0"]
    action, mean = torch.tensor(v["action"]), leaf(v["mean"])
    size, std = mean[0].numel(), v["std"]
    found = log_prob(action, mean, std) / size
    torch.testing.assert_close(found, torch.tensor(v["log_prob"]), rtol=2e-6, atol=0)
    found.sum().backward()
    assert mean.grad is not None
    torch.testing.assert_close(mean.grad, (action - mean.detach()) / std**2 / size)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="no likelihood"):
            log_prob(action, mean, bad)


def test_rebel_and_ppo_are_the_originals() -> None:
    v = VECTORS["rebel"]
    one, two = leaf(v["logp_1"]), leaf(v["logp_2"])
    old = torch.tensor([v["logp_1_old"], v["logp_2_old"]]).T
    gain = torch.tensor([v["adv_1"], v["adv_2"]]).T
    loss = rebel_loss(torch.stack((one, two), 1) - old, gain, v["eta"]).mean()
    check(loss, v["loss"], (one, v["grad_1"]), (two, v["grad_2"]))
    first = advantages(torch.tensor([0.0, 1.0]).double()).tolist()
    assert first == pytest.approx(VECTORS["per_prompt_buffer"]["first"][:2], abs=1e-9)
    # the gradient of the first update is that of the policy gradient
    d, gain = leaf([0.0, 0.0, 0.0]), torch.tensor([1.0, -2.0, 0.0])
    ppo_loss(d, gain, 0.1).sum().backward()
    assert d.grad is not None and d.grad.tolist() == (-gain).tolist()
    # and it ends where the ratio has gone far enough
    d = leaf([0.2, -0.2, 0.2])
    ppo_loss(d, torch.tensor([1.0, -1.0, -1.0]), 0.1).sum().backward()
    assert d.grad is not None and d.grad[:2].tolist() == [0, 0] and d.grad[2] > 0


def test_rebel_on_a_group_is_the_mean_over_its_pairs() -> None:
    lp, gain = torch.randn(2, 3, 6, dtype=torch.float64)
    x = 0.7 * lp - gain
    pairs = [(x[:, i] - x[:, j]).square() for i in range(6) for j in range(i)]
    torch.testing.assert_close(rebel_loss(lp, gain, 0.7), torch.stack(pairs).mean(0))


def test_neighbor_grpo_is_the_originals() -> None:
    v = VECTORS["neighbor_grpo"]
    candidates, old = (torch.tensor(v[k]) for k in ("candidates", "old_anchors"))
    anchors, gain = leaf(v["anchors"]), p_norm_advantages(torch.tensor([v["rewards"]]), v["p"])
    torch.testing.assert_close(gain[0], torch.tensor(v["advantages"]), rtol=2e-6, atol=0)
    log_ratio = log_policy(anchors, candidates) - log_policy(old, candidates)
    assert log_ratio.exp().mean().item() == pytest.approx(v["ratio_mean"], rel=2e-6)
    loss = neighbor_grpo_loss(log_ratio, gain, v["clip"]).mean()
    check(loss, v["loss"], (anchors, v["grad_anchors"]))
    found = neighbors(torch.tensor(v["base"]), torch.tensor(v["delta"]), v["sigma"])
    torch.testing.assert_close(found, torch.tensor(v["noises"]), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("preference", {}),
        ("preference_one_radius_1_weights_1", {"radii": (1.0,), "weights": (1.0, 1.0)}),
        ("reference_term", {"negative_is_self": True}),
    ],
)
def test_drpo_is_the_originals(name: str, options: dict[str, Any]) -> None:
    v = VECTORS["drpo_drift"]
    x, positive, negative = (torch.tensor(v[k]) for k in ("generated", "positive", "negative"))
    x.requires_grad_()
    if name == "reference_term":
        positive, negative = torch.tensor(v["reference"]), x
    loss, scale = drift_loss(x, positive, negative, **options)
    assert scale.item() == pytest.approx(v[name]["scale"], rel=2e-6)
    check(loss.sum(), v[name]["loss"][0], (x, v[name]["grad"]))


def test_drpo_has_no_force_where_all_are_one() -> None:
    x = torch.zeros(1, 4, 3).requires_grad_()
    drift_loss(x, x, x)[0].sum().backward()
    assert x.grad is not None and x.grad.abs().max() == 0


def test_dpo_is_the_originals() -> None:
    v = VECTORS["diffusion_dpo"]
    made, target, base = (
        leaf(v["model_pred"]),
        *(torch.tensor(v[k]) for k in ("target", "ref_pred")),
    )

    def pairs(x: Tensor) -> Tensor:  # winners lie first
        return (x - target).square().flatten(1).mean(1).view(2, -1).T

    loss, logit = dpo_loss(pairs(made), pairs(base), v["beta"])
    assert logit.tolist() == pytest.approx(v["logit"], rel=2e-6)
    check(loss.mean(), v["loss"], (made, v["grad_model_pred"]))

    v = VECTORS["dpo_one_step"]
    x, base = leaf(v["policy_x0"]), torch.tensor(v["ref_x0"])
    better, worse = (x.detach()[v[k]] for k in ("chosen", "rejected"))
    gaps = [group_gap(y[None], better[None], worse[None]) for y in (x, base)]
    found = [gap.item() for gap in gaps]
    assert found == pytest.approx([v["policy_gap"], v["ref_gap"]], rel=2e-6)
    loss = -torch.nn.functional.logsigmoid(v["beta"] * (gaps[0] - gaps[1])).sum()
    check(loss, v["loss"], (x, v["grad_policy_x0"]))


def test_offline_pso_is_the_originals() -> None:
    v = VECTORS["pso_offline"]
    noise, base = torch.tensor(v["noise"]), torch.tensor(v["eps_ref"])
    for case in v["cases"]:
        made = leaf(v["eps_model"])

        def pairs(x: Tensor) -> Tensor:  # the x0 error over sigma^2 is the eps error
            return (x - noise).square().flatten(1).mean(1).view(2, -1).T

        loss, logit = dpo_loss(pairs(made), pairs(base), 2 * case["beta"], case["neg_factor"])
        expected = [case["beta"] * x for x in case["logits"]]
        assert logit.tolist() == pytest.approx(expected, rel=1e-5)
        check(loss.mean(), case["loss"], (made, case["grad_eps"]))


def test_one_noise_for_both_is_evaluated_once() -> None:
    (x0, base), targets = torch.randn(2, 5, 1, 4, 2, 2), torch.randn(5, 2, 4, 2, 2)
    extra = {"targets": targets, "weight": torch.ones(5)}
    twice = PairDPO()(x0.expand_as(targets), base.expand_as(targets), extra)
    torch.testing.assert_close(PairDPO()(x0, base, extra), twice)


def test_a_pair_of_weight_0_teaches_nothing() -> None:
    latents, base, targets = torch.randn(3, 2, 2, 4, 2, 2)
    extra = {"targets": targets, "weight": torch.tensor([0.0, 1.0])}
    loss, _ = PairDPO(winner_weight=2.0)(latents, base, extra)
    assert loss[0] == 0 < loss[1]


def sample(
    groups: int = 3, k: int = 6, shape: tuple[int, ...] = (1, 2, 2), dtype: Any = torch.float32
) -> Sample:
    """Clean latents of policy and base, and everything that an objective can ask for."""
    draw = torch.Generator().manual_seed(1)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw, dtype=torch.float64).to(dtype)

    x0, base = random(groups, k, *shape), random(groups, k, *shape)
    extra = {"rewards": random(groups, k), "ties": torch.zeros(groups)}
    extra |= {"candidates": random(groups, k, *shape), "old": random(groups, k, *shape)}
    extra |= {"preference": random(groups, k // 2).sign()}
    return x0, base, extra | {"pairs": torch.full((groups,), k / 2)}


def likely(of: Sample) -> Sample:
    """The same, with log-probabilities of two steps in place of the latents."""
    x0, base, extra = of
    extra = {name: value for name, value in extra.items() if name != "old"}
    return x0.flatten(2)[..., :2], base.flatten(2)[..., :2], extra


OBJECTIVES: dict[str, tuple[Any, Callable[[Sample], Sample]]] = {
    "pso": (PSO(), likely),
    "neighbor_grpo": (NeighborGRPO(), lambda of: of),
    "drpo": (DrPO(lambda x: x.flatten(1), positives=3, reference_weight=0.2), lambda of: of),
    "dpo": (GroupDPO(), lambda of: of),
    "rlcm": (RLCM(), likely),
    "rebel": (REBEL(), likely),
}


def test_gradients_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # of log-probabilities
    x, base, extra = sample(dtype=torch.float64)
    d, y = torch.randn(5, 2, dtype=torch.float64), torch.tensor([1, -1, 0, 1, -1])
    others, gain, goal = extra["candidates"], extra["rewards"], d.cos()
    losses: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda d: pso_loss(d, y, 2.0, -1.0, 1.0), d),
        (lambda d: pso_loss(d, y, 2.0, -1.0, 1.0, "original"), d),
        (lambda d: ppo_loss(d, goal, 0.2), d),
        (lambda d: rebel_loss(d, goal, 0.7), d),
        (lambda d: dpo_loss(d.exp(), goal, 2.0, 0.3)[0], d),
        (lambda x: log_prob(others, x, 0.3), x),
        (lambda x: group_gap(x, others[:, :2], others[:, 2:]), x),
        (lambda x: neighbor_grpo_loss(log_policy(x, others, 2.0) + 1.5, gain), x),
        (lambda x: PSO()(x, *likely((x, base, extra))[1:])[0], x.flatten(2)[..., :2]),
        (lambda x: NeighborGRPO()(x, base, extra)[0], x),
    ]
    for loss, at in losses:
        assert torch.autograd.gradcheck(loss, at.clone().requires_grad_())


def test_drpo_moves_along_its_force() -> None:
    """The goal does not move: the loss is mean |F|^2, and its gradient -2 F / (u n)."""
    x, _, extra = sample(dtype=torch.float64)
    x, y = x.flatten(2).requires_grad_(), extra["candidates"].flatten(2)
    loss, scale = drift_loss(x, y[:, :3], y[:, 3:])
    loss.sum().backward()
    assert x.grad is not None
    force = -x.grad * (scale / x.shape[2] ** 0.5)[:, None, None] * x[0].numel() / 2
    torch.testing.assert_close(force.square().mean((1, 2)), loss.detach())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_constant_added_to_the_rewards_changes_nothing(name: str) -> None:
    objective, part = OBJECTIVES[name]
    x0, base, extra = part(sample())
    first = objective(x0, base, extra)[0]
    moved = objective(x0, base, extra | {"rewards": extra["rewards"] + 3.0})[0]
    torch.testing.assert_close(first, moved, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        preferences(extra["rewards"].view(3, 3, 2)),
        preferences(extra["rewards"].view(3, 3, 2) + 3.0),
    )


def test_swapped_pairs_with_swapped_labels_are_the_same() -> None:
    x0, base, extra = likely(sample())
    first = PSO()(x0, base, extra)[0]
    order = torch.tensor([1, 0, 3, 2, 5, 4])
    swapped = extra | {"preference": -extra["preference"]}
    torch.testing.assert_close(first, PSO()(x0[:, order], base[:, order], swapped)[0])


def test_where_the_policy_is_the_base() -> None:
    x0, _, extra = sample()
    lp, _, part = likely((x0, x0, extra))
    loss, told = PSO()(lp, lp, part)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
    assert told["kl"].abs().max() == 0
    loss = GroupDPO()(x0, x0, extra)[0]
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
    pairs = torch.rand(5, 2)
    torch.testing.assert_close(dpo_loss(pairs, pairs, 5000.0)[0], torch.full((5,), math.log(2)))
    loss, told = RLCM()(lp, lp, part)
    assert told["ratio"].tolist() == [1, 1, 1] and told["kl"].abs().max() == 0
    assert loss.abs().max() < 1e-6  # advantages add up to zero
    target = 2 * advantages(extra["rewards"]).var(1)  # the mean squared difference of advantages
    torch.testing.assert_close(REBEL()(lp, lp, part)[0], target)
    loss, told = NeighborGRPO()(x0, x0, extra | {"old": x0})
    torch.testing.assert_close(told["ratio"], torch.ones(3))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ties_alone_teach_nothing(name: str) -> None:
    objective, part = OBJECTIVES[name]
    x0, _, extra = part(sample())
    extra = extra | {"rewards": torch.ones(3, 6), "ties": torch.ones(3), "old": x0.detach()}
    extra |= {"preference": torch.zeros(3, 3), "pairs": torch.zeros(3)}
    x0 = x0.clone().requires_grad_()
    loss = objective(x0, x0.detach(), extra)[0]
    if name == "drpo":  # only the base's term is left
        without = DrPO(objective.features, 3, reference_weight=0.0)(x0, x0.detach(), extra)[0]
        assert without.tolist() == [0, 0, 0]
        return
    assert loss.abs().max() < 1e-6
    loss.sum().backward()
    assert x0.grad is not None and x0.grad.abs().max() < 1e-5


def test_rewards_that_are_no_numbers_are_left_out() -> None:
    bad = torch.tensor([[1.0, math.nan], [math.inf, 2.0], [1.0, 2.0], [3.0, 3.0]])
    assert preferences(bad).tolist() == [0, 0, -1, 0]
    for found in (advantages, p_norm_advantages):
        alone = found(torch.tensor([[1.0, 2.0, 4.0]]))
        among = found(torch.tensor([[1.0, math.nan, 2.0, 4.0, math.inf]]))
        torch.testing.assert_close(among[:, [0, 2, 3]], alone)
        assert among[0, [1, 4]].tolist() == [0, 0]
    x0, base, extra = sample()
    rewards = extra["rewards"].clone()
    rewards[:, 0], rewards[1, 3] = math.nan, math.inf
    for name in ("neighbor_grpo", "drpo", "dpo"):
        objective, part = OBJECTIVES[name]
        assert torch.isfinite(objective(*part((x0, base, extra | {"rewards": rewards})))[0]).all()
    kept = [1, 2, 4, 5]
    alone = {"rewards": rewards[1:2, kept], "ties": torch.zeros(1)}
    among = GroupDPO()(x0, base, extra | {"rewards": rewards})[0]
    torch.testing.assert_close(among[1:2], GroupDPO()(x0[1:2, kept], base[1:2, kept], alone)[0])
    nothing = extra | {"rewards": torch.full((3, 6), math.nan), "ties": torch.ones(3)}
    assert GroupDPO()(x0, base, nothing)[0].tolist() == [0, 0, 0]
    mean, largest = mean_and_max(rewards)
    known = rewards[1, kept]
    torch.testing.assert_close(mean[1], known.mean())
    assert largest[1] == known.max()
