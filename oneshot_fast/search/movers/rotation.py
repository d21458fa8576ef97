"""Rotations of a noise's patches by gradients: on the group, or through the exponential."""

import torch
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.noise.rotation import check_patching
from oneshot_fast.ops.rotation_step import rotation_step
from oneshot_fast.search.movers import adam
from oneshot_fast.search.movers.mover import Mover, State


class Rotation(Mover):
    """Every patch is turned by one matrix q, or one per tile: Riemannian Adam on q itself.

    See ``ops.rotation_step`` for the formulas and their sources.
    """

    first_step = 0.3

    def __init__(self, patch_size: int, groups: int = 1, max_angle: float | None = None) -> None:
        """Bind the patches' side, G x G tiles of them, and the largest RMS angle in radians."""
        self.patch_size, self.groups, self.max_angle = patch_size, groups, max_angle

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        check_patching(eps.shape[-2:], self.patch_size, self.groups)
        D = eps.shape[1] * self.patch_size**2
        tiles = () if self.groups == 1 else (self.groups, self.groups)
        q = torch.eye(D, device=eps.device).repeat(len(eps), *tiles, 1, 1)
        return adam.at_rest(q)

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        return ops.patch_rotate(eps, point, self.patch_size)

    def rotation(self, point: Tensor) -> Tensor | None:
        return point

    def move(self, state: State, eps: Tensor, grad: Tensor, step: Tensor, rate: Tensor) -> State:
        """A step of Riemannian Adam; an element of the generator counts sqrt(D - 1) times less."""
        g = grad @ state["point"].mT
        tangent, scale = adam.scaled((g - g.mT) / 2, state, step)
        q, m, v = (state[name].clone() for name in ("point", "exp_avg", "exp_avg_sq"))
        per_matrix = q.shape[:-2]
        steps = adam.per_row(step, q[..., 0, 0]).to(q.dtype).expand(per_matrix).contiguous()
        rates = adam.per_row(rate, q[..., 0, 0]).expand(per_matrix) / max(1, q.shape[-1] - 1) ** 0.5
        rotation_step(q, tangent, m, v, steps, lr=rates, eps=adam.EPS)
        if self.max_angle is not None:
            q = within_angle(q, self.max_angle)
        return {"point": q, "exp_avg": m, "exp_avg_sq": v, "scale": scale}


class RawRotation(Rotation):
    """The same rotations by Adam on the elements of a matrix a with q = exp(a - a^T).

    Source of the parametrisation: Lezcano-Casado and Martinez-Rubio 2019 (arXiv 1901.08428).
    """

    def __init__(
        self,
        patch_size: int,
        groups: int = 1,
        max_angle: float | None = None,
        in_radians: bool = True,
    ) -> None:
        """As ``Rotation``; steps are in radians, or in elements of a."""
        super().__init__(patch_size, groups, max_angle)
        self.in_radians = in_radians

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        return adam.at_rest(torch.zeros_like(super().start(eps, at)["point"]))

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        return super().noise(eps, ops.skew_exp(point))

    def rotation(self, point: Tensor) -> Tensor | None:
        return ops.skew_exp(point)

    def move(self, state: State, eps: Tensor, grad: Tensor, step: Tensor, rate: Tensor) -> State:
        """A step of Adam; a - a^T moves by twice the elements of a, of which a row has D - 1."""
        found = adam.moments(state, grad, step)
        D, lr = grad.shape[-1], adam.per_row(rate, grad)
        if self.in_radians:
            lr = lr / (2 * max(1, D - 1) ** 0.5)
        a = state["point"] - lr * adam.direction(found, step)
        if self.max_angle is not None:
            angle = torch.linalg.matrix_norm(a - a.mT)[..., None, None] / D**0.5
            a = a * (self.max_angle / angle.clamp_min(adam.TINY)).clamp_max(1)
        return {"point": a, **found}


def within_angle(q: Tensor, max_angle: float) -> Tensor:
    """Rotations [..., D, D] shortened, in their planes, to an RMS angle of at most ``max_angle``.

    The symmetric part of q is cos and the skew part sin of the angles, in the same planes, so that
    q^t = cos(t theta) + sin(t theta) / sin(theta) * (q - q^T) / 2. No angle may be exactly pi.
    """
    cosines, planes = torch.linalg.eigh((q + q.mT) / 2)
    theta = cosines.clamp(-1, 1).acos()
    rms = theta.square().mean(-1, keepdim=True).sqrt()
    t = max_angle / rms.clamp_min(adam.TINY)
    sines = theta.sin().clamp_min(1e-6)
    ratio = torch.where(theta < 1e-3, t, (t * theta).sin() / sines)
    even, odd = ((planes * f[..., None, :]) @ planes.mT for f in ((t * theta).cos(), ratio))
    shorter = even + odd @ (q - q.mT) / 2
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    shorter = shorter @ (3 * eye - shorter.mT @ shorter) / 2  # removes what rounding added
    return torch.where((t < 1)[..., None], shorter, q)
