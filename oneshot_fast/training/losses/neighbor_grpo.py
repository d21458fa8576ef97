"""Neighbor-GRPO: of the images of neighbouring noises, move towards the better ones.

    z_i = sqrt(1 - s^2) b + s d_i                        K noises around one base noise b
    A = K^(1/2) (r - mean r) / (sum |r - mean r|^p)^(1/p)
    log pi_a(i) = log softmax_i(-mean_D |x_i - x_a|^2 / temperature)
    L = mean_a,i max(-A_i rho, -A_i clip(rho, 1 +- clip)) + weight mean_D |x_a - x_a,base|^2

with rho = pi_a(i) / pi_a,old(i), over a few of the K samples, the anchors a, which are evaluated
again with a gradient (the one-step baseline in the code of DrPO, arXiv 2606.02521). No likelihood
is needed: that of "choosing the neighbour i" stands for it. With temperature 1 all logits are
nearly equal, as neighbours are s^2 apart: "auto" takes the group's mean distance.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from oneshot_fast.training.losses.preference import Extra, Found


def neighbors(base: Tensor, deltas: Tensor, spread: float) -> Tensor:
    """Noises [K, C, h, w], N(0, 1) as they were, around ``base`` [C, h, w]."""
    return (1 - spread**2) ** 0.5 * base + spread * deltas


def p_norm_advantages(rewards: Tensor, p: float = 0.8, largest: float = 5.0) -> Tensor:
    """Of each group [..., K]; 0 where a reward is not finite, or all are equal."""
    good = rewards.isfinite()
    known = rewards.where(good, torch.zeros_like(rewards))
    count = good.sum(-1, keepdim=True).clamp(min=1)
    centred = (known - known.sum(-1, keepdim=True) / count) * good
    norm = centred.abs().pow(p).sum(-1, keepdim=True).pow(1 / p)
    found = count**0.5 * centred / norm.clamp(min=1e-8)
    return found.clamp(-largest, largest)


def log_policy(anchors: Tensor, candidates: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Logarithm of pi_a(i), [G, A, K], of anchors [G, A, ...] among candidates [G, K, ...]."""
    distance = (anchors[:, :, None] - candidates[:, None]).flatten(3).square().mean(3)
    return torch.log_softmax(-distance / temperature, 2)


def neighbor_grpo_loss(
    log_ratio: Tensor, advantage: Tensor, clip: float = 0.2, largest: float = 10.0
) -> Tensor:
    """Of each group [G]; log-ratios [G, A, K] to the policy that was sampled, advantages [G, K]."""
    ratio = log_ratio.clamp(-largest, largest).exp()
    gain = advantage[:, None]
    return torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - clip, 1 + clip)).mean((1, 2))


@dataclass(frozen=True)
class NeighborGRPO:
    """On clean latents [G, A, C, h, w] of anchors among neighbours.

    ``extra`` has "candidates" [G, K, C, h, w], the sampled clean latents, "rewards" [G, K] and
    "old" [G, A, C, h, w], those of the anchors among them.

    Attributes:
        temperature: Of the choice among neighbours, or "auto".
        clip: Of the ratio.
        p: Of the norm that advantages are divided by.
    """

    temperature: float | Literal["auto"] = "auto"
    clip: float = 0.2
    p: float = 0.8
    measures = ("ratio", "kl")

    def __call__(self, policy: Tensor, base: Tensor, extra: Extra) -> Found:
        """See ``Objective``."""
        candidates, old = extra["candidates"], extra["old"]
        wide: float | Tensor = 1.0 if self.temperature == "auto" else self.temperature
        if self.temperature == "auto":
            apart = candidates.flatten(2).var(1).mean(1)  # half of the mean distance
            wide = (2 * apart).clamp(min=1e-12)[:, None, None]
        log_ratio = log_policy(policy, candidates, wide) - log_policy(old, candidates, wide)
        advantage = p_norm_advantages(extra["rewards"], self.p)
        known = log_ratio.detach()
        return neighbor_grpo_loss(log_ratio, advantage, self.clip), {
            "ratio": known.exp().mean((1, 2)),
            "kl": (known.exp() - 1 - known).mean((1, 2)),
        }
