"""What a step learns from, and the order of the examples.

All randomness is a function of the seed and the step, so that a state needs no random state.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.generators.base import Conditioning
from oneshot_fast.runtime.seeds import derived_seed


@dataclass(frozen=True)
class Rows:
    """Noises, their prompts, and what one part of a loss needs beside them.

    Attributes:
        noise: [B, C, h, w] float32.
        conditioning: Of B prompts.
        extra: By name, B values each: tensors [B, ...] or lists.
        share: The part of its batch's rows that these are, where the batch was split.
    """

    noise: Tensor
    conditioning: Conditioning
    extra: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0

    def __len__(self) -> int:
        """B."""
        return len(self.noise)

    def select(self, rows: slice) -> "Rows":
        """These rows alone."""
        noise, conditioning = self.noise[rows], self.conditioning.select(rows)
        extra = {name: value[rows] for name, value in self.extra.items()}
        return Rows(noise, conditioning, extra, self.share * len(noise) / len(self))


class Batch(dict[str, Rows]):
    """Groups of rows, none empty, named as the parts of the loss that read them."""

    _share = 1.0  # of the rows of all groups

    @property
    def size(self) -> int:
        """Rows of all groups."""
        return sum(map(len, self.values()))

    def share(self, part: str) -> float:
        """How much of its value on the whole batch a part of the loss has here, as it is a mean.

        A part without a group of its name is a mean over all rows.
        """
        return self[part].share if part in self else self._share

    def split(self, parts: int) -> list["Batch"]:
        """At most ``parts`` batches, each with a part of every group that has enough rows."""
        if parts == 1:
            return [self]
        pieces = []
        for k in range(parts):
            groups = {name: rows.select(_part(len(rows), k, parts)) for name, rows in self.items()}
            piece = Batch({name: rows for name, rows in groups.items() if len(rows)})
            piece._share = self._share * piece.size / self.size
            pieces.append(piece)
        return [piece for piece in pieces if piece]


def _part(count: int, k: int, parts: int) -> slice:
    """The k-th of ``parts`` nearly equal parts, the larger ones first."""
    size, more = divmod(count, parts)
    start = k * size + min(k, more)
    return slice(start, start + size + (k < more))


def batches(count: int, batch_size: int, seed: int, start: int, end: int) -> Iterator[list[int]]:
    """Positions of the examples of steps ``start`` to ``end``; each epoch is a permutation."""
    per_epoch = math.ceil(count / batch_size)
    for step in range(start, end):
        epoch, k = divmod(step, per_epoch)
        draw = torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch))
        order = torch.randperm(count, generator=draw)
        yield order[k * batch_size : (k + 1) * batch_size].tolist()
