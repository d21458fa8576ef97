"""How ReNO moves a noise: freely, by gradient descent, with a prior on its norm.

Source of everything here: Eyring et al. 2024 (ReNO, arXiv 2406.04312). The rewards there are
5 HPSv2 + 1 ImageReward + 0.01 CLIP + 0.05 PickScore, over 50 steps, and the best iterate is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oneshot_fast.search.movers.adam import State

LR, MOMENTUM, CLIP, PRIOR_WEIGHT = 5.0, 0.9, 0.1, 0.01


class FreeNoise:
    """The noise itself moves: SGD with Nesterov momentum on clipped gradients.

    With g the gradient of one image's loss, shortened to a norm of at most 0.1:
    v <- 0.9 v + g, z <- z - lr (g + 0.9 v), with lr 5: torch's SGD with ``nesterov=True``.
    """

    first_step = LR

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        """The noises, at rest."""
        return {"point": (eps if at is None else at).clone(), "velocity": torch.zeros_like(eps)}

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        """The point itself."""
        return point

    def rotation(self, point: Tensor) -> Tensor | None:
        """None: there is no rotation."""
        return None

    def move(
        self, state: State, eps: Tensor, gradient: Tensor, step: Tensor, rate: Tensor
    ) -> State:
        """A step of SGD."""
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        clipped = gradient * (CLIP / length).clamp_max(1).view(-1, 1, 1, 1)
        velocity = MOMENTUM * state["velocity"] + clipped
        ahead = clipped + MOMENTUM * velocity
        return {"point": state["point"] - rate.view(-1, 1, 1, 1) * ahead, "velocity": velocity}
