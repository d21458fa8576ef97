"""RLCM: proximal policy optimisation of stochastic samples, with advantages within a prompt.

    L = mean max(-A rho, -A clip(rho, 1 +- clip)),   A = (r - mean r) / std r,   rho = p(a)/p_old(a)

RL for Consistency Models (Oertell et al. 2024, arXiv 2404.03673) with the loss of PPO (Schulman et
al. 2017, arXiv 1707.06347): p is that of a step that noises its clean latents anew. The last step's
noise never enters the image, so that it is left out. A single step has no other: there the action
is a = x0 + std z, K of them around one clean latent, as for PSO (pso.py). p_old is the policy that
was sampled, which rho differs from after the first update of a rollout only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from oneshot_fast.training.losses.preference import Extra, Found, advantages, log_prob


def ppo_loss(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Of each action, the shape of both arguments."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


@dataclass(frozen=True)
class RLCM:
    """On actions around one clean latent.

    ``extra`` has "actions" [G, 1, K, C, h, w] and their "rewards" [G, K].

    Attributes:
        std: Of the action noise, in deviations of the latents.
        clip: Of the ratio.
        kl_weight: Of the squared distance of the clean latents to the base's.
    """

    std: float = 0.3
    clip: float = 0.2
    kl_weight: float = 0.0
    measures = ("ratio", "kl")

    def __call__(self, x0: Tensor, base: Tensor, extra: Extra) -> Found:
        """See ``Objective``."""
        now = log_prob(extra["actions"], x0[:, :, None], self.std).flatten(1)
        log_ratio = now - now.detach()  # the rollout is of these weights
        loss = ppo_loss(log_ratio, advantages(extra["rewards"]), self.clip).mean(1)
        held = (x0 - base).square().flatten(1).mean(1)
        known = log_ratio.detach()
        return loss + self.kl_weight * held, {
            "ratio": known.exp().mean(1),
            "kl": (known.exp() - 1 - known).mean(1),
        }
