"""L-BFGS against the matrices that it stands for, and on a loss whose curvature is known."""

from __future__ import annotations

import math

import pytest
import torch
from samples import no_prompts
from torch import Tensor

from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.search.gradient import Search
from oneshot_fast.search.movers.lbfgs import newton_direction
from oneshot_fast.search.options import SearchOptions
from oneshot_fast.search.problem import Assignment, Evaluation, Problem

CURVATURE = torch.tensor([1.0, 10.0, 100.0]).repeat(86)[:256].view(4, 8, 8)


def dense(gradient: Tensor, moves: Tensor, changes: Tensor, first: float) -> Tensor:
    """The BFGS updates of the inverse Hessian, written out for one search."""
    pairs = [(s, y) for s, y in zip(moves, changes, strict=True) if s @ y > 0]
    scale = pairs[-1][0].norm() / pairs[-1][1].norm() if pairs else first
    eye = torch.eye(len(gradient), dtype=gradient.dtype)
    inverse = scale * eye
    for s, y in pairs:
        left = eye - torch.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + torch.outer(s, s) / (s @ y)
    return inverse @ gradient


def test_the_direction_is_that_of_the_dense_updates() -> None:
    draw = torch.Generator().manual_seed(0)
    gradient, moves = (
        torch.randn(*shape, dtype=torch.float64, generator=draw)
        for shape in ((4, 2, 6), (4, 5, 2, 6))
    )
    changes = moves + 0.5 * torch.randn(moves.shape, dtype=torch.float64, generator=draw)
    changes[1, 2] *= -1  # negative curvature is left out
    moves[2, :3], changes[2, :3] = 0, 0  # a younger search
    moves[3], changes[3] = 0, 0  # the first step of one
    first = torch.full((4,), 0.25, dtype=torch.float64)
    found = newton_direction(gradient, moves, changes, first)
    flat = [x.flatten(-2) for x in (gradient, moves, changes)]
    expected = torch.stack([dense(*row, 0.25) for row in zip(*flat, strict=True)])
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[3], 0.25 * gradient[3])
    assert ((found * gradient).sum((1, 2)) > 0).all()


def solve(eps: Tensor, goal: Tensor, options: SearchOptions) -> Assignment:
    """Minimise squares of three different curvatures around ``goal``."""

    def loss(z: Tensor, problem: Problem) -> Evaluation:
        return Evaluation((CURVATURE * (z - goal).square()).mean((1, 2, 3)))

    return Search(Problem(eps, no_prompts(len(eps))), options, loss).run()


def test_the_curvature_of_a_quadratic_is_learnt() -> None:
    """From a start near the best noise, and with first steps far too long for it."""
    near = gaussian([1, 2], (4, 8, 8))
    eps = near + 0.1 * gaussian([3, 4], (4, 8, 8))
    norms = eps.flatten(1).norm(dim=1) / near.flatten(1).norm(dim=1)
    goal = near * norms.view(-1, 1, 1, 1)
    result = solve(eps, goal, SearchOptions(steps=20))
    assert (result.losses[1] > result.losses[0]).all()
    assert (result.best_loss < 1e-4 * result.losses[0]).all()


def test_a_bounded_search_finds_the_best_noise_of_the_boundary() -> None:
    """Against torch's own L-BFGS on the direction in which the boundary is reached."""
    angle, eps, goal = 0.8, gaussian([1], (4, 8, 8)), gaussian([3], (4, 8, 8))
    unit, way = eps / eps.norm(), (goal - eps).requires_grad_()

    def best() -> Tensor:
        away = way - (way * unit).sum() * unit
        z = math.cos(angle) * eps + math.sin(angle) * eps.norm() * away / away.norm()
        return (CURVATURE * (z - goal).square()).mean()

    def closure() -> Tensor:
        (way.grad,) = torch.autograd.grad(best(), way)
        return best().detach()

    torch.optim.LBFGS([way], max_iter=300, line_search_fn="strong_wolfe").step(closure)
    found = solve(eps, goal, SearchOptions(steps=30, max_angle=angle)).best_loss.item()
    assert found == pytest.approx(best().item(), rel=1e-3)
