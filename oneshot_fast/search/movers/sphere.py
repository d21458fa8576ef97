"""Noises moved freely on the sphere of their norm, or of the norms of their spectrum's blocks."""

import math

import torch
from torch import Tensor

from oneshot_fast.search.movers.adam import TINY, at_rest, direction, moments
from oneshot_fast.search.movers.mover import Mover, State

_LONGEST = 1.0  # radians that no step of a sphere exceeds


class Sphere(Mover):
    """The noise moves freely on the sphere of its base noise's norm: Riemannian Adam on the sphere.

    With ``white``, on a product of spheres instead: every block of 16 or more neighbouring
    coefficients of its orthonormal cosine transform keeps its energy, so that the spectrum stays
    that of white noise. After Hwang and Sung 2026 (arXiv 2602.08646), who project onto blockwise
    norms of the Fourier spectrum; here the norms are the base noise's own.
    """

    first_step = 0.7

    def __init__(self, max_angle: float | None = None, white: bool = False) -> None:
        """Bound the angle in radians between a block and its base noise's; None for any."""
        self.max_angle, self.white = max_angle, white

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        return at_rest(self.blocks(eps if at is None else at))

    def blocks(self, eps: Tensor) -> Tensor:
        """Noises [B, C, h, w] as blocks [B, K, n] whose norms are kept."""
        if not self.white:
            return eps.flatten(1)[:, None].clone()
        B, C, h, w = eps.shape
        c, p, r = _block_sides(C, h, w)
        rows, columns = _cosines(h, eps), _cosines(w, eps)
        parts = (rows @ eps @ columns.mT).view(B, C // c, c, h // p, p, w // r, r)
        return parts.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, -1, c * p * r)

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        """The noises [B, C, h, w] that blocks [B, K, n] are made of."""
        if not self.white:
            return point.view(eps.shape)
        B, C, h, w = eps.shape
        c, p, r = _block_sides(C, h, w)
        parts = point.view(B, C // c, h // p, w // r, c, p, r).permute(0, 1, 4, 2, 5, 3, 6)
        return _cosines(h, eps).mT @ parts.reshape(eps.shape) @ _cosines(w, eps)

    def move(self, state: State, eps: Tensor, grad: Tensor, step: Tensor, rate: Tensor) -> State:
        """A step along great circles; the first moments stay tangent, without transport."""
        y = state["point"]
        radius = y.norm(dim=-1, keepdim=True)
        unit = y / radius
        moving = state | {"exp_avg": tangent(state["exp_avg"], unit)}
        found = moments(moving, tangent(grad, unit), step)
        way = -tangent(direction(found, step), unit)
        angle = rate.view(-1, 1, 1) * way.square().mean(-1, keepdim=True).sqrt()
        return {"point": self.turned(eps, unit, way, angle, radius), **found}

    def turned(
        self, eps: Tensor, unit: Tensor, way: Tensor, angle: Tensor, radius: Tensor
    ) -> Tensor:
        """Blocks turned along great circles, no further from their base noise than allowed.

        They were at ``unit``, of length 1, turn towards the tangents ``way``, of any length, both
        [B, K, n], by ``angle`` radians, and get the length ``radius``, both [B, K, 1].
        """
        y = along(unit, way, angle.clamp_max(_LONGEST)) * radius
        if self.max_angle is None:
            return y
        base = self.blocks(eps)
        return within_angle_of(base, y, self.max_angle, base.norm(dim=-1, keepdim=True))


def within_angle_of(base: Tensor, y: Tensor, max_angle: float, radius: Tensor) -> Tensor:
    """Vectors ``y`` [..., n] moved back along great circles to ``max_angle`` radians from ``base``.

    Those get the length ``radius`` [..., 1]; what is within the angle stays as it is.
    """
    unit = base / base.norm(dim=-1, keepdim=True)
    away = tangent(y, unit)
    angle = torch.atan2(away.norm(dim=-1, keepdim=True), (y * unit).sum(-1, keepdim=True))
    back = along(unit, away, torch.full_like(angle, max_angle)) * radius
    return torch.where(angle > max_angle, back, y)


def tangent(x: Tensor, unit: Tensor) -> Tensor:
    """``x`` without its part along ``unit``, of length 1 or 0; both [..., n]."""
    return x - (x * unit).sum(-1, keepdim=True) * unit


def along(unit: Tensor, direction: Tensor, angle: Tensor) -> Tensor:
    """Unit vectors [..., n] turned by ``angle`` [..., 1] towards tangents ``direction``."""
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
