"""Batches of whatever is searched in, what was found out; smaller batches where memory runs out."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.runtime.ledger import say
from oneshot_fast.search.gradient import Search
from oneshot_fast.search.options import SearchOptions
from oneshot_fast.search.problem import Assignment


class Indexed(Protocol):
    """What is searched for: a target, a prompt."""

    @property
    def index(self) -> int:
        """Its place in the run."""


Item = TypeVar("Item", bound=Indexed)


@dataclass(frozen=True)
class Solved(Generic[Item]):
    """A row of ``Assignment``, on the CPU, with curves up to the last step of its own search."""

    item: Item
    z: Tensor
    q: Tensor | None
    losses: list[float]
    best_step: int
    scores: Mapping[str, list[float]] = field(default_factory=dict)
    best_image: Tensor | None = None
    images: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def index(self) -> int:
        """The item's place in the run."""
        return self.item.index

    @property
    def is_finite(self) -> bool:
        """Whether no loss was NaN or infinite."""
        return all(map(math.isfinite, self.losses))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is kept: "z", and "q" where there is one."""
        return {"z": self.z} if self.q is None else {"z": self.z, "q": self.q}


@dataclass
class Solver(Generic[Item]):
    """Runs the searches of many items on the device.

    Attributes:
        start: Starts the searches of some items, all on the device.
        options: Those of these searches.
        batch_size: Items on the device at once; halved where memory runs out.
        fixed_size: Whether a batch that became smaller costs more than its empty rows.
        of: What an item is called where memory runs out.
        advice: What to do if not even one fits.
        on_evaluations: Called with how many evaluations, over all items, were done.
    """

    start: Callable[[Sequence[Item]], Search]
    options: SearchOptions
    batch_size: int
    fixed_size: bool = False
    of: str = "target"
    advice: str = "use a smaller --resolution"
    on_evaluations: Callable[[int], object] = lambda count: None

    def solve(self, batches: Iterable[Sequence[Item]]) -> Iterator[list[Solved[Item]]]:
        """What was found, a list per batch or, where searches stop early, as they finish.

        Raises:
            UserError: If not even one item fits into memory.
        """
        if self.options.stops_early:
            yield from _Slots(self, iter(batches)).run()
        else:
            for batch in batches:
                yield self._solve_batch(batch)

    def _solve_batch(self, batch: Sequence[Item]) -> list[Solved[Item]]:
        """All items of the batch, every one to its last step."""
        found: list[Solved[Item]] = []
        while len(found) < len(batch):
            part = batch[len(found) : len(found) + self.batch_size]
            result = self._search(part)
            if result is None:
                self.halve(len(part))
            else:
                found += solved(part, result)
        return found

    def _search(self, items: Sequence[Item]) -> Assignment | None:
        """All steps for ``items`` at once; None if memory ran out, and then all is freed."""
        done = 0

        def count(loss: Tensor) -> None:
            nonlocal done
            done += len(items)
            self.on_evaluations(len(items))

        try:
            return self.start(items).run(count)
        except torch.OutOfMemoryError:
            self.on_evaluations(-done)
            return None

    def halve(self, size: int) -> None:
        """Use batches of half of ``size``, which did not fit.

        Raises:
            UserError: If ``size`` is 1.
        """
        if size == 1:
            raise UserError(f"out of memory with a single {self.of}; {self.advice}")
        self.batch_size = (size + 1) // 2
        say(
            f"warning: out of memory with {size} {self.of}s at once; going on with "
            f"{self.batch_size} (--batch_size {self.batch_size} avoids the attempt)"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Slots(Generic[Item]):
    """Places on the device, each of which goes to the next item once its own has finished."""

    def __init__(self, solver: Solver[Item], arriving: Iterator[Sequence[Item]]) -> None:
        self._solver, self._arriving = solver, arriving
        self._waiting: deque[Item] = deque()
        self._slots: list[Item | None] = []  # a place per row of the search; None: free
        self._search: Search | None = None

    def run(self) -> Iterator[list[Solved[Item]]]:
        while (search := self._fill()) is not None:
            # a look at the device makes the host wait for it; on the CPU it costs nothing
            for _ in range(1 if search.device.type == "cpu" else 4):
                self._advance(search)
            yield self._collect(search)

    def _fill(self) -> Search | None:
        """Put the next items into free slots; None if no search is left."""
        if self._search is None:
            first = self._next(self._solver.batch_size)
            self._slots = [*first]
            self._search = self._solver.start(first) if first else None
            return self._search
        free = [k for k, item in enumerate(self._slots) if item is None]
        new = self._next(len(free))
        if new:
            self._search.place(free[: len(new)], self._solver.start(new))
            for k, item in zip(free, new, strict=False):
                self._slots[k] = item
        used = [k for k, item in enumerate(self._slots) if item is not None]
        if 0 < len(used) < len(self._slots) and not self._solver.fixed_size:
            self._search.keep(used)
            self._slots = [self._slots[k] for k in used]
        return self._search if used else None

    def _next(self, count: int) -> list[Item]:
        """The next ``count`` items, or all that are left."""
        while len(self._waiting) < count and (batch := next(self._arriving, None)) is not None:
            self._waiting.extend(batch)
        return [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]

    def _advance(self, search: Search) -> None:
        size = len(self._slots)
        try:
            search.advance()
            return
        except torch.OutOfMemoryError:
            pass
        self._solver.halve(size)
        keep = self._solver.batch_size
        search.keep(range(keep))
        given_up = [item for item in self._slots[keep:] if item is not None]
        self._waiting.extendleft(reversed(given_up))
        self._slots = self._slots[:keep]

    def _collect(self, search: Search) -> list[Solved[Item]]:
        """Results of the items that have finished; their slots are free again."""
        running = search.running.tolist()
        items = {
            k: item for k, item in enumerate(self._slots) if item is not None and not running[k]
        }
        if not items:
            return []
        for k in items:
            self._slots[k] = None
        self._solver.on_evaluations(len(items) * (search.steps + 1))
        return solved(list(items.values()), search.result(list(items)))


def solved(items: Sequence[Item], result: Assignment) -> list[Solved[Item]]:
    """The rows of ``result``, a row per item, on the CPU; waits for the device."""
    z, losses = result.z.cpu(), result.losses.T.tolist()
    q = None if result.q is None else result.q.cpu()
    scores = {name: values.T.tolist() for name, values in result.scores.items()}
    best = None if result.best_images is None else result.best_images.cpu()
    images = {step: batch.cpu() for step, batch in result.images.items()}
    ends, best_steps = result.last_step.tolist(), result.best_step.tolist()
    return [
        Solved(
            item,
            z[k],
            None if q is None else q[k],
            losses[k][: ends[k] + 1],
            best_steps[k],
            {name: values[k][: ends[k] + 1] for name, values in scores.items()},
            None if best is None else best[k],
            {step: batch[k] for step, batch in images.items() if step <= ends[k]},
        )
        for k, item in enumerate(items)
    ]


def in_order(parts: Iterable[Sequence[Solved[Item]]]) -> list[Solved[Item]]:
    """All results, by their items' places."""
    return sorted((one for part in parts for one in part), key=lambda one: one.index)


def stacked(found: Sequence[Solved[Item]]) -> Assignment:
    """One result of all rows of ``found``, the opposite of ``solved``; on the CPU."""

    def curves(rows: Sequence[list[float]]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows])

    steps = torch.tensor([one.best_step for one in found])
    losses = curves([one.losses for one in found])
    images = [one.best_image for one in found if one.best_image is not None]
    q = [one.q for one in found if one.q is not None]
    return Assignment(
        torch.stack([one.z for one in found]),
        torch.stack(q) if q else None,
        losses,
        losses.gather(0, steps[None])[0],
        steps,
        torch.tensor([len(one.losses) - 1 for one in found]),
        {name: curves([one.scores[name] for one in found]) for name in found[0].scores},
        torch.stack(images) if images else None,
    )
