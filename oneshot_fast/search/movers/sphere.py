"""Noises moved freely on the sphere of their norm, or of the norms of their spectrum's blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oneshot_fast.search.movers.adam import (
    TINY,
    State,
    at_rest,
    direction,
    moments,
    per_row,
    scaled,
)
from oneshot_fast.search.movers.lbfgs import PAIRS, newton_direction

_LONGEST = 1.0  # radians that no step of a sphere exceeds
_NEAR = 1e-3  # radians from the largest angle that count as at it


class Sphere:
    """The noise moves freely on the sphere of its base noise's norm: Riemannian Adam on the sphere.

    With ``white``, on a product of spheres instead: every block of 16 or more neighbouring
    coefficients of its orthonormal cosine transform keeps its energy, so that the spectrum stays
    that of white noise. After Hwang and Sung 2026 (arXiv 2602.08646), who project onto blockwise
    norms of the Fourier spectrum; here the norms are the base noise's own.
    """

    first_step = 0.7

    def __init__(self, max_angle: float | None = None, white: bool = False) -> None:
        """Choose the manifold.

        Args:
            max_angle: Largest angle between a block and its base noise's; None for any.
            white: Keep the energy of every block of the spectrum.
        """
        self.max_angle, self.white = max_angle, white

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        """The noises, as blocks."""
        return at_rest(self._blocks(eps if at is None else at))

    def _blocks(self, eps: Tensor) -> Tensor:
        """Noises [B, C, h, w] as blocks [B, K, n] whose norms are kept."""
        if not self.white:
            return eps.flatten(1)[:, None].clone()
        B, C, h, w = eps.shape
        c, p, r = _block_sides(C, h, w)
        rows, columns = _cosines(h, eps), _cosines(w, eps)
        parts = (rows @ eps @ columns.mT).view(B, C // c, c, h // p, p, w // r, r)
        return parts.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, -1, c * p * r)

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        """The noises that the blocks are made of."""
        if not self.white:
            return point.view(eps.shape)
        B, C, h, w = eps.shape
        c, p, r = _block_sides(C, h, w)
        parts = point.view(B, C // c, h // p, w // r, c, p, r).permute(0, 1, 4, 2, 5, 3, 6)
        return _cosines(h, eps).mT @ parts.reshape(eps.shape) @ _cosines(w, eps)

    def rotation(self, point: Tensor) -> Tensor | None:
        """None: no rotation of patches makes these noises."""
        return None

    def move(
        self, state: State, eps: Tensor, gradient: Tensor, step: Tensor, rate: Tensor
    ) -> State:
        """A step along great circles; the first moments stay tangent, without transport."""
        y = state["point"]
        radius = y.norm(dim=-1, keepdim=True)
        unit = y / radius
        moving = state | {"exp_avg": _tangent(state["exp_avg"], unit)}
        found = moments(moving, _tangent(gradient, unit), step)
        way = -_tangent(direction(found, step), unit)
        angle = rate.view(-1, 1, 1) * way.square().mean(-1, keepdim=True).sqrt()
        return {"point": self.turned(eps, unit, way, angle, radius), **found}

    def turned(
        self, eps: Tensor, unit: Tensor, way: Tensor, angle: Tensor, radius: Tensor
    ) -> Tensor:
        """Blocks of length ``radius`` at ``unit``, turned towards ``way`` as far as allowed."""
        y = _along(unit, way, angle.clamp_max(_LONGEST)) * radius
        return y if self.max_angle is None else self._within(self._blocks(eps), y)

    def _within(self, base: Tensor, y: Tensor) -> Tensor:
        """Blocks ``y`` moved back along great circles to at most ``max_angle`` from ``base``."""
        assert self.max_angle is not None
        radius = base.norm(dim=-1, keepdim=True)
        unit = base / radius
        away = _tangent(y, unit)
        angle = torch.atan2(away.norm(dim=-1, keepdim=True), (y * unit).sum(-1, keepdim=True))
        back = _along(unit, away, torch.full_like(angle, self.max_angle)) * radius
        return torch.where(angle > self.max_angle, back, y)


class QuasiNewtonSphere(Sphere):
    """``Sphere`` by L-BFGS (Liu and Nocedal 1989), with vectors carried along by projection.

    After Huang, Gallivan and Absil 2015 (SIAM J. Optim. 25) for manifolds, without their line
    search: no evaluation is spent on it. A step is at most ``rate`` radians long, and where the
    loss rises it goes on from there, with the curvature that this step has shown. A noise at the
    largest angle that would go further moves along the boundary.
    """

    first_step = 0.5

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        """The noises, as blocks, and no pairs yet."""
        point = super().start(eps, at)["point"]
        B, K, n = point.shape
        pairs = point.new_zeros(B, PAIRS, K, n)
        return {
            "point": point,
            "scale": point.new_ones(B),
            "last_point": point.clone(),
            "last_gradient": torch.zeros_like(point),
            "moves": pairs,
            "changes": pairs.clone(),
        }

    def move(
        self, state: State, eps: Tensor, gradient: Tensor, step: Tensor, rate: Tensor
    ) -> State:
        """A step along great circles."""
        y = state["point"]
        radius = y.norm(dim=-1, keepdim=True)
        unit = y / radius
        gradient, scale = scaled(_tangent(gradient, unit), state, step)
        moved = y - state["last_point"]  # 0 at the first step: no pair
        changed = gradient - state["last_gradient"]
        moves, changes = (
            _tangent(torch.cat([state[name][:, 1:], new[:, None]], 1), unit[:, None])
            for name, new in (("moves", moved), ("changes", changed))
        )
        longest = rate * radius.square().sum((1, 2)).sqrt()
        barred = self._barred(eps, unit, gradient)
        free = _tangent(gradient, barred)
        first = longest / free.flatten(1).norm(dim=1).clamp_min(TINY)
        pairs = [_tangent(x, barred[:, None]) for x in (moves, changes)]
        way = -_tangent(newton_direction(free, pairs[0], pairs[1], first), unit)
        shorter = (longest / way.flatten(1).norm(dim=1).clamp_min(TINY)).clamp_max(1)
        angle = way.norm(dim=-1, keepdim=True) * per_row(shorter, way) / radius
        return {
            "point": self.turned(eps, unit, way, angle, radius),
            "scale": scale,
            "last_point": y,
            "last_gradient": gradient,
            "moves": moves,
            "changes": changes,
        }

    def _barred(self, eps: Tensor, unit: Tensor, gradient: Tensor) -> Tensor:
        """Unit vectors away from the base noise where descent would leave the bound, else 0."""
        if self.max_angle is None:
            return torch.zeros_like(unit)
        base = self._blocks(eps)
        base = base / base.norm(dim=-1, keepdim=True)
        away = -_tangent(base, unit)
        sine = away.norm(dim=-1, keepdim=True)
        away = away / sine.clamp_min(TINY)
        at_bound = torch.atan2(sine, (unit * base).sum(-1, keepdim=True)) > self.max_angle - _NEAR
        leaves = (gradient * away).sum(-1, keepdim=True) < 0
        return away.where(at_bound & leaves, torch.zeros_like(away))


def _tangent(x: Tensor, unit: Tensor) -> Tensor:
    """``x`` without its part along ``unit``, of length 1 or 0; both [..., K, n]."""
    return x - (x * unit).sum(-1, keepdim=True) * unit


def _along(unit: Tensor, direction: Tensor, angle: Tensor) -> Tensor:
    """Unit vectors turned by ``angle`` towards the tangent ``direction``."""
    length = direction.norm(dim=-1, keepdim=True)
    turned = angle.cos() * unit + angle.sin() * direction / length.clamp_min(TINY)
    return turned / turned.norm(dim=-1, keepdim=True)


def _block_sides(C: int, h: int, w: int) -> tuple[int, int, int]:
    """Channels, rows and columns of a block: 4 x 4 coefficients, or more channels where that fails.

    A block of few coefficients would hardly let them move.
    """
    p, r = math.gcd(h, 4), math.gcd(w, 4)
    channels = [c for c in range(1, C + 1) if C % c == 0]
    return next((c for c in channels if c * p * r >= 16), C), p, r


def _cosines(n: int, like: Tensor) -> Tensor:
    """Orthonormal matrix of the cosine transform (DCT-II) of n values, [n, n]."""
    # made on the device: a copy would make a GPU wait in every step
    k = torch.arange(n, dtype=torch.float64, device=like.device)
    matrix = (math.pi / n * (k[None] + 0.5) * k[:, None]).cos() * (2 / n) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.to(like.dtype)
