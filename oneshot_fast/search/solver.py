"""Batches of targets in, their assignments out; smaller batches where memory runs out."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.jobs.assign.objective import objective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.targets import Target, problem_of
from oneshot_fast.search.gradient import Assignment, Search

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator


@dataclass(frozen=True)
class Solved:
    """What was found for one target; tensors are on the CPU.

    Attributes:
        target: The target.
        z: Best noise, [C, h, w] float32.
        q: Its rotation, [D, D] or [G, G, D, D] float32; None for methods without one.
        losses: Loss at every step.
        best_step: Where it was lowest.
    """

    target: Target
    z: Tensor
    q: Tensor | None
    losses: list[float]
    best_step: int

    @property
    def nfe(self) -> int:
        """Generator evaluations: a forward per candidate and loss; each backward counts two."""
        return self.target.candidates + 3 * len(self.losses) - 2


class Solver:
    """Runs the searches of a data set on the device."""

    def __init__(
        self,
        generator: Generator,
        options: AssignOptions,
        batch_size: int,
        on_evaluations: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Bind what all targets share.

        Args:
            generator: Its weights stay fixed.
            options: How a noise is searched.
            batch_size: TargetImages on the device at once; halved where memory runs out.
            on_evaluations: Called with how many evaluations, over all targets, were done.
        """
        self.generator, self.options, self.batch_size = generator, options, batch_size
        self.on_evaluations = on_evaluations

    def solve(self, batches: Iterable[Sequence[Target]]) -> Iterator[list[Solved]]:
        """Assignments, a list per batch or, where targets stop early, as they finish.

        Raises:
            UserError: If not even one target fits into memory.
        """
        if self.options.stops_early:
            yield from _Slots(self, iter(batches)).run()
        else:
            for batch in batches:
                yield self._solve_batch(batch)

    def start(self, targets: Sequence[Target]) -> Search:
        """Searches for ``targets``."""
        function = functools.partial(objective, self.generator, self.options)
        return Search(problem_of(targets), self.options, function)

    def _solve_batch(self, batch: Sequence[Target]) -> list[Solved]:
        """All targets of the batch, every one to its last step."""
        found: list[Solved] = []
        while len(found) < len(batch):
            part = batch[len(found) : len(found) + self.batch_size]
            result = self._search(part)
            if result is None:
                self.halve(len(part))
            else:
                found += solved(part, result)
        return found

    def _search(self, targets: Sequence[Target]) -> Assignment | None:
        """All steps for ``targets`` at once; None if memory ran out, and then all is freed."""
        done = 0
        try:
            search = self.start(targets)
            for step in range(self.options.gradient_steps + 1):
                search.advance(is_last=step == self.options.gradient_steps)
                done += len(targets)
                self.on_evaluations(len(targets))
            return search.result()
        except torch.OutOfMemoryError:
            self.on_evaluations(-done)
            return None

    def halve(self, size: int) -> None:
        """Use batches of half of ``size``, which did not fit.

        Raises:
            UserError: If ``size`` is 1.
        """
        if size == 1:
            raise UserError(
                "out of memory with a single target; use a smaller --dtype or --resolution, "
                "or, where images are decoded, --decoder_checkpointing, --decoder_tiling or "
                "--decoder_id"
            )
        self.batch_size = (size + 1) // 2
        print(
            f"warning: out of memory with {size} targets at once; going on with "
            f"{self.batch_size} (--batch_size {self.batch_size} avoids the attempt)",
            file=sys.stderr,
        )
        if self.generator.device.type == "cuda":
            torch.cuda.empty_cache()


class _Slots:
    """Places on the device, each of which goes to the next target once its own has finished."""

    def __init__(self, solver: Solver, arriving: Iterator[Sequence[Target]]) -> None:
        self._solver, self._arriving = solver, arriving
        self._waiting: deque[Target] = deque()
        self._slots: list[Target | None] = []  # a place per row of the search; None: free
        self._search: Search | None = None
        # a look at the device makes the host wait for it; on the CPU it costs nothing
        self._check_every = 1 if solver.generator.device.type == "cpu" else 4

    def run(self) -> Iterator[list[Solved]]:
        while (search := self._fill()) is not None:
            for _ in range(self._check_every):
                self._advance(search)
            yield self._collect(search)

    def _fill(self) -> Search | None:
        """Put the next targets into free slots; None if no search is left."""
        if self._search is None:
            self._slots = [*self._next(self._solver.batch_size)]
            if self._slots:
                self._search = self._solver.start([t for t in self._slots if t is not None])
            return self._search
        free = [k for k, target in enumerate(self._slots) if target is None]
        new = self._next(len(free))
        if new:
            self._search.place(free[: len(new)], problem_of(new))
            for k, target in zip(free, new, strict=False):
                self._slots[k] = target
        used = [k for k, target in enumerate(self._slots) if target is not None]
        # compiled code is for one batch size, so there the empty slots stay
        if 0 < len(used) < len(self._slots) and not self._solver.generator.is_compiled:
            self._search.keep(used)
            self._slots = [self._slots[k] for k in used]
        return self._search if used else None

    def _next(self, count: int) -> list[Target]:
        """The next ``count`` targets, or all that are left."""
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
        given_up = [target for target in self._slots[keep:] if target is not None]
        self._waiting.extendleft(reversed(given_up))
        self._slots = self._slots[:keep]

    def _collect(self, search: Search) -> list[Solved]:
        """Results of the targets that have finished; their slots are free again."""
        running = search.running.tolist()
        targets = {
            k: target
            for k, target in enumerate(self._slots)
            if target is not None and not running[k]
        }
        if not targets:
            return []
        for k in targets:
            self._slots[k] = None
        self._solver.on_evaluations(len(targets) * (self._solver.options.gradient_steps + 1))
        return solved(list(targets.values()), search.result(list(targets)))


def solved(targets: Sequence[Target], result: Assignment) -> list[Solved]:
    """The rows of ``result``, a row per target, on the CPU; waits for the device."""
    z, losses = result.z.cpu(), result.losses.T.tolist()
    q = None if result.q is None else result.q.cpu()
    rows = zip(targets, losses, result.best_step.tolist(), result.last_step.tolist(), strict=True)
    return [
        Solved(target, z[k], None if q is None else q[k], curve[: last + 1], best)
        for k, (target, curve, best, last) in enumerate(rows)
    ]
