"""Ways to move and to choose noises: what they keep, what they reach, what they leave alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from candidate_samples import no_prompts, of_one_prompt, pool_seed
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.errors import UserError
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.candidates import Chooser
from oneshot_fast.jobs.assign.objective import assign_batch, matching_loss
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.targets import Preparer, Target, problem_of
from oneshot_fast.ops import skew_exp
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.search.gradient import Problem, Search
from oneshot_fast.search.movers.mover import mover_of
from oneshot_fast.search.movers.rotation import within_angle
from oneshot_fast.search.movers.sphere import Sphere

GRADIENT = {
    "rotation": AssignOptions("rotation", steps=8),
    "raw": AssignOptions("rotation", steps=8, rotation_optimizer="raw_adam"),
    "tiles": AssignOptions("rotation", steps=8, rotation_groups=2),
    "sphere": AssignOptions("sphere", steps=8),
    "white": AssignOptions("white", steps=8),
    "sphere, Adam": AssignOptions("sphere", steps=8, sphere_optimizer="adam"),
    "white, Adam": AssignOptions("white", steps=8, sphere_optimizer="adam"),
}
every = pytest.mark.parametrize("options", GRADIENT.values(), ids=GRADIENT.keys())


@pytest.fixture(scope="module")
def targets(tiny: Generator, small_data: Path) -> list[Target]:
    records, _ = read_pairs(small_data)
    preparer = Preparer(tiny, TargetImages(tiny), seed=0, resize_mode="crop", needs_images=False)
    return preparer.prepare([*enumerate(records)])[0]


def solve(tiny: Any, targets: list[Target], options: AssignOptions) -> Any:
    problem = problem_of(targets)
    return assign_batch(tiny, problem.eps, problem.prompts, problem.latents, None, options)


def angles(z: Tensor, eps: Tensor) -> Tensor:
    a, b = (x.flatten(1).double() for x in (z, eps))
    return torch.acos((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1))


def quadratic(goal: Tensor, scale: float = 1.0) -> Any:
    """A loss that any method can lower, without a generator."""
    return lambda z, problem: scale * (z - goal).square().mean((1, 2, 3))


def searched(options: AssignOptions, scale: float = 1.0) -> Any:
    eps, goal = gaussian([1, 2, 3], (4, 8, 8)), gaussian([4, 5, 6], (4, 8, 8))
    problem = Problem(eps, no_prompts(3), eps)
    search = Search(problem, options, quadratic(goal, scale))
    for step in range(options.steps + 1):
        search.advance(is_last=step == options.steps)
    return search.result(), eps


@every
def test_every_method_keeps_the_energy_and_lowers_the_loss(options: AssignOptions) -> None:
    result, eps = searched(options)
    torch.testing.assert_close(result.z.flatten(1).norm(dim=1), eps.flatten(1).norm(dim=1))
    assert (result.best_loss < 0.97 * result.losses[0]).all()


@every
def test_the_scale_of_the_loss_does_not_matter(options: AssignOptions) -> None:
    plain, _ = searched(options)
    for scale in (1e-8, 1e8):
        scaled, _ = searched(options, scale)
        torch.testing.assert_close(scaled.losses / scale, plain.losses, rtol=2e-3, atol=0)


@every
def test_the_angle_to_the_base_noise_is_bounded(options: AssignOptions) -> None:
    result, eps = searched(dataclasses.replace(options, max_angle=0.3))
    if result.q is None:
        assert (angles(result.z, eps) <= 0.3 + 1e-5).all()
        assert angles(result.z, eps).max() > 0.29  # it goes as far as it may
    else:
        cosines = torch.linalg.eigvalsh((result.q + result.q.mT) / 2).double().clamp(-1, 1)
        rms = cosines.acos().square().mean(-1).sqrt()
        assert (rms <= 0.3 + 1e-3).all() and rms.max() > 0.25


def test_white_noise_keeps_the_energy_of_every_block_of_its_spectrum() -> None:
    result, eps = searched(dataclasses.replace(GRADIENT["white"], steps=20))
    method = Sphere(white=True)
    blocks, base = method.start(result.z)["point"], method.start(eps)["point"]
    assert blocks.shape == (3, 16, 16)
    torch.testing.assert_close(blocks.norm(dim=-1), base.norm(dim=-1), rtol=1e-4, atol=0)
    free, _ = searched(dataclasses.replace(GRADIENT["sphere"], steps=20))
    assert (method.start(free.z)["point"].norm(dim=-1) / base.norm(dim=-1) - 1).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(64, 1, 1), (4, 8, 8), (3, 6, 10), (5, 3, 7)])
def test_blocks_are_an_orthonormal_view_of_the_noise(shape: tuple[int, int, int]) -> None:
    eps, method = gaussian([1, 2], shape), Sphere(white=True)
    blocks = method.start(eps)["point"]
    torch.testing.assert_close(method.noise(eps, blocks), eps, rtol=0, atol=1e-5)
    energies = blocks.square().sum((1, 2))
    torch.testing.assert_close(energies, eps.square().sum((1, 2, 3)))
    assert blocks.shape[-1] > 1


def test_shortened_rotations_turn_about_the_same_planes() -> None:
    a = torch.randn(5, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    skew = 0.3 * (a - a.mT)
    q = torch.linalg.matrix_exp(skew)
    rms = torch.linalg.matrix_norm(skew) / 8**0.5
    shorter = within_angle(q, 0.5)
    expected = torch.linalg.matrix_exp(skew * (0.5 / rms)[:, None, None])
    torch.testing.assert_close(shorter, expected, rtol=0, atol=1e-9)
    assert torch.equal(within_angle(q, 3.0), q)


@pytest.mark.parametrize("kind", ["rotation", "raw", "sphere", "sphere, Adam"])
def test_lr_auto_is_near_the_best_fixed_step(
    tiny: Generator, targets: list[Target], kind: str
) -> None:
    options = dataclasses.replace(GRADIENT[kind], steps=30)
    found = {
        lr: solve(tiny, targets, dataclasses.replace(options, lr=lr)).best_loss.mean().item()
        for lr in (0.05, 0.1, 0.2, 0.4, 0.8, "auto")
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
        return matching_loss(
            tiny, problem.eps, problem.prompts, problem.latents, None, AssignOptions()
        )


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


def test_a_search_can_begin_at_an_earlier_noise(tiny: Generator, targets: list[Target]) -> None:
    first = solve(tiny, targets, GRADIENT["sphere"])
    again = [dataclasses.replace(t, start=z) for t, z in zip(targets, first.z, strict=True)]
    search = Search(problem_of(again), GRADIENT["sphere"], quadratic(first.z))
    assert search.advance().max() < 1e-6
    assert mover_of(GRADIENT["sphere"]).noise(first.z, first.z.flatten(1)[:, None]) is not None


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


def test_a_rotation_step_of_a_radian_turns_by_a_radian() -> None:
    options = AssignOptions("rotation", steps=1, lr=0.25)
    result, _ = searched(options)
    search_q = result.q if result.best_step.any() else None
    assert search_q is not None
    theta = torch.linalg.eigvalsh((search_q + search_q.mT) / 2).clamp(-1, 1).acos()
    # all elements of the first step of Adam have the same size
    assert theta.square().mean(-1).sqrt() == pytest.approx(torch.full((3,), 0.25), rel=0.05)
    assert math.isclose(skew_exp(torch.zeros(2, 2))[0, 0].item(), 1.0)
