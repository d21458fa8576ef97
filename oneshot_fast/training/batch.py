"""What a step learns from, and the order of the examples.

All randomness is a function of the seed and the step, so that a state needs no random state.
"""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.generators.base import Conditioning
from oneshot_fast.runtime.seeds import derived_seed

_BLOCK = 64  # neighbours that stay together, as they lie in one file
_BUFFER = 1 << 16  # examples that are mixed


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

    _first = ""  # group of the batch that this is a part of

    @property
    def size(self) -> int:
        """Rows of all groups."""
        return sum(map(len, self.values()))

    def share(self, part: str) -> float:
        """How much of its value on the whole batch a part of the loss has here, as it is a mean.

        A part without a group of its name is a mean over the rows of the first one.
        """
        rows = self.get(part) or self.get(self._first or next(iter(self)))
        return rows.share if rows is not None else 0.0

    def of_process(self, k: int, count: int) -> "Batch":
        """The part of the k-th of ``count`` processes, with a row of every group.

        All have to evaluate alike: where the rows do not suffice, it is one that counts nothing.
        """
        if count == 1:
            return self
        groups = {name: rows.select(_part(len(rows), k, count)) for name, rows in self.items()}
        for name, rows in groups.items():
            if not len(rows):
                groups[name] = replace(self[name].select(slice(1)), share=0.0)
        return self._piece(groups)

    def split(self, parts: int) -> list["Batch"]:
        """At most ``parts`` batches, each with a part of every group that has enough rows."""
        if parts == 1:
            return [self]
        pieces = []
        for k in range(parts):
            groups = {name: rows.select(_part(len(rows), k, parts)) for name, rows in self.items()}
            pieces.append(self._piece({name: rows for name, rows in groups.items() if len(rows)}))
        return [piece for piece in pieces if piece]

    def _piece(self, groups: Mapping[str, Rows]) -> "Batch":
        piece = Batch(groups)
        piece._first = self._first or next(iter(self))
        return piece


def _part(count: int, k: int, parts: int) -> slice:
    """The k-th of ``parts`` nearly equal parts, the larger ones first."""
    size, more = divmod(count, parts)
    start = k * size + min(k, more)
    return slice(start, start + size + (k < more))


def in_order(kinds: Sequence[Hashable], batch_size: int) -> Iterator[list[int]]:
    """Positions of examples of these kinds as they come, in batches that have one kind each."""
    places = range(len(kinds))
    lists = (places[k : k + _BUFFER] for k in places[::_BUFFER])
    return itertools.chain.from_iterable(_batches(lists, kinds, batch_size))


def steps_per_epoch(kinds: Sequence[Hashable], batch_size: int) -> int:
    """Batches of an epoch over examples of these kinds, none of which has two."""
    return sum(math.ceil(count / batch_size) for count in Counter(kinds).values())


def batches(
    kinds: Sequence[Hashable], batch_size: int, seed: int, start: int, end: int
) -> Iterator[list[int]]:
    """Positions of the examples of steps ``start`` to ``end``; each epoch has every one once.

    No batch has examples of two ``kinds``, such as sizes of images. The order is drawn: of up to
    65,536 examples all orders are as likely; of more, blocks of 64 neighbours are drawn, and
    1,024 blocks at a time are mixed, so that neither time nor memory grows with them.
    """
    epoch, first = divmod(start, steps_per_epoch(kinds, batch_size))
    made = itertools.chain.from_iterable(
        _epoch(kinds, batch_size, derived_seed(seed, "epoch", k)) for k in itertools.count(epoch)
    )
    return itertools.islice(made, first, first + end - start)


def _epoch(kinds: Sequence[Hashable], batch_size: int, seed: int) -> Iterator[list[int]]:
    """All batches of an epoch, those of the different kinds in one drawn order."""
    draw = torch.Generator().manual_seed(seed)
    for made in _batches(_shuffled(len(kinds), draw), kinds, batch_size):
        several = len({kinds[rows[0]] for rows in made}) > 1
        order = torch.randperm(len(made), generator=draw).tolist() if several else range(len(made))
        yield from (made[k] for k in order)


def _shuffled(count: int, draw: torch.Generator) -> Iterator[list[int]]:
    """All positions, in lists of those that are mixed."""
    blocks = torch.arange(math.ceil(count / _BLOCK))
    if count > _BUFFER:
        blocks = blocks[torch.randperm(len(blocks), generator=draw)]
    for some in blocks.split(_BUFFER // _BLOCK):
        places = (_BLOCK * some[:, None] + torch.arange(_BLOCK)).flatten()
        places = places[places < count]
        yield places[torch.randperm(len(places), generator=draw)].tolist()


def _batches(
    lists: Iterable[Sequence[int]], kinds: Sequence[Hashable], batch_size: int
) -> Iterator[list[list[int]]]:
    """Of each list of positions its batches, kind by kind, the kinds as they come first.

    What fills no batch goes into the next list.
    """
    left, rest = len(kinds), list[int]()
    for places in lists:
        left -= len(places)
        groups = dict[Hashable, list[int]]()
        for place in (*rest, *places):
            groups.setdefault(kinds[place], []).append(place)
        made = [
            rows[k : k + batch_size] for rows in groups.values()
            for k in range(0, len(rows), batch_size)
        ]  # fmt: skip
        if left:
            rest = [place for rows in made if len(rows) < batch_size for place in rows]
        yield [rows for rows in made if not left or len(rows) == batch_size]
