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

from oneshot_fast.training.losses.preference import Extra, Found, log_prob

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
    """On pairs of actions around one clean latent.

    ``extra`` has "actions" [G, N, 2, C, h, w], their "preference" [G, N] and in "pairs" [G] how
    many pairs that are no ties a group of the whole batch has on the mean.

    Attributes:
        std: Of the action noise, in deviations of the latents.
        beta: Per nat.
        clip: Bound of the log-ratio, in nats.
        form: "ppo" or "original".
        on_means: ``beta`` and ``clip`` are the original's, of means over D.
    """

    std: float = 0.3
    beta: float = 0.1
    clip: float = 25.0
    form: Clip = "ppo"
    on_means: bool = False
    measures = ("preferred", "ratio", "clipped", "kl")

    def __call__(self, x0: Tensor, base: Tensor, extra: Extra) -> Found:
        """See ``Objective``."""
        actions, y = extra["actions"], extra["preference"]
        d = log_prob(actions, x0[:, :, None], self.std) - log_prob(
            actions, base[:, :, None], self.std
        )
        low, high = -self.clip, self.clip
        if self.on_means:
            d = d / x0[0, 0].numel()
            low, high = math.log1p(-self.clip), math.log1p(self.clip)
        loss = pso_loss(d, y, self.beta, low, high, self.form)
        pairs = extra["pairs"].clamp(min=1e-9)

        def mean(values: Tensor) -> Tensor:
            return (values * (y != 0)).sum(1) / pairs

        known = d.detach()
        return mean(loss), {
            "preferred": mean((y * (known[..., 0] - known[..., 1]) > 0).float()),
            "ratio": mean(known.exp().mean(-1)),
            "clipped": mean(((known < low) | (known > high)).float().mean(-1)),
            "kl": mean((known.exp() - 1 - known).mean(-1)),
        }
