"""Ways to move noises: what they keep, what they reach, what they leave alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from samples import GRADIENT, no_prompts
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.ops import skew_exp
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.search.gradient import Search
from oneshot_fast.search.movers.free import Free, FreeSgd
from oneshot_fast.search.movers.mover import Mover, State
from oneshot_fast.search.movers.registry import MOVERS, register_mover
from oneshot_fast.search.movers.rotation import within_angle
from oneshot_fast.search.movers.sphere import Sphere
from oneshot_fast.search.options import SearchOptions
from oneshot_fast.search.problem import Assignment, Evaluation, Objective, Problem

FREE = SearchOptions("free", steps=8)
every = pytest.mark.parametrize("options", GRADIENT.values(), ids=GRADIENT.keys())


def angles(z: Tensor, eps: Tensor) -> Tensor:
    a, b = (x.flatten(1).double() for x in (z, eps))
    return torch.acos((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1))


def quadratic(goal: Tensor, scale: float = 1.0) -> Objective:
    """A loss that any mover can lower, without a generator."""
    return lambda z, problem: Evaluation(scale * (z - goal).square().mean((1, 2, 3)))


def searched(options: SearchOptions, scale: float = 1.0) -> tuple[Assignment, Tensor]:
    eps, goal = gaussian([1, 2, 3], (4, 8, 8)), gaussian([4, 5, 6], (4, 8, 8))
    return Search(Problem(eps, no_prompts(3)), options, quadratic(goal, scale)).run(), eps


@every
def test_every_method_keeps_the_energy_and_lowers_the_loss(options: SearchOptions) -> None:
    result, eps = searched(options)
    torch.testing.assert_close(result.z.flatten(1).norm(dim=1), eps.flatten(1).norm(dim=1))
    assert (result.best_loss < 0.97 * result.losses[0]).all()


@every
def test_the_scale_of_the_loss_does_not_matter(options: SearchOptions) -> None:
    plain, _ = searched(options)
    for scale in (1e-8, 1e8):
        scaled, _ = searched(options, scale)
        torch.testing.assert_close(scaled.losses / scale, plain.losses, rtol=2e-3, atol=0)


@every
def test_the_angle_to_the_base_noise_is_bounded(options: SearchOptions) -> None:
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
    sphere = Sphere(white=True)
    blocks, base = sphere.start(result.z)["point"], sphere.start(eps)["point"]
    assert blocks.shape == (3, 16, 16)
    torch.testing.assert_close(blocks.norm(dim=-1), base.norm(dim=-1), rtol=1e-4, atol=0)
    free, _ = searched(dataclasses.replace(GRADIENT["sphere"], steps=20))
    assert (sphere.start(free.z)["point"].norm(dim=-1) / base.norm(dim=-1) - 1).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(64, 1, 1), (4, 8, 8), (3, 6, 10), (5, 3, 7)])
def test_blocks_are_an_orthonormal_view_of_the_noise(shape: tuple[int, int, int]) -> None:
    eps, sphere = gaussian([1, 2], shape), Sphere(white=True)
    blocks = sphere.start(eps)["point"]
    torch.testing.assert_close(sphere.noise(eps, blocks), eps, rtol=0, atol=1e-5)
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


def test_a_search_can_begin_at_an_earlier_noise() -> None:
    options = GRADIENT["sphere"]
    first, eps = searched(options)
    search = Search(Problem(eps, no_prompts(3), start=first.z), options, quadratic(first.z))
    assert search.advance().max() < 1e-6


def test_a_rotation_step_of_a_radian_turns_by_a_radian() -> None:
    options = SearchOptions("rotation", steps=1, lr=0.25)
    result, _ = searched(options)
    search_q = result.q if result.best_step.any() else None
    assert search_q is not None
    theta = torch.linalg.eigvalsh((search_q + search_q.mT) / 2).clamp(-1, 1).acos()
    # all elements of the first step of Adam have the same size
    assert theta.square().mean(-1).sqrt() == pytest.approx(torch.full((3,), 0.25), rel=0.05)
    assert math.isclose(skew_exp(torch.zeros(2, 2))[0, 0].item(), 1.0)


def norms(z: Tensor, eps: Tensor) -> Tensor:
    return z.flatten(1).norm(dim=1) / eps.flatten(1).norm(dim=1)


def test_a_free_noise_goes_where_a_sphere_cannot() -> None:
    eps, goal = gaussian([1, 2], (4, 8, 8)), 2 * gaussian([4, 5], (4, 8, 8))
    free, kept = (
        Search(Problem(eps, no_prompts(2)), SearchOptions(method), quadratic(goal)).run()
        for method in ("free", "sphere")
    )
    assert (free.best_loss < 0.1 * kept.best_loss).all() and free.q is None
    assert (norms(free.z, eps) > 1.8).all()
    plain, _ = searched(FREE)
    for scale in (1e-8, 1e8):
        scaled, _ = searched(FREE, scale)
        torch.testing.assert_close(scaled.losses / scale, plain.losses, rtol=2e-3, atol=0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_angle_of_a_free_noise_is_bounded_at_any_norm(optimizer: Any) -> None:
    options = dataclasses.replace(FREE, free_optimizer=optimizer, max_angle=0.3)
    result, eps = searched(options, 1e3)
    assert (angles(result.z, eps) <= 0.3 + 1e-5).all()
    assert (norms(result.z, eps) - 1).abs().max() > 0.01


def test_free_noise_is_torchs_sgd_on_clipped_gradients() -> None:
    draw = torch.Generator().manual_seed(0)
    eps = torch.randn(2, 4, 4, 4, generator=draw)
    # of both sides of the clip, and none at all
    gradients = [torch.randn(2, 4, 4, 4, generator=draw) * s for s in (1.0, 1e-3, 0.0, 1.0)]
    mover, state = FreeSgd(), FreeSgd().start(eps)
    for k, gradient in enumerate(gradients):
        step = torch.full((2,), k)
        state = mover.move(state, eps, gradient, step, torch.full((2,), 5.0))
    for row in range(2):
        z = torch.nn.Parameter(eps[row].clone())
        optimizer = torch.optim.SGD([z], lr=5.0, momentum=0.9, nesterov=True)
        for gradient in gradients:
            z.grad = gradient[row].clone()
            torch.nn.utils.clip_grad_norm_([z], 0.1)
            optimizer.step()
        torch.testing.assert_close(state["point"][row], z.detach(), rtol=1e-5, atol=1e-5)


def test_free_noise_is_torchs_adam() -> None:
    draw = torch.Generator().manual_seed(0)
    eps = torch.randn(1, 4, 4, 4, generator=draw)
    gradients = [torch.randn(1, 4, 4, 4, generator=draw) for _ in range(4)]
    scale = gradients[0].square().mean().sqrt()
    mover, state, z = Free(), Free().start(eps), torch.nn.Parameter(eps.clone())
    adam = torch.optim.Adam([z], lr=0.2, eps=1e-3)
    for k, gradient in enumerate(gradients):
        state = mover.move(state, eps, gradient, torch.tensor([k]), torch.tensor([0.2]))
        z.grad = gradient / scale
        adam.step()
    torch.testing.assert_close(state["point"], z.detach(), rtol=1e-4, atol=1e-5)


class SignDescent(Mover):
    """A mover of a user's: every element goes by a fixed step."""

    first_step = 0.05
    adapts = False

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        return {"point": eps.clone()}

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        return point

    def move(self, state: State, eps: Tensor, grad: Tensor, step: Tensor, rate: Tensor) -> State:
        return {"point": state["point"] - rate.view(-1, 1, 1, 1) * grad.sign()}


def test_a_mover_of_a_users_own_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oneshot_fast.search.movers.registry.MOVERS", {**MOVERS})
    with pytest.raises(UserError, match="give one of best_of_n, pool, sphere, white"):
        AssignOptions("sign").check()
    register_mover("sign", lambda options: SignDescent())
    AssignOptions("best_of_n+sign").check()
    result, eps = searched(SearchOptions("sign", steps=4))
    assert (result.losses.diff(dim=0) < 0).all() and result.q is None
    moved = (result.z - eps).abs()
    assert moved.max() <= 0.2 + 1e-6 and moved.mean() > 0.15
