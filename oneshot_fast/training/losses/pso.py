"""PSO: of two samples the better one becomes likelier than it was under the base generator.

    L = -log sigmoid(beta y (c(d_1) - c(d_2))),   d = log p(a) - log p_base(a),   y = +-1

Pairwise Sample Optimization (Miao et al. 2024, arXiv 2410.03190): p is that of a stochastic step of
the sampler. A single step has none, so that here the action is a = x0 + std z around the clean
latents, p(a) = N(a; x0, std^2), as in the one-step baseline of DrPO (arXiv 2606.02521); z is fresh
noise, and both actions of a pair share their input noise, so that they differ by z alone.

The original clips: c(d) = d within [log(1 - clip), log(1 + clip)], of means over D instead of sums.
A winner whose probability fell out of that range has no gradient back; "ppo" clips only what would
be rewarded for going further.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.training.losses.preference import Extra, Found

Clip = Literal["ppo", "original"]


def pso_loss(
    d: Tensor, y: Tensor, beta: float, low: float, high: float, clip: Clip = "ppo"
) -> Tensor:
    """Loss of each pair, and 0 for ties.

    Args:
        d: Log-ratios to the base of both samples, [..., 2].
        y: [...]: +1 where the first is better, -1 where the second is, 0 for a tie.
        beta: Per unit of ``d``.
        low: Lower bound of ``d``.
        high: Upper bound.
        clip: Which of the two forms.
    """
    towards = torch.stack((y, -y), -1)
    bounded = d.clamp(low, high)
    if clip == "ppo":
        bounded = torch.where(towards > 0, d.clamp(max=high), d.clamp(min=low))
    gap = beta * (towards * bounded).sum(-1)
    return -F.logsigmoid(gap) * (y != 0)


@dataclass(frozen=True)
class PSO:
    """On pairs of neighbours in a group: samples 0 and 1, 2 and 3, ...

    Policy and base are log-probabilities [G, K, S] of S steps; each has its own loss, and their
    mean is lowered. ``extra`` has the "preference" [G, K / 2] of the pairs and in "pairs" [G] how
    many that are no ties a group of the whole batch has on the mean.

    Attributes:
        beta: Per nat.
        clip: Bound of the log-ratio, in nats.
        form: "ppo" or "original".
        scale: Factor of the log-ratios; with 1 / D ``beta`` and ``clip`` are the original's.
    """

    beta: float = 0.1
    clip: float = 25.0
    form: Clip = "ppo"
    scale: float = 1.0
    measures = ("preferred", "clipped", "kl")

    def __call__(self, policy: Tensor, base: Tensor, extra: Extra) -> Found:
        """See ``Objective``."""
        y = extra["preference"][:, None]
        d = self.scale * (policy - base).movedim(2, 1).unflatten(2, (-1, 2))  # [G, S, K / 2, 2]
        low, high = -self.clip, self.clip
        if self.scale != 1:
            low, high = math.log1p(low), math.log1p(high)
        loss = pso_loss(d, y, self.beta, low, high, self.form)
        pairs = extra["pairs"].clamp(min=1e-9)

        def mean(values: Tensor) -> Tensor:
            return (values * (y != 0)).mean(1).sum(1) / pairs

        known = d.detach()
        return mean(loss), {
            "preferred": mean((y * (known[..., 0] - known[..., 1]) > 0).float()),
            "clipped": mean(((known < low) | (known > high)).float().mean(-1)),
            # the samples are the policy's, so that 1 / ratio - 1 + log ratio is never far off
            "kl": mean(((-known).exp() - 1 + known).mean(-1)),
        }


def original_pso(size: int) -> PSO:
    """As published, of latents with ``size`` elements."""
    return PSO(beta=50.0, clip=0.1, form="original", scale=1 / size)
