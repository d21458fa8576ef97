"""Adam with a state and a step of its own for each search, as all ways to move a noise share it.

Kingma and Ba 2015 (arXiv 1412.6980). Everywhere here B searches have a point [B, ...] each.
"""

import torch
from torch import Tensor

from oneshot_fast.search.movers.mover import State

BETA1, BETA2 = 0.9, 0.999
# Adam's: the root mean square of a target's first gradient is 1, so that the scale of its loss does
# not matter, and what rounding leaves of an element that is 0 does not move it
EPS = 1e-3
TINY = 1e-30


def at_rest(point: Tensor) -> State:
    """The state of searches that begin at ``point`` [B, ...]: moments of 0, scales [B] of 1."""
    zeros = torch.zeros_like(point)
    scale = point.new_ones(len(point))
    return {"point": point, "exp_avg": zeros, "exp_avg_sq": zeros.clone(), "scale": scale}


def scaled(gradient: Tensor, state: State, step: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [B, ...] over the root mean square of each row's first one; and those, [B]."""
    rms = gradient.square().flatten(1).mean(1).sqrt().clamp_min(TINY)
    scale = torch.where(step == 0, rms, state["scale"])
    return gradient / per_row(scale, gradient), scale


def moments(state: State, gradient: Tensor, step: Tensor) -> State:
    """Moments and scale after a gradient [B, ...], with ``step`` [B] int64 taken before."""
    gradient, scale = scaled(gradient, state, step)
    return {
        "exp_avg": state["exp_avg"].lerp(gradient, 1 - BETA1),
        "exp_avg_sq": state["exp_avg_sq"] * BETA2 + (1 - BETA2) * gradient.square(),
        "scale": scale,
    }


def direction(moments: State, step: Tensor) -> Tensor:
    """Adam's step of size 1 uphill, [B, ...], unbiased; ``step`` [B] were taken before."""
    t = (step + 1).double()
    m, v = moments["exp_avg"], moments["exp_avg_sq"]
    bias1, root2 = (per_row(bias, m).to(m.dtype) for bias in (1 - BETA1**t, (1 - BETA2**t).sqrt()))
    return (m / bias1) / (v.sqrt() / root2 + EPS)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] shaped to broadcast over ``like`` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))
