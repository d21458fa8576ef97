"""REBEL: the differences of log-ratios are regressed on the differences of rewards.

    L = mean over pairs (eta [(lp_1 - lp_1,old) - (lp_2 - lp_2,old)] - (A_1 - A_2))^2

Gao et al. 2024, arXiv 2404.16767: no clip, no value, no reference; lp_old is of the policy that was
sampled. Over all pairs of a group of K it is twice the variance of eta (lp - lp_old) - A. What has
no bound but the reward runs away, so that the squared distance to the base is weighed against it.
"""

from dataclasses import dataclass

from torch import Tensor

from oneshot_fast.training.losses.preference import Extra, Found, advantages, log_prob


def rebel_loss(log_ratio: Tensor, advantage: Tensor, eta: float) -> Tensor:
    """Mean over all pairs of each group: [..., K] both -> [...]."""
    return 2 * (eta * log_ratio - advantage).var(-1)


@dataclass(frozen=True)
class REBEL:
    """On actions around one clean latent, see rlcm.py.

    ``extra`` has "actions" [G, 1, K, C, h, w] and their "rewards" [G, K].

    Attributes:
        std: Of the action noise, in deviations of the latents.
        eta: Per nat.
        kl_weight: Of the squared distance of the clean latents to the base's.
    """

    std: float = 0.3
    eta: float = 1.0
    kl_weight: float = 1.0
    measures = ("kl",)

    def __call__(self, x0: Tensor, base: Tensor, extra: Extra) -> Found:
        """See ``Objective``."""
        now = log_prob(extra["actions"], x0[:, :, None], self.std).flatten(1)
        loss = rebel_loss(now - now.detach(), advantages(extra["rewards"]), self.eta)
        held = (x0 - base).square().flatten(1).mean(1)
        return loss + self.kl_weight * held, {"kl": held.detach() / (2 * self.std**2)}
