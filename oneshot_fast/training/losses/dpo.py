"""DPO of generators: the winner becomes closer, compared to the base generator, than the loser.

    L = -log sigmoid(-(beta / 2) [(l_w - l_l) - (l_w,base - l_l,base)])

Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908; DPO: Rafailov et al. 2023, arXiv 2305.18290)
takes l = mean_D (e(x_t, t) - e)^2 with the same t and noise e for winner and loser. At the first
step of a generator with zero terminal SNR inputs and targets of both are the same noise: the loss
is log 2 and its gradient 0. In clean latents, l = mean_D (x0(z) - target)^2, it is trained there,
too; with the same random z every noise is driven to the same winners, so that winner and loser each
get the noise that was assigned to them.

The one-step baseline of DrPO (arXiv 2606.02521) has no pairs but a group: with s(X, T) = -mean over
all x, t of mean_D (x - t)^2 and W and L the better and the worse half of the group itself,

    L = -log sigmoid(beta [(s(X, W) - s(X, L)) - (s(X_base, W) - s(X_base, L))]).

|x|^2 cancels: all samples are pushed along one vector, mean W - mean L, without bound.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.training.losses.preference import Extra, Found


def dpo_loss(l: Tensor, base: Tensor, beta: float, loser: float = 1.0) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Loss and logit of each pair.

    Args:
        l: Of the policy, [..., 2], winner first.
        base: Of the base generator.
        beta: Per unit of them.
        loser: Factor of the loser's part; 1 as published, less in PSO.
    """
    gap = l - base
    logit = -(beta / 2) * (gap[..., 0] - loser * gap[..., 1])
    return -F.logsigmoid(logit), logit


def group_gap(x: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    """s(X, W) - s(X, L) of each group: [G, K, ...], [G, P, ...], [G, N, ...] -> [G]."""

    def closeness(goal: Tensor) -> Tensor:
        apart = (x[:, :, None] - goal[:, None]).flatten(3).square()
        return -apart.mean((1, 2, 3))

    return closeness(better) - closeness(worse)


@dataclass(frozen=True)
class GroupDPO:
    """On the clean latents [G, K, C, h, w] of a group, and their "rewards" [G, K] in ``extra``.

    Images whose reward is not finite are left out.

    Attributes:
        beta: Per squared deviation of the latents.
    """

    beta: float = 30.0
    measures = ("preferred",)

    def __call__(self, policy: Tensor, base: Tensor, extra: Extra) -> Found:
        """See ``Objective``."""
        gaps = []
        for x, start, rewards in zip(policy, base, extra["rewards"], strict=True):
            order = rewards.argsort()
            order = order[rewards[order].isfinite()]
            half = len(order) // 2
            if half == 0:
                gaps.append(0 * x.sum())
                continue
            worse, better = (x.detach()[k][None] for k in (order[:half], order[-half:]))
            parts = (group_gap(y[order][None], better, worse) for y in (x, start))
            gaps.append((next(parts) - next(parts))[0])
        gap, told = torch.stack(gaps), extra["ties"] < 1
        return -F.logsigmoid(self.beta * gap) * told, {"preferred": (gap.detach() > 0).float()}


@dataclass(frozen=True)
class PairDPO:
    """On clean latents of the noises of a winner and a loser, [G, 2, C, h, w]; of one, [G, 1, ...].

    ``extra`` has their images' latents "targets" [G, 2, C, h, w] and the pairs' "weight" [G]; of
    several steps both are as ``NoisedPairs`` scales them.

    Attributes:
        beta: Per mean squared deviation of the latents.
        loser: Factor of the loser's part.
        winner_weight: Of the winner's own distance, which the difference alone does not lower.
    """

    beta: float = 100.0
    loser: float = 1.0
    winner_weight: float = 0.0
    measures = ("preferred", "winner", "loser")

    def __call__(self, policy: Tensor, base: Tensor, extra: Extra) -> Found:
        """See ``Objective``."""
        apart, before = ((x - extra["targets"]).square().flatten(2).mean(2) for x in (policy, base))
        loss, logit = dpo_loss(apart, before, self.beta, self.loser)
        known = apart.detach()
        loss = extra["weight"] * (loss + self.winner_weight * apart[:, 0])
        told = {"preferred": (logit.detach() > 0).float(), "winner": known[:, 0]}
        return loss, told | {"loser": known[:, 1]}
