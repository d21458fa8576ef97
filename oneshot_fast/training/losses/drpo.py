"""DrPO: samples drift, in features, towards the better ones of their group and away from the worse.

    L = mean |X/u - sg(X/u + F)|^2,   u = mean distance / sqrt(features)

F is an attraction to positives and a repulsion from negatives (arXiv 2606.02521): with the weighted
affinities A_ij = w_j sqrt(softmax_j softmax_i) of -distance / (scale radius), over Y = [X, Y-, Y+],

    F_i = sum_j c_ij (y_j - x_i) / u,   c_ij = A_ij (sum of A_i over negatives)   for positives
                                        c_ij = -A_ij (sum of A_i over positives)  for all others

each divided by its RMS over the group, summed over radii. A second such term may draw the policy to
what the base makes of the same noises. Only the order of the rewards is used, and the loss's value
says nothing of progress, since every F is normalised: look at the reward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oneshot_fast.training.losses.preference import Extra, Found

RADII = (0.02, 0.05, 0.2)
_FAR = 100.0  # logit of a sample with itself, per radius
_FLOOR = 1e-6  # of the product of the two softmaxes
_SMALLEST = 1e-3  # scale
_NEAREST = 1e-4  # distance


def drift_loss(
    x: Tensor,
    positive: Tensor,
    negative: Tensor,
    weights: tuple[Tensor | float, Tensor | float] = (3000.0, 3000.0),
    radii: Sequence[float] = RADII,
    negative_is_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss and the scale of distances, [G] each.

    Args:
        x: Features of the policy's samples, [G, K, F].
        positive: What they are drawn to, [G, P, F].
        negative: What they are pushed from, [G, N, F].
        weights: Of positives and negatives, numbers or [G, P], [G, N].
        radii: Of the affinities, in units of the scale.
        negative_is_self: The negatives are the samples themselves, in their order: no sample is
            pushed from itself.
    """
    (groups, count, size), new = x.shape, x.detach()
    known = torch.cat((new, negative.detach(), positive.detach()), 1)
    many, few = negative.shape[1], positive.shape[1]
    ones = x.new_ones(groups, count)
    of = (ones, _rows(weights[1], ones, many), _rows(weights[0], ones, few))
    weight = torch.cat(of, 1)[:, None]
    # around their mean, where products of matrices lose little
    middle = known.mean(1, keepdim=True)
    distance = torch.cdist(new - middle, known - middle, compute_mode="use_mm_for_euclid_dist")
    distance = distance.clamp(min=_NEAREST)
    scale = ((distance * weight).mean((1, 2)) / weight.mean((1, 2))).clamp(min=_SMALLEST)
    unit = (scale / size**0.5)[:, None, None]
    itself = torch.zeros_like(distance[:1], dtype=torch.bool)
    for start in (0, count) if negative_is_self else (0,):
        itself[0, :, start : start + count].fill_diagonal_(True)
    force = torch.zeros_like(new)
    for radius in radii:
        logits = -distance / (scale[:, None, None] * radius)
        logits = logits.masked_fill(itself, -_FAR / radius)
        affinity = (logits.softmax(2) * logits.softmax(1)).clamp(min=_FLOOR).sqrt() * weight
        away, towards = affinity.split((count + many, few), 2)
        pull = towards * away.sum(2, keepdim=True)
        push = -away * towards.sum(2, keepdim=True)
        # sum_j c_ij (y_j - x_i): the coefficients of a row add up to zero but for rounding
        along = torch.cat((push, pull), 2)
        one = (along @ known - along.sum(2, keepdim=True) * new) / unit
        force = force + one / one.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
    goal = (new / unit + force).detach()
    return (x / unit - goal).square().mean((1, 2)), scale


def _rows(weight: Tensor | float, like: Tensor, count: int) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    return like.new_full((len(like), count), weight)


@dataclass(frozen=True)
class DrPO:
    """On the clean latents [G, K, C, h, w] of a group, and their "rewards" [G, K] in ``extra``.

    Attributes:
        features: [B, F] of clean latents [B, C, h, w], differentiable.
        positives: How many of the best draw; as many of the worst push.
        reference_weight: Of the term that draws to the base's samples.
    """

    features: Callable[[Tensor], Tensor]
    positives: int = 8
    reference_weight: float = 0.0
    measures = ()

    def __call__(self, policy: Tensor, base: Tensor, extra: Extra) -> Found:
        """See ``Objective``."""
        x = self._features(policy)
        rewards = extra["rewards"]
        good = rewards.isfinite()
        order = rewards.where(good, rewards.new_tensor(-torch.inf)).argsort(1, descending=True)
        ranked = x.detach().gather(1, order[:, :, None].expand_as(x))
        count, n = good.sum(1), self.positives
        # of K finite ones the first n and the last n; those that are not lie behind them
        first = torch.arange(n, device=x.device)
        last = (count[:, None] - 1 - first).clamp(min=0)
        negative = ranked.gather(1, last[:, :, None].expand(-1, -1, x.shape[2]))
        there = (first < (count // 2)[:, None]).to(x.dtype) * 3000.0
        loss, _ = drift_loss(x, ranked[:, :n], negative, (there, there))
        told = (count > 1) & (extra["ties"] < 1)
        loss = loss * told
        if self.reference_weight:
            kept = self._features(base)
            held, _ = drift_loss(x, kept, x.detach(), negative_is_self=True)
            loss = loss + self.reference_weight * held
        return loss, {}

    def _features(self, latents: Tensor) -> Tensor:
        """[G, K, F] of [G, K, C, h, w]."""
        return self.features(latents.flatten(0, 1)).view(*latents.shape[:2], -1)
