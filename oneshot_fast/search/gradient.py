"""Searches by gradients side by side: each slot of a batch holds one search at a step of its own.

A slot's moments, step, step size and best result are its own, so that a finished search can leave
its slot to another one while the rest go on. Nothing here waits for the device.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from oneshot_fast.search.movers.adam import per_row
from oneshot_fast.search.movers.mover import Mover
from oneshot_fast.search.movers.registry import mover_of
from oneshot_fast.search.options import SearchOptions
from oneshot_fast.search.problem import Assignment, Evaluation, Objective, Problem

# lr auto: the step size of a search grows while its loss falls and shrinks when it has risen
_GROWTH, _SHRINKAGE = 1.05, 0.8
_SCORE, _IMAGE = "score ", "image "  # what the objective tells, in the state


class Search:
    """B searches, each with the moments and the step size of its own."""

    def __init__(
        self,
        problem: Problem,
        options: SearchOptions,
        objective: Objective,
        mover: Mover | None = None,
        images_at: Sequence[int] = (),
    ) -> None:
        """Start every search at its base noise.

        Args:
            problem: B noises to move, and what the objective needs.
            options: Method, steps, step size, when to stop.
            objective: What is lowered.
            mover: How noises move; by default the one that ``options`` name.
            images_at: Steps whose images are kept, where the objective makes any.
        """
        self._options, self._objective = options, objective
        self._mover = mover or mover_of(options)
        self._images_at = tuple(images_at)
        self._state = self._start(problem)
        self._problem = dataclasses.replace(problem, start=None)

    def _start(self, problem: Problem) -> dict[str, Tensor]:
        """State of new searches; every tensor has a row per search."""
        B, device = len(problem.eps), problem.eps.device
        searching = self._mover.start(problem.eps, problem.start)
        self._moving = [*searching]
        far = torch.full((B,), float("inf"), device=device)
        start = torch.zeros(B, dtype=torch.int64, device=device)
        lr = self._options.lr
        first = self._mover.first_step if lr == "auto" else float(lr)
        return {
            **searching,
            "best_point": searching["point"].clone(),
            "losses": torch.zeros(B, self.steps + 1, device=device),
            "rate": torch.full((B,), first, device=device),
            "before": far.clone(),
            "best_loss": far,
            "level": far.clone(),
            "step": start,
            "best_step": start.clone(),
            "level_step": start.clone(),
            "running": torch.ones(B, dtype=torch.bool, device=device),
        }

    @property
    def steps(self) -> int:
        """Steps of a search that is not stopped."""
        return self._options.gradient_steps

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self._state["step"].device

    @property
    def running(self) -> Tensor:
        """Which searches are not at their end, [B] bool."""
        return self._state["running"]

    @property
    def bytes(self) -> int:
        """Memory of all that is kept from step to step."""
        return self._problem.bytes + sum(value.nbytes for value in self._state.values())

    @property
    def shard_bytes(self) -> int:
        """Size of the noises and rotations that are found."""
        q = self._mover.rotation(self._state["point"])
        return self._problem.eps.nbytes + (0 if q is None else q.nbytes)

    def place(self, slots: Sequence[int], new: "Search") -> None:
        """Let ``new`` searches, just started, take over ``slots``, in which others have ended."""
        size, index = len(self.running), torch.tensor(slots, device=self.device)
        order = [*range(size)]
        for k, slot in enumerate(slots):
            order[slot] = size + k
        self._problem = self._problem.cat(new._problem).select(order)
        for name, value in new._state.items():
            self._state[name] = self._state[name].index_copy(0, index, value)

    def keep(self, slots: Sequence[int]) -> None:
        """Give up all searches but those in ``slots``, which then are 0, 1, ..."""
        index = torch.tensor(slots, device=self.device)
        self._problem = self._problem.select(slots)
        self._state = {name: value.index_select(0, index) for name, value in self._state.items()}

    def run(self, on_step: Callable[[Tensor], object] = lambda loss: None) -> Assignment:
        """Take all steps; who stops early waits for others. ``on_step`` is told the losses [B]."""
        for step in range(self.steps + 1):
            on_step(self.advance(is_last=step == self.steps))
        return self.result()

    def advance(self, is_last: bool = False) -> Tensor:
        """Evaluate all searches once and move those that go on; returns the losses, [B].

        Without effect where it raises. With ``is_last`` none goes on: no gradient is computed.
        """
        s, differentiates = self._state, self._mover.differentiates and not is_last
        with torch.set_grad_enabled(differentiates):
            point = s["point"].detach().requires_grad_(differentiates)
            found = self._objective(self._mover.noise(self._problem.eps, point), self._problem)
        gradient = torch.zeros_like(point)
        if differentiates:
            gradient = torch.autograd.grad(found.loss.sum(), point)[0]
        loss = found.loss.detach()
        self._record(loss, found)
        self._stop(loss)
        if not is_last:
            self._move(gradient, loss)
        return loss

    def _record(self, loss: Tensor, found: Evaluation) -> None:
        s = self._state
        step, running = s["step"], s["running"]
        curves = {"losses": loss, **{_SCORE + k: v.detach() for k, v in found.scores.items()}}
        for name, value in curves.items():
            curve = s.setdefault(name, torch.zeros_like(s["losses"]))
            now = torch.where(running[:, None], value[:, None], curve.gather(1, step[:, None]))
            curve.scatter_(1, step[:, None], now)
        better = running & (loss < s["best_loss"])
        s["best_loss"] = torch.where(better, loss, s["best_loss"])
        s["best_step"] = torch.where(better, step, s["best_step"])
        point = s["point"]
        s["best_point"] = torch.where(per_row(better, point), point, s["best_point"])
        if found.images is None:
            return
        at = {f"{_IMAGE}{k}": running & (step == k) for k in self._images_at}
        for name, rows in {f"{_IMAGE}best": better, **at}.items():
            kept = s.setdefault(name, torch.zeros_like(found.images))
            s[name] = torch.where(per_row(rows, kept), found.images, kept)

    def _stop(self, loss: Tensor) -> None:
        """End the searches that took all steps or need no more."""
        s, options = self._state, self._options
        on = s["running"] & (s["step"] < self.steps)
        if options.stops_early:
            on &= loss.isfinite()
        if options.stop_loss is not None:
            on &= loss > options.stop_loss
        if options.stop_patience:
            level, part = s["level"], options.stop_improvement
            # a loss may be negative: minus a reward
            fell = loss < torch.where(level > 0, level * (1 - part), level * (1 + part))
            s["level"] = torch.where(fell, loss, s["level"])
            s["level_step"] = torch.where(fell, s["step"], s["level_step"])
            on &= s["step"] - s["level_step"] < options.stop_patience
        s["running"] = on

    def _move(self, gradient: Tensor, loss: Tensor) -> None:
        """One step of the mover for all searches that go on."""
        s, running = self._state, self._state["running"]
        if self._options.lr == "auto" and self._mover.adapts:
            s["rate"] = s["rate"] * torch.where(loss > s["before"], _SHRINKAGE, _GROWTH)
            s["before"] = loss
        moving = {name: s[name] for name in self._moving}
        moved = self._mover.move(moving, self._problem.eps, gradient, s["step"], s["rate"])
        for name, value in moved.items():
            s[name] = torch.where(per_row(running, value), value, s[name])
        s["step"] = s["step"] + running

    def result(self, slots: Sequence[int] | None = None) -> Assignment:
        """What the searches in ``slots`` (default: all) have found so far."""
        s, eps = self._state, self._problem.eps
        if slots is not None:
            index = torch.tensor(slots, device=self.device)
            told = [name for name in s if name not in self._moving]  # in order: files follow it
            s, eps = {name: s[name].index_select(0, index) for name in told}, eps[index]
        return Assignment(
            self._mover.noise(eps, s["best_point"]),
            self._mover.rotation(s["best_point"]),
            s["losses"].T.contiguous(),
            s["best_loss"],
            s["best_step"],
            s["step"],
            {
                k.removeprefix(_SCORE): v.T.contiguous()
                for k, v in s.items()
                if k.startswith(_SCORE)
            },
            s.get(f"{_IMAGE}best"),
            {k: s[f"{_IMAGE}{k}"] for k in self._images_at if f"{_IMAGE}{k}" in s},
        )
