"""Searches by gradients side by side: each slot of a batch holds one target at a step of its own.

A slot's moments, step, step size and best result are its own, so that a finished target can leave
its slot to another one while the rest go on. Nothing here waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oneshot_fast.search.movers.mover import Mover, mover_of
from oneshot_fast.search.options import SearchOptions

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Conditioning

# lr auto: the step size of a target grows while its loss falls and shrinks when it has risen
_GROWTH, _SHRINKAGE = 1.05, 0.8


@dataclass(frozen=True)
class Problem:
    """What is matched, a row per target.

    Attributes:
        eps: Base noise, [B, C, h, w] float32, N(0, 1).
        prompts: Encoding of B prompts.
        latents: Target latents, [B, C, h, w] float32.
        images: Target images, [B, 3, H, W] float32 in [0, 1]; None without a pixel loss.
        features: Features of the target images, [B, F] float32; None without their loss.
        start: Noises that the search begins at, like ``eps``; None: at ``eps``.
    """

    eps: Tensor
    prompts: Conditioning
    latents: Tensor
    images: Tensor | None = None
    features: Tensor | None = None
    start: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        found = {"eps": self.eps, "latents": self.latents, **self.prompts.tensors()}
        more = {"images": self.images, "features": self.features}
        return found | {name: value for name, value in more.items() if value is not None}


@dataclass(frozen=True)
class Assignment:
    """Result for a batch of targets.

    Attributes:
        z: Best noise, [B, C, h, w] float32.
        q: Its rotation, [B, D, D] or [B, G, G, D, D] float32; None for methods without one.
        losses: Loss of every target at every step, the last one included, [steps + 1, B]; after
            the last step of a target that was stopped early, 0.
        best_loss: Smallest of them, [B].
        best_step: Where it was, [B] int64.
        last_step: The step after which the search ended, [B] int64.
    """

    z: Tensor
    q: Tensor | None
    losses: Tensor
    best_loss: Tensor
    best_step: Tensor
    last_step: Tensor


class Search:
    """B searches, each with the moments and the step size of its own."""

    def __init__(
        self,
        problem: Problem,
        options: SearchOptions,
        objective: Callable[[Tensor, Problem], Tensor],
        mover: Mover | None = None,
    ) -> None:
        """Start every search at its base noise.

        Args:
            problem: B targets.
            options: Method, steps, step size, when to stop.
            objective: Loss per target, [B], of the noises [B, C, h, w].
            mover: How noises move; by default the one that ``options`` name.
        """
        self._options, self._objective, self._prompts = options, objective, problem.prompts
        self._mover = mover or mover_of(options)
        self._state = self._start(problem)

    def _start(self, problem: Problem) -> dict[str, Tensor]:
        """State of new searches; every tensor has a row per search."""
        B, device = len(problem.eps), problem.eps.device
        searching = self._mover.start(problem.eps, problem.start)
        self._moving = [*searching]
        far = torch.full((B,), float("inf"), device=device)
        start = torch.zeros(B, dtype=torch.int64, device=device)
        lr = self._options.lr
        first = self._mover.first_step if lr == "auto" else float(lr)
        return problem.tensors() | {
            **searching,
            "best_point": searching["point"].clone(),
            "losses": torch.zeros(B, self._options.gradient_steps + 1, device=device),
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
    def running(self) -> Tensor:
        """Which searches are not at their end, [B] bool."""
        return self._state["running"]

    @property
    def bytes(self) -> int:
        """Memory of all that is kept from step to step."""
        return sum(value.nbytes for value in self._state.values())

    @property
    def shard_bytes(self) -> int:
        """Size of the noises and rotations that are found."""
        point = self._state["point"]
        q = self._mover.rotation(point)
        return self._state["eps"].nbytes + (0 if q is None else q.nbytes)

    @property
    def problem(self) -> Problem:
        """The targets of all slots."""
        s = self._state
        prompts = dataclasses.replace(self._prompts, **{k: s[k] for k in self._prompts.tensors()})
        return Problem(s["eps"], prompts, s["latents"], s.get("images"), s.get("features"))

    def place(self, slots: Sequence[int], problem: Problem) -> None:
        """Start searches for new targets in ``slots``, in which others have ended."""
        index = torch.tensor(slots, device=problem.eps.device)
        for name, value in self._start(problem).items():
            # not in place: the caller's own tensors may be among these
            self._state[name] = self._state[name].index_copy(0, index, value)

    def keep(self, slots: Sequence[int]) -> None:
        """Give up all searches but those in ``slots``, which then are 0, 1, ..."""
        index = torch.tensor(slots, device=self._state["step"].device)
        self._state = {name: value.index_select(0, index) for name, value in self._state.items()}

    def advance(self, is_last: bool = False) -> Tensor:
        """Evaluate all searches once and move those that go on; without effect where it raises.

        Args:
            is_last: None goes on: no gradient is computed.

        Returns:
            The losses, [B].
        """
        s = self._state
        with torch.set_grad_enabled(not is_last):
            point = s["point"].detach().requires_grad_(not is_last)
            z = self._mover.noise(s["eps"], point)
            loss = self._objective(z, self.problem)
        gradient = None if is_last else torch.autograd.grad(loss.sum(), point)[0]
        loss = loss.detach()
        self._record(loss)
        self._stop(loss)
        if gradient is not None:
            self._move(gradient, loss)
        return loss

    def _record(self, loss: Tensor) -> None:
        s = self._state
        step, running = s["step"], s["running"]
        before = s["losses"].gather(1, step[:, None])
        now = torch.where(running[:, None], loss[:, None], before)
        s["losses"].scatter_(1, step[:, None], now)
        better = running & (loss < s["best_loss"])
        s["best_loss"] = torch.where(better, loss, s["best_loss"])
        s["best_step"] = torch.where(better, step, s["best_step"])
        point = s["point"]
        s["best_point"] = torch.where(_per_row(better, point), point, s["best_point"])

    def _stop(self, loss: Tensor) -> None:
        """End the searches that took all steps or need no more."""
        s, options = self._state, self._options
        on = s["running"] & (s["step"] < options.gradient_steps)
        if options.stops_early:
            on &= loss.isfinite()
        if options.stop_loss is not None:
            on &= loss > options.stop_loss
        if options.stop_patience:
            fell = loss < s["level"] * (1 - options.stop_improvement)
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
        moved = self._mover.move(moving, s["eps"], gradient, s["step"], s["rate"])
        for name, value in moved.items():
            s[name] = torch.where(_per_row(running, value), value, s[name])
        s["step"] = s["step"] + running

    def result(self, slots: Sequence[int] | None = None) -> Assignment:
        """What the searches in ``slots`` (default: all) have found so far."""
        s = self._state
        if slots is not None:
            index = torch.tensor(slots, device=self._state["step"].device)
            names = ("eps", "best_point", "losses", "best_loss", "best_step", "step")
            s = {name: s[name].index_select(0, index) for name in names}
        z = self._mover.noise(s["eps"], s["best_point"])
        q, losses = self._mover.rotation(s["best_point"]), s["losses"].T.contiguous()
        return Assignment(z, q, losses, s["best_loss"], s["best_step"], s["step"])


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] shaped to broadcast over ``like`` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))
