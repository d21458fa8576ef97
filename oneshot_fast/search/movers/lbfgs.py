"""Limited-memory BFGS with a memory of its own for each search, and noises moved by it."""

import torch
from torch import Tensor

from oneshot_fast.search.movers.adam import TINY, per_row, scaled
from oneshot_fast.search.movers.mover import State
from oneshot_fast.search.movers.sphere import Sphere, tangent

_PAIRS = 20  # steps and changes of the gradient that are remembered
_NEAR = 1e-3  # radians from the largest angle that count as at it
_CURVED = 1e-6  # cosine between the two of a pair from which it counts as curvature


class QuasiNewtonSphere(Sphere):
    """``Sphere`` by L-BFGS (Liu and Nocedal 1989), with vectors carried along by projection.

    After Huang, Gallivan and Absil 2015 (SIAM J. Optim. 25) for manifolds, without their line
    search: no evaluation is spent on it. A step is at most ``rate`` radians long, and where the
    loss rises it goes on from there, with the curvature that this step has shown. A noise at the
    largest angle that would go further moves along the boundary.
    """

    first_step = 0.5

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        point = super().start(eps, at)["point"]
        B, K, n = point.shape
        pairs = point.new_zeros(B, _PAIRS, K, n)
        return {
            "point": point,
            "scale": point.new_ones(B),
            "last_point": point.clone(),
            "last_gradient": torch.zeros_like(point),
            "moves": pairs,
            "changes": pairs.clone(),
        }

    def move(self, state: State, eps: Tensor, grad: Tensor, step: Tensor, rate: Tensor) -> State:
        y = state["point"]
        radius = y.norm(dim=-1, keepdim=True)
        unit = y / radius
        grad, scale = scaled(tangent(grad, unit), state, step)
        moves = _remembered(state["moves"], y - state["last_point"], unit)  # the first: 0, no pair
        changes = _remembered(state["changes"], grad - state["last_gradient"], unit)
        longest = rate * radius.square().sum((1, 2)).sqrt()  # length of a step, [B]
        barred = self._barred(eps, unit, grad)
        free = tangent(grad, barred)
        along, bends = (tangent(x, barred[:, None]) for x in (moves, changes))
        way = -tangent(newton_direction(free, along, bends, longest / _lengths(free)), unit)
        shorter = per_row((longest / _lengths(way)).clamp_max(1), way)
        angle = way.norm(dim=-1, keepdim=True) * shorter / radius
        return {
            "point": self.turned(eps, unit, way, angle, radius),
            "scale": scale,
            "last_point": y,
            "last_gradient": grad,
            "moves": moves,
            "changes": changes,
        }

    def _barred(self, eps: Tensor, unit: Tensor, gradient: Tensor) -> Tensor:
        """Unit vectors away from the base noise where descent would leave the bound, else 0."""
        if self.max_angle is None:
            return torch.zeros_like(unit)
        base = self.blocks(eps)
        base = base / base.norm(dim=-1, keepdim=True)
        away = -tangent(base, unit)
        sine = away.norm(dim=-1, keepdim=True)
        away = away / sine.clamp_min(TINY)
        at_bound = torch.atan2(sine, (unit * base).sum(-1, keepdim=True)) > self.max_angle - _NEAR
        leaves = (gradient * away).sum(-1, keepdim=True) < 0
        return away.where(at_bound & leaves, torch.zeros_like(away))


def _remembered(kept: Tensor, new: Tensor, unit: Tensor) -> Tensor:
    """``kept`` [B, pairs, K, n], ``new`` [B, K, n] for the oldest one, all tangent at ``unit``."""
    return tangent(torch.cat([kept[:, 1:], new[:, None]], 1), unit[:, None])


def _lengths(x: Tensor) -> Tensor:
    """Norms [B], above 0, of rows [B, K, n]."""
    return x.flatten(1).norm(dim=1).clamp_min(TINY)


def newton_direction(gradient: Tensor, moves: Tensor, changes: Tensor, first: Tensor) -> Tensor:
    """Approximate inverse Hessian times ``gradient`` [B, K, n] by the two-loop recursion.

    Liu and Nocedal 1989 (Math. Programming 45). ``moves`` [B, pairs, K, n], the newest last and 0
    where there was none, changed the gradient by ``changes``. It starts from the geometric mean of
    the two step sizes of Barzilai and Borwein, as Dai, Al-Baali and Yang 2015 take for gradient
    descent; where no pair shows positive curvature, the gradient is multiplied by ``first`` [B].
    """
    s, y, q = moves.flatten(2), changes.flatten(2), gradient.flatten(1)
    curvature, lengths, changed = (s * y).sum(-1), s.norm(dim=-1), y.norm(dim=-1)  # [B, pairs]
    counts = curvature > _CURVED * lengths * changed
    inverse = torch.where(counts, 1 / curvature.where(counts, torch.ones_like(curvature)), 0)
    for k in range(s.shape[1]):
        newest = lengths[:, k] / changed[:, k].clamp_min(TINY)
        first = torch.where(counts[:, k], newest, first)
    back = []
    for k in reversed(range(s.shape[1])):
        part = inverse[:, k, None] * (s[:, k] * q).sum(1, keepdim=True)
        q = q - part * y[:, k]
        back.append(part)
    q = first[:, None] * q
    for k, part in enumerate(reversed(back)):
        q = q + s[:, k] * (part - inverse[:, k, None] * (y[:, k] * q).sum(1, keepdim=True))
    return q.view_as(gradient)
