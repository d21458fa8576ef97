"""How gradients move a noise on the Gaussian shell: by rotations, on a sphere, or keeping it white.

Each is Adam (Kingma and Ba 2015, arXiv 1412.6980) on a manifold that holds every noise of the base
noise's energy that the method can reach. A state is a dict of tensors with a row per search. Step
sizes are radians: the RMS angle by which a step of Adam, where all its elements agree, turns the
noise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from oneshot_fast.adam import TINY, State, at_rest, direction, moments
from oneshot_fast.rotation_methods import RawRotation, Rotation

if TYPE_CHECKING:
    from oneshot_fast.matching import AssignOptions

_LONGEST = 1.0  # radians that no step of a sphere exceeds


class Method(Protocol):
    """One way to move noises.

    Attributes:
        first_step: Step in radians that ``lr auto`` begins with.
    """

    first_step: float

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        """``point``, where each search is, and its moments.

        Args:
            eps: Base noises, [B, C, h, w].
            at: Noises to begin at; by default the base noises. Rotations always begin there.
        """
        ...

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        """Noises [B, C, h, w] at ``point``; differentiable with respect to it."""
        ...

    def rotation(self, point: Tensor) -> Tensor | None:
        """The rotations that ``point`` stands for, [B, D, D] or [B, G, G, D, D]; None if none."""
        ...

    def move(
        self, state: State, eps: Tensor, gradient: Tensor, step: Tensor, rate: Tensor
    ) -> State:
        """The state after one step.

        Args:
            state: As ``start`` makes it.
            eps: Base noises, [B, C, h, w].
            gradient: Of the losses with respect to ``point``.
            step: Steps taken so far, [B] int64.
            rate: Step sizes in radians, [B].
        """
        ...


def method_of(options: AssignOptions) -> Method:
    """The gradient method that ``options`` name."""
    if options.gradient_method == "rotation":
        kind = RawRotation if options.rotation_optimizer == "raw_adam" else Rotation
        return kind(options.patch_size, options.rotation_groups, options.max_angle)
    return Sphere(options.max_angle, white=options.gradient_method == "white")


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
        tangent = state | {"exp_avg": _tangent(state["exp_avg"], unit)}
        found = moments(tangent, _tangent(gradient, unit), step)
        way = -_tangent(direction(found, step), unit)
        angle = rate.view(-1, 1, 1) * way.square().mean(-1, keepdim=True).sqrt()
        y = _along(unit, way, angle.clamp_max(_LONGEST)) * radius
        if self.max_angle is not None:
            y = self._within(self._blocks(eps), y)
        return {"point": y, **found}

    def _within(self, base: Tensor, y: Tensor) -> Tensor:
        """Blocks ``y`` moved back along great circles to at most ``max_angle`` from ``base``."""
        assert self.max_angle is not None
        radius = base.norm(dim=-1, keepdim=True)
        unit = base / radius
        away = _tangent(y, unit)
        angle = torch.atan2(away.norm(dim=-1, keepdim=True), (y * unit).sum(-1, keepdim=True))
        back = _along(unit, away, torch.full_like(angle, self.max_angle)) * radius
        return torch.where(angle > self.max_angle, back, y)


def _tangent(x: Tensor, unit: Tensor) -> Tensor:
    """``x`` without its part along ``unit``, both [B, K, n]."""
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
    k = torch.arange(n, dtype=torch.float64)
    matrix = (math.pi / n * (k[None] + 0.5) * k[:, None]).cos() * (2 / n) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.to(like.device, like.dtype)
