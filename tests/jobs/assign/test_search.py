"""Noises chosen for targets, and then moved: what is reached, what is left alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from samples import GRADIENT, of_one_prompt, pool_seed
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.assign.objective import MatchingObjective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.search import Chooser
from oneshot_fast.jobs.assign.targets import Target, problem_of
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.search.gradient import Search
from oneshot_fast.search.options import SearchOptions
from oneshot_fast.search.problem import Assignment


def solve(tiny: Generator, targets: list[Target], options: SearchOptions) -> Assignment:
    """Moved by gradients, not chosen."""
    return Search(problem_of(targets), options, MatchingObjective(tiny, AssignOptions())).run()


@pytest.mark.parametrize("kind", ["rotation", "raw", "sphere", "sphere, Adam"])
def test_lr_auto_is_near_the_best_fixed_step(
    tiny: Generator, targets: list[Target], kind: str
) -> None:
    options = dataclasses.replace(GRADIENT[kind], steps=16)
    found = {
        lr: solve(tiny, targets[:3], dataclasses.replace(options, lr=lr)).best_loss.mean().item()
        for lr in (0.05, 0.1, 0.2, 0.4, "auto")
    }
    assert found["auto"] < 1.15 * min(found.values()), found


def test_the_sphere_is_faster_than_a_shared_rotation_and_l_bfgs_than_adam(
    tiny: Generator, targets: list[Target]
) -> None:
    rotation, adam, newton = (
        solve(tiny, targets, dataclasses.replace(GRADIENT[kind], steps=30)).best_loss.mean()
        for kind in ("rotation", "sphere, Adam", "sphere")
    )
    assert adam < 0.6 * rotation
    assert newton < 0.93 * adam


def losses_of(tiny: Generator, targets: list[Target]) -> Tensor:
    problem = problem_of(targets)
    with torch.no_grad():
        return MatchingObjective(tiny, AssignOptions())(problem.eps, problem).loss


def test_search_takes_the_best_candidate_of_each_target(
    tiny: Generator, targets: list[Target]
) -> None:
    single = losses_of(tiny, Chooser(tiny, AssignOptions("best_of_n", 1), 0).choose(targets))
    torch.testing.assert_close(single, losses_of(tiny, targets))
    few, many = (Chooser(tiny, AssignOptions("best_of_n", k), 0).choose(targets) for k in (4, 16))
    assert (losses_of(tiny, few) <= single).all() and losses_of(tiny, few).sum() < single.sum()
    assert (losses_of(tiny, many) <= losses_of(tiny, few) + 1e-6).all()
    for before, after, first in zip(targets, many, single.tolist(), strict=True):
        assert after.candidates == 16 and after.first_loss == pytest.approx(first, rel=1e-4)
        assert torch.equal(after.eps, gaussian([after.seed], before.eps.shape)[0])


def test_a_pool_is_matched_one_to_one_at_least_total_loss(
    tiny: Generator, targets: list[Target]
) -> None:
    same = of_one_prompt(targets)
    chooser = Chooser(tiny, AssignOptions("pool", 3), 0)
    found = chooser.choose(same)
    seeds = [target.seed for target in found]
    assert len(set(seeds)) == len(seeds)
    table = []
    for t in same:  # every target with every noise, one by one
        row = []
        for k in range(3 * len(same)):
            chosen = dataclasses.replace(t, eps=gaussian([pool_seed(same, k)], t.eps.shape)[0])
            row.append(losses_of(tiny, [chosen])[0])
        table.append(torch.stack(row))
    losses = torch.stack(table)
    rows, columns = linear_sum_assignment(losses.numpy())
    assert losses_of(tiny, found).sum().item() == pytest.approx(
        losses[rows, columns].sum().item(), rel=1e-4
    )
    nearest = Chooser(tiny, AssignOptions("pool", 3, pool_matching="nearest"), 0).choose(same)
    torch.testing.assert_close(losses_of(tiny, nearest), losses.amin(1), rtol=1e-4, atol=0)
    limit = losses.min().item() * 1.01
    far = Chooser(
        tiny, AssignOptions("pool", 3, pool_matching="nearest", pool_reject_below=limit), 0
    ).choose(same)
    assert losses_of(tiny, far).min() > limit


def test_different_prompts_have_pools_of_their_own(tiny: Generator, targets: list[Target]) -> None:
    found = Chooser(tiny, AssignOptions("pool", 8), 0).choose(targets)
    assert [t.index for t in found] == [t.index for t in targets]
    assert losses_of(tiny, found).mean() < losses_of(tiny, targets).mean()


def test_gradients_go_on_from_the_chosen_noise(tiny: Generator, targets: list[Target]) -> None:
    options = AssignOptions("best_of_n+sphere", 8, steps=5)
    chosen = Chooser(tiny, options, 0).choose(targets)
    assert options.choice == "best_of_n" and options.mover == "sphere"
    result = solve(tiny, chosen, options)
    torch.testing.assert_close(result.losses[0], losses_of(tiny, chosen), rtol=1e-4, atol=0)
    assert (result.best_loss < result.losses[0]).all()


def test_what_free_does_to_the_law_of_the_noise(tiny: Generator, targets: list[Target]) -> None:
    """The numbers of docs/noise.md: a Gaussian noise of 256 numbers has a norm within 4.4 %."""
    eps = problem_of(targets).eps
    norms, losses = {}, {}
    for weight in (0.0, 0.01, 0.1):
        options = AssignOptions("free", steps=40, prior_weight=weight)
        objective = MatchingObjective(tiny, options)
        z = Search(problem_of(targets), options, objective).run().z
        norms[weight] = (z.flatten(1).norm(dim=1) / eps.flatten(1).norm(dim=1)).mean().item()
        losses[weight] = losses_of(
            tiny, [dataclasses.replace(t, eps=row) for t, row in zip(targets, z, strict=True)]
        ).mean()
    assert norms[0.0] > 1.3 and 1.05 < norms[0.01] < 1.2 and abs(norms[0.1] - 1) < 0.05
    sphere = solve(tiny, targets, dataclasses.replace(GRADIENT["sphere"], steps=40))
    assert losses[0.0] < losses[0.01] < sphere.best_loss.mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"candidates": 0}, "candidates is 0"),
        ({"max_angle": -1.0}, "max_angle is -1.0"),
        ({"prior_weight": 0.1}, "prior_weight is for the method free; sphere keeps"),
        ({"method": "sphere+free"}, "only best_of_n and pool go on"),
        ({"method": "pool+nothing"}, "give one of best_of_n, pool, sphere, white"),
        ({"pool_window": 0}, "pool_window is 0"),
    ],
)
def test_senseless_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AssignOptions(**changes).check()
