"""REBEL: the differences of log-ratios are regressed on the differences of rewards.

    L = mean over pairs (eta [(lp_1 - lp_1,old) - (lp_2 - lp_2,old)] - (A_1 - A_2))^2

Gao et al. 2024, arXiv 2404.16767: no clip, no value, no reference; lp_old is of the policy that was
sampled. Over all pairs of a group of K it is twice the variance of eta (lp - lp_old) - A. What has
no bound but the reward runs away: weigh the distance to the base against it (``kl_weight``).
"""

from dataclasses import dataclass

from torch import Tensor

from oneshot_fast.training.losses.preference import Extra, Found, advantages


def rebel_loss(log_ratio: Tensor, advantage: Tensor, eta: float) -> Tensor:
    """Mean over all pairs of each group: [..., K] both -> [...]."""
    return 2 * (eta * log_ratio - advantage).var(-1)


@dataclass(frozen=True)
class REBEL:
    """On log-probabilities [G, K, S], summed over S steps, and "rewards" [G, K] in ``extra``.

    Attributes:
        eta: Per nat.
        scale: Factor of the log-ratios; 1 / D for the original's means.
    """

    eta: float = 1.0
    scale: float = 1.0
    measures = ()

    def __call__(self, policy: Tensor, base: Tensor, extra: Extra) -> Found:
        """See ``Objective``."""
        log_ratio = self.scale * (policy - extra.get("old", policy.detach())).sum(2)
        return rebel_loss(log_ratio, advantages(extra["rewards"]), self.eta), {}
