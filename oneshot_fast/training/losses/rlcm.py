"""RLCM: proximal policy optimisation of stochastic samples, with advantages within a prompt.

    L = mean max(-A rho, -A clip(rho, 1 +- clip)),   A = (r - mean r) / std r,   rho = p(a)/p_old(a)

RL for Consistency Models (Oertell et al. 2024, arXiv 2404.03673) with the loss of PPO (Schulman et
al. 2017, arXiv 1707.06347): p is that of a step that noises its clean latents anew. The last step's
noise never enters the image, so that it is left out. A single step has no other: there the action
is a = x0 + std z, K of them around one clean latent, as for PSO (pso.py). p_old is the policy that
was sampled: with one update for a rollout rho is 1, and the gradient is the policy gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from oneshot_fast.training.losses.preference import Extra, Found, advantages


def ppo_loss(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Of each action, the shape of both arguments."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


@dataclass(frozen=True)
class RLCM:
    """On log-probabilities [G, K, S] of S steps, and the samples' "rewards" [G, K] in ``extra``.

    Attributes:
        clip: Of the ratio.
    """

    clip: float = 0.2
    measures = ("ratio", "clipped", "kl")

    def __call__(self, policy: Tensor, base: Tensor, extra: Extra) -> Found:
        """See ``Objective``."""
        log_ratio = policy - extra.get("old", policy.detach())
        gain = advantages(extra["rewards"])[:, :, None]
        known = log_ratio.detach()
        return ppo_loss(log_ratio, gain, self.clip).mean((1, 2)), {
            "ratio": known.exp().mean((1, 2)),
            "clipped": ((known.exp() - 1).abs() > self.clip).float().mean((1, 2)),
            "kl": (known.exp() - 1 - known).mean((1, 2)),
        }
