"""What objectives on preferences share: a loss over groups of images of one prompt.

A row of a batch is a group: N noises [N, C, h, w] of one prompt, evaluated with a gradient by the
policy and without one by the base generator, and in ``extra`` what was drawn and scored around
them. Log-probabilities are float32 sums over the D elements of a latent, in nats.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from oneshot_fast.generators.base import Generator
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.losses.preserve import Preserve
from oneshot_fast.training.reference import Reference

Extra = Mapping[str, Any]
Found = tuple[Tensor, dict[str, Tensor]]  # a loss [G], and what else is told of each group, [G]
SAMPLED = ("sampled", "sampled max", "ties", "moved")  # measures of every objective


class Objective(Protocol):
    """What is lowered on G groups.

    Attributes:
        measures: Names of what it tells besides.
    """

    @property
    def measures(self) -> tuple[str, ...]: ...

    def __call__(self, x0: Tensor, base: Tensor, extra: Extra) -> Found:
        """Loss and measures of each group; a mean over groups is that of the batch.

        Args:
            x0: The policy's clean latents, [G, N, C, h, w].
            base: The base generator's of the same noises, without gradient.
            extra: Of the groups, [G, ...] by name.
        """


class PreferenceLoss:
    """An objective on the group "preference", and the preserve losses."""

    parts = ("preference", "preserve")

    def __init__(self, objective: Objective, preserve: Preserve) -> None:
        """Lower both; ``reference`` has to be set before the first call."""
        self.objective, self.preserve = objective, preserve
        self.reference: Reference | None = None
        self.measures = (*objective.measures, *SAMPLED)

    def __call__(self, model: Generator, batch: Batch) -> dict[str, Tensor]:
        """See ``Loss``."""
        found: dict[str, Tensor] = {}
        if "preference" in batch:
            rows = batch["preference"]
            loss, measures = self._preference(model, rows)
            # they are means over the groups, as the loss
            told = {k: v.mean() * rows.share / batch.share(k) for k, v in measures.items()}
            found |= {"preference": loss.mean(), **told}
        if "preserve" in batch:
            rows = batch["preserve"]
            made = model.predict(rows.noise, rows.conditioning)
            found["preserve"] = self.preserve(model, made, rows)
        return found

    def _preference(self, model: Generator, rows: Rows) -> Found:
        assert self.reference is not None
        groups, count = rows.noise.shape[:2]
        noise = rows.noise.flatten(0, 1)
        told = rows.conditioning.select(torch.arange(groups).repeat_interleave(count))
        base = self.reference.latents(noise, told).view_as(rows.noise)
        x0 = model.latents(noise, told).view_as(rows.noise)
        loss, measures = self.objective(x0, base, rows.extra)
        return loss, measures | {
            "sampled": of_group(rows.extra["rewards"], torch.mean),
            "sampled max": of_group(rows.extra["rewards"], torch.max),
            "ties": rows.extra["ties"],
            "moved": (x0.detach() - base).square().flatten(1).mean(1).sqrt(),
        }


def log_prob(action: Tensor, mean: Tensor, std: float) -> Tensor:
    """Logarithm of N(action; mean, std^2) without constants: -|action - mean|^2 / (2 std^2).

    Args:
        action: [..., C, h, w], taken as given; the result, in nats, is [...].
        mean: Broadcasts to it.
        std: Above 0.

    Raises:
        ValueError: If ``std`` is not positive: a deterministic step has no likelihood.
    """
    if not std > 0:
        raise ValueError(f"std is {std}: a step without noise has no likelihood")
    return -(action.detach().float() - mean.float()).square().flatten(-3).sum(-1) / (2 * std**2)


def preferences(rewards: Tensor) -> Tensor:
    """Of pairs [..., 2]: +1 where the first is better, -1 where the second is, 0 for ties.

    A reward that is not finite makes a tie.
    """
    first, second = rewards.unbind(-1)
    return (first - second).sign().nan_to_num(0.0) * rewards.isfinite().all(-1)


def advantages(rewards: Tensor, largest: float = 10.0) -> Tensor:
    """(r - mean) / (std + 1e-6) within each group [..., K], clamped; 0 where r is not finite."""
    good = rewards.isfinite()
    count = good.sum(-1, keepdim=True).clamp(min=1)
    known = rewards.where(good, torch.zeros_like(rewards))
    centred = (known - known.sum(-1, keepdim=True) / count) * good
    std = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    return (centred / (std + 1e-6)).clamp(-largest, largest)


def of_group(rewards: Tensor, reduce: Any) -> Tensor:
    """Mean or max [G] of the finite rewards [G, K]; 0 of none."""
    rows: Sequence[Tensor] = [row[row.isfinite()] for row in rewards]
    return torch.stack([reduce(row) if len(row) else row.new_zeros(()) for row in rows])
