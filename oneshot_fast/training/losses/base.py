"""What a loss is, and losses that share the one evaluation of a generator.

To add one: a ``Term`` in a file of its own, if it reads what the generator's single step makes of
some rows, else a ``Loss``. Nothing is registered: a run is given its loss.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from oneshot_fast.generators.base import Conditioning, Generator, Prediction
from oneshot_fast.training.batch import Batch, Rows


class Loss(Protocol):
    """What a step lowers.

    It may have ``measures``, names of more columns of history.jsonl: values that are not lowered.

    Attributes:
        parts: Names of its parts, the columns of history.jsonl.
    """

    @property
    def parts(self) -> tuple[str, ...]: ...

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Parts of the loss on ``batch``; the trainer adds them up.

        Args:
            model: The trainee, such as a generator.
            batch: Where a batch is split, groups without a row in this part of it are missing.

        Returns:
            Weighted scalars by part, differentiable, and by measure. Each is a mean over the rows
            of the group of its name, or else of the first; parts without rows may be missing.
        """


class Term(Protocol):
    """A part of a ``OneStepLoss``."""

    def __call__(self, generator: Generator, made: Prediction, rows: Rows) -> Tensor:
        """A weighted scalar, the mean over ``rows`` of which ``made`` is the evaluation."""


class OneStepLoss:
    """Terms of what a generator's single step makes; rows of one size are evaluated at once."""

    def __init__(self, **terms: Term) -> None:
        """Name each term as the group of rows that it reads."""
        self.terms = terms

    @property
    def parts(self) -> tuple[str, ...]:
        """The terms' names."""
        return tuple(self.terms)

    def __call__(self, model: Generator, batch: Batch) -> dict[str, Tensor]:
        """See ``Loss``."""
        alike: dict[object, list[str]] = {}
        for name, rows in batch.items():
            alike.setdefault(rows.kind, []).append(name)
        losses = dict[str, Tensor]()
        for names in alike.values():
            groups, start = [batch[name] for name in names], 0
            conditioning = Conditioning.cat([rows.conditioning for rows in groups])
            made = model.predict(torch.cat([rows.noise for rows in groups]), conditioning)
            for name, rows in zip(names, groups, strict=True):
                own = made.select(slice(start, start := start + len(rows)))
                losses[name] = self.terms[name](model, own, rows)
        return losses


def shared_losses(loss: Loss, model: Any, batch: Batch) -> dict[str, Tensor]:
    """Parts of the loss on a part of a batch, each times its share: they add up to the batch's."""
    return {name: value * batch.share(name) for name, value in loss(model, batch).items()}


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of a loss's parts, a scalar."""
    return torch.stack(list(losses.values())).sum()
