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

from oneshot_fast import ops
from oneshot_fast.ops.rotation_step import rotation_step
from oneshot_fast.rotation import check_patching

if TYPE_CHECKING:
    from oneshot_fast.matching import AssignOptions

State = dict[str, Tensor]
_BETA1, _BETA2 = 0.9, 0.999
# Adam's: the root mean square of a target's first gradient is 1, so that the scale of its loss does
# not matter, and what rounding leaves of an element that is 0 does not move it
_EPS = 1e-3
_TINY = 1e-30
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


class Rotation:
    """Every patch is turned by one matrix q, or one per tile: Riemannian Adam on q itself.

    See ``ops.rotation_step`` for the formulas and their sources.
    """

    first_step = 0.3

    def __init__(self, patch_size: int, groups: int = 1, max_angle: float | None = None) -> None:
        """Bind the patches.

        Args:
            patch_size: Side of a patch in latent pixels.
            groups: G x G tiles with a rotation each.
            max_angle: Largest RMS rotation angle in radians; None for any.
        """
        self.patch_size, self.groups, self.max_angle = patch_size, groups, max_angle

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        """Identities."""
        check_patching(eps.shape[-2:], self.patch_size, self.groups)
        D = eps.shape[1] * self.patch_size**2
        tiles = () if self.groups == 1 else (self.groups, self.groups)
        q = torch.eye(D, device=eps.device).repeat(len(eps), *tiles, 1, 1)
        return _at_rest(q)

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        """Rotated base noises."""
        return ops.patch_rotate(eps, point, self.patch_size)

    def rotation(self, point: Tensor) -> Tensor | None:
        """The point itself."""
        return point

    def move(
        self, state: State, eps: Tensor, gradient: Tensor, step: Tensor, rate: Tensor
    ) -> State:
        """A step of Riemannian Adam. An element of the generator counts sqrt(D - 1) times less."""
        gradient, scale = _scaled(gradient, state, step)
        q, m, v = (state[name].clone() for name in ("point", "exp_avg", "exp_avg_sq"))
        per_matrix = q.shape[:-2]
        steps = _per_row(step, q[..., 0, 0]).to(q.dtype).expand(per_matrix).contiguous()
        rates = _per_row(rate, q[..., 0, 0]).expand(per_matrix) / max(1, q.shape[-1] - 1) ** 0.5
        rotation_step(q, gradient @ q.mT, m, v, steps, lr=rates, eps=_EPS)
        if self.max_angle is not None:
            q = within_angle(q, self.max_angle)
        return {"point": q, "exp_avg": m, "exp_avg_sq": v, "scale": scale}


class RawRotation(Rotation):
    """The same rotations by Adam on the elements of a matrix a with q = exp(a - a^T).

    Source of the parametrisation: Lezcano-Casado and Martinez-Rubio 2019 (arXiv 1901.08428).
    """

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        """Zeros."""
        return _at_rest(torch.zeros_like(super().start(eps, at)["point"]))

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        """Rotated base noises."""
        return super().noise(eps, ops.skew_exp(point))

    def rotation(self, point: Tensor) -> Tensor | None:
        """exp(a - a^T)."""
        return ops.skew_exp(point)

    def move(
        self, state: State, eps: Tensor, gradient: Tensor, step: Tensor, rate: Tensor
    ) -> State:
        """A step of Adam; a - a^T moves by twice the elements of a."""
        moments = _moments(state, gradient, step)
        D = gradient.shape[-1]
        lr = _per_row(rate, gradient) / (2 * max(1, D - 1) ** 0.5)
        a = state["point"] - lr * _direction(moments, step)
        if self.max_angle is not None:
            angle = torch.linalg.matrix_norm(a - a.mT)[..., None, None] / D**0.5
            a = a * (self.max_angle / angle.clamp_min(_TINY)).clamp_max(1)
        return {"point": a, **moments}


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
        return _at_rest(self._blocks(eps if at is None else at))

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
        moments = _moments(tangent, _tangent(gradient, unit), step)
        direction = _tangent(_direction(moments, step), unit)
        angle = rate.view(-1, 1, 1) * direction.square().mean(-1, keepdim=True).sqrt()
        y = _along(unit, -direction, angle.clamp_max(_LONGEST)) * radius
        if self.max_angle is not None:
            y = self._within(self._blocks(eps), y)
        return {"point": y, **moments}

    def _within(self, base: Tensor, y: Tensor) -> Tensor:
        """Blocks ``y`` moved back along great circles to at most ``max_angle`` from ``base``."""
        assert self.max_angle is not None
        radius = base.norm(dim=-1, keepdim=True)
        unit = base / radius
        away = _tangent(y, unit)
        angle = torch.atan2(away.norm(dim=-1, keepdim=True), (y * unit).sum(-1, keepdim=True))
        back = _along(unit, away, torch.full_like(angle, self.max_angle)) * radius
        return torch.where(angle > self.max_angle, back, y)


def within_angle(q: Tensor, max_angle: float) -> Tensor:
    """Rotations shortened, about the same planes, to an RMS angle of at most ``max_angle``.

    The symmetric part of q is cos and the skew part sin of the angles, in the same planes, so that
    q^t = cos(t theta) + sin(t theta) / sin(theta) * (q - q^T) / 2.

    Args:
        q: Orthogonal, [..., D, D], without an angle of exactly pi.
        max_angle: Radians.

    Returns:
        Like ``q``.
    """
    cosines, planes = torch.linalg.eigh((q + q.mT) / 2)
    theta = cosines.clamp(-1, 1).acos()
    rms = theta.square().mean(-1, keepdim=True).sqrt()
    t = max_angle / rms.clamp_min(_TINY)
    sines = theta.sin().clamp_min(1e-6)
    ratio = torch.where(theta < 1e-3, t, (t * theta).sin() / sines)
    even, odd = ((planes * f[..., None, :]) @ planes.mT for f in ((t * theta).cos(), ratio))
    shorter = even + odd @ (q - q.mT) / 2
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    shorter = shorter @ (3 * eye - shorter.mT @ shorter) / 2  # removes what rounding added
    return torch.where((t < 1)[..., None], shorter, q)


def _at_rest(point: Tensor) -> State:
    zeros = torch.zeros_like(point)
    scale = point.new_ones(len(point))
    return {"point": point, "exp_avg": zeros, "exp_avg_sq": zeros.clone(), "scale": scale}


def _scaled(gradient: Tensor, state: State, step: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient over the root mean square of each row's first one, and that, [B]."""
    rms = gradient.square().flatten(1).mean(1).sqrt().clamp_min(_TINY)
    scale = torch.where(step == 0, rms, state["scale"])
    return gradient / _per_row(scale, gradient), scale


def _moments(state: State, gradient: Tensor, step: Tensor) -> State:
    gradient, scale = _scaled(gradient, state, step)
    return {
        "exp_avg": state["exp_avg"].lerp(gradient, 1 - _BETA1),
        "exp_avg_sq": state["exp_avg_sq"] * _BETA2 + (1 - _BETA2) * gradient.square(),
        "scale": scale,
    }


def _direction(moments: State, step: Tensor) -> Tensor:
    """Adam's step of size 1, the moments' biases removed."""
    t = (step + 1).double()
    m, v = moments["exp_avg"], moments["exp_avg_sq"]
    bias1, root2 = (
        _per_row(bias, m).to(m.dtype) for bias in (1 - _BETA1**t, (1 - _BETA2**t).sqrt())
    )
    return (m / bias1) / (v.sqrt() / root2 + _EPS)


def _tangent(x: Tensor, unit: Tensor) -> Tensor:
    """``x`` without its part along ``unit``, both [B, K, n]."""
    return x - (x * unit).sum(-1, keepdim=True) * unit


def _along(unit: Tensor, direction: Tensor, angle: Tensor) -> Tensor:
    """Unit vectors turned by ``angle`` towards the tangent ``direction``."""
    length = direction.norm(dim=-1, keepdim=True)
    turned = angle.cos() * unit + angle.sin() * direction / length.clamp_min(_TINY)
    return turned / turned.norm(dim=-1, keepdim=True)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] shaped to broadcast over ``like`` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


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
