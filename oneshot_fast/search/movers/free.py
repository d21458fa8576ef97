"""Noises moved freely, off the Gaussian shell, too; a prior on their norm is the objective's part.

What that does to the noise's law is in docs/noise.md.
"""

import torch
from torch import Tensor

from oneshot_fast.search.movers.adam import at_rest, direction, moments, per_row
from oneshot_fast.search.movers.mover import Mover, State
from oneshot_fast.search.movers.sphere import within_angle_of

_MOMENTUM, _CLIP = 0.9, 0.1


class Free(Mover):
    """The noise itself moves, by Adam (Kingma and Ba 2015, arXiv 1412.6980)."""

    first_step = 0.3

    def __init__(self, max_angle: float | None = None) -> None:
        """Bound the angle to the base noise, in radians; the norm stays free."""
        self.max_angle = max_angle

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        return at_rest((eps if at is None else at).clone())

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        return point

    def move(self, state: State, eps: Tensor, grad: Tensor, step: Tensor, rate: Tensor) -> State:
        found = moments(state, grad, step)
        moved = state["point"] - per_row(rate, grad) * direction(found, step)
        return {"point": self._bounded(eps, moved), **found}

    def _bounded(self, eps: Tensor, z: Tensor) -> Tensor:
        """Noises [B, C, h, w], turned back to ``max_angle`` from ``eps`` at their own norm."""
        if self.max_angle is None:
            return z
        base, flat = eps.flatten(1), z.flatten(1)
        norm = flat.norm(dim=-1, keepdim=True)
        return within_angle_of(base, flat, self.max_angle, norm).view_as(z)


class FreeSgd(Free):
    """As ReNO moves it (Eyring et al. 2024, arXiv 2406.04312): SGD with Nesterov momentum.

    With g the gradient of one image's loss, shortened to a norm of at most 0.1:
    v <- 0.9 v + g, z <- z - lr (g + 0.9 v), with lr 5: torch's SGD with ``nesterov=True``. The
    rewards there are 5 HPSv2 + 1 ImageReward + 0.01 CLIP + 0.05 PickScore, over 50 steps, and the
    best iterate is kept.
    """

    first_step = 5.0
    adapts = False

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        return {"point": (eps if at is None else at).clone(), "velocity": torch.zeros_like(eps)}

    def move(self, state: State, eps: Tensor, grad: Tensor, step: Tensor, rate: Tensor) -> State:
        length = grad.flatten(1).norm(dim=1).clamp_min(1e-12)
        clipped = grad * per_row((_CLIP / length).clamp_max(1), grad)
        velocity = _MOMENTUM * state["velocity"] + clipped
        moved = state["point"] - per_row(rate, grad) * (clipped + _MOMENTUM * velocity)
        return {"point": self._bounded(eps, moved), "velocity": velocity}
