"""What a step learns from, and the order of the examples.

All randomness is a function of the seed and the step, so that a state needs no random state.
"""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    @property
    def kind(self) -> tuple[object, ...]:
        """What rows of one evaluation have in common."""
        return self.noise.shape[1:], *self.conditioning.tensors()

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

    def of_process(self, k: int, count: int) -> "Batch":
        """The part of the k-th of ``count`` processes, with a row of every group.

        All have to evaluate alike: where the rows do not suffice, it is one that counts nothing.
        """
        if count == 1:
            return self
        groups = {name: rows.select(_part(len(rows), k, count)) for name, rows in self.items()}
        mine = sum(map(len, groups.values()))
        for name, rows in groups.items():
            if not len(rows):
                groups[name] = replace(self[name].select(slice(1)), share=0.0)
        piece = Batch(groups)
        piece._share = self._share * mine / self.size
        return piece

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


class Batches(Sequence[list[int]]):
    """Positions of examples, batch by batch, in a few tensors: there may be millions."""

    def __init__(self, kinds: Tensor, batch_size: int, order: Tensor) -> None:
        """Group the examples by kind, the kinds as they come first, and cut the groups.

        Args:
            kinds: [n] int64, the number of each example's kind.
            batch_size: Of all batches but the last of each kind.
            order: [n] int64, the positions in the order to take them in.
        """
        ordered, count = kinds[order], int(kinds.max()) + 1
        first = torch.full((count,), len(order))
        first = first.scatter_reduce(0, ordered, torch.arange(len(order)), "amin")
        rank = first.argsort().argsort()
        self._order = order[rank[ordered].argsort(stable=True)]
        sizes = ordered.bincount(minlength=count)[first.argsort()].tolist()
        ends = list(itertools.accumulate(sizes))
        cuts = [
            torch.arange(end - size, end, batch_size) for size, end in zip(sizes, ends, strict=True)
        ]
        self._starts = torch.cat(cuts)
        self._ends = torch.cat(
            [(cut + batch_size).clamp(max=end) for cut, end in zip(cuts, ends, strict=True)]
        )

    def permuted(self, draw: torch.Generator) -> "Batches":
        """The same batches in a drawn order."""
        order = torch.randperm(len(self), generator=draw)
        self._starts, self._ends = self._starts[order], self._ends[order]
        return self

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, k: Any) -> Any:
        found: list[int] = self._order[self._starts[k] : self._ends[k]].tolist()
        return found


def in_order(kinds: Sequence[Hashable], batch_size: int) -> Batches:
    """Positions of examples of these kinds, kind by kind, in batches that have one each."""
    return Batches(_numbered(kinds), batch_size, torch.arange(len(kinds)))


def _numbered(kinds: Sequence[Hashable]) -> Tensor:
    """[n] int64: the kinds as numbers."""
    known: dict[Hashable, int] = {}
    return torch.tensor([known.setdefault(kind, len(known)) for kind in kinds])


def steps_per_epoch(kinds: Sequence[Hashable], batch_size: int) -> int:
    """Batches of an epoch over examples of these kinds, none of which has two."""
    return sum(math.ceil(count / batch_size) for count in Counter(kinds).values())


def batches(
    kinds: Sequence[Hashable], batch_size: int, seed: int, start: int, end: int
) -> Iterator[list[int]]:
    """Positions of the examples of steps ``start`` to ``end``; each epoch is a permutation.

    No batch has examples of two ``kinds``, such as sizes of images.
    """
    numbers, of = _numbered(kinds), -1
    made: Sequence[list[int]] = []
    per_epoch = steps_per_epoch(kinds, batch_size)
    for step in range(start, end):
        epoch, k = divmod(step, per_epoch)
        if epoch != of:
            made, of = _epoch(numbers, batch_size, derived_seed(seed, "epoch", epoch)), epoch
        yield made[k]


def _epoch(kinds: Tensor, batch_size: int, seed: int) -> Batches:
    """All batches of an epoch, those of the different kinds in one drawn order."""
    draw = torch.Generator().manual_seed(seed)
    made = Batches(kinds, batch_size, torch.randperm(len(kinds), generator=draw))
    return made.permuted(draw) if kinds.any() else made
