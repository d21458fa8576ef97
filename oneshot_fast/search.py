"""Searches for rotations side by side: each slot of a batch holds one target at a step of its own.

A slot's Adam moments, step and best result are its own, so that a finished target can leave its
slot to another one while the rest go on. Nothing here waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.rotation import PatchRotation

if TYPE_CHECKING:
    from oneshot_fast.generator import PromptEncoding
    from oneshot_fast.matching import AssignOptions

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch.optim.Adam's


@dataclass(frozen=True)
class Problem:
    """What is matched, a row per target.

    Attributes:
        eps: Base noise, [B, C, h, w] float32, N(0, 1).
        prompts: Encoding of B prompts.
        latents: Target latents, [B, C, h, w] float32.
        images: Target images, [B, 3, H, W] float32 in [0, 1]; None without a pixel loss.
    """

    eps: Tensor
    prompts: PromptEncoding
    latents: Tensor
    images: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        found = {"eps": self.eps, "latents": self.latents}
        found |= {"embeds": self.prompts.embeds, "pooled": self.prompts.pooled}
        return found if self.images is None else found | {"images": self.images}


@dataclass(frozen=True)
class Assignment:
    """Result for a batch of targets.

    Attributes:
        z: Best rotated noise, [B, C, h, w] float32.
        q: Its rotation, [B, D, D] or [B, G, G, D, D] float32.
        losses: Loss of every target at every step, the last one included, [steps + 1, B]; after
            the last step of a target that was stopped early, 0.
        best_loss: Smallest of them, [B].
        best_step: Where it was, [B] int64.
        last_step: The step after which the search ended, [B] int64.
    """

    z: Tensor
    q: Tensor
    losses: Tensor
    best_loss: Tensor
    best_step: Tensor
    last_step: Tensor


class Search:
    """B searches with Adam on the skew logarithm of each rotation."""

    def __init__(
        self,
        problem: Problem,
        options: AssignOptions,
        objective: Callable[[Tensor, Problem], Tensor],
    ) -> None:
        """Start every search at the identity.

        Args:
            problem: B targets.
            options: Steps, learning rate, patches, when to stop.
            objective: Loss per target, [B], of the rotated noises [B, C, h, w].
        """
        self._options, self._objective, self._prompts = options, objective, problem.prompts
        self._state = self._start(problem)
        steps = range(1, options.steps + 2)
        minus_rates = [-(options.lr / (1 - _BETAS[0] ** step)) for step in steps]
        roots = [(1 - _BETAS[1] ** step) ** 0.5 for step in steps]
        self._corrections = torch.tensor([minus_rates, roots], device=problem.eps.device)

    def _start(self, problem: Problem) -> dict[str, Tensor]:
        """State of new searches; every tensor has a row per search."""
        B, device = len(problem.eps), problem.eps.device
        rotation = PatchRotation(
            problem.eps.shape, self._options.patch_size, self._options.rotation_groups, device
        )
        skew = rotation.skew.detach()
        far = torch.full((B,), float("inf"), device=device)
        start = torch.zeros(B, dtype=torch.int64, device=device)
        searching = {name: skew.clone() for name in ("skew", "exp_avg", "exp_avg_sq", "best_q")}
        return problem.tensors() | {
            **searching,
            "losses": torch.zeros(B, self._options.steps + 1, device=device),
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
        return self._state["eps"].nbytes + self._state["skew"].nbytes

    @property
    def problem(self) -> Problem:
        """The targets of all slots."""
        s = self._state
        prompts = dataclasses.replace(self._prompts, embeds=s["embeds"], pooled=s["pooled"])
        return Problem(s["eps"], prompts, s["latents"], s.get("images"))

    def place(self, slots: Sequence[int], problem: Problem) -> None:
        """Start searches for new targets in ``slots``, in which others have ended."""
        index = torch.tensor(slots, device=problem.eps.device)
        for name, value in self._start(problem).items():
            # not in place: the caller's own tensors may be among these
            self._state[name] = self._state[name].index_copy(0, index, value)

    def keep(self, slots: Sequence[int]) -> None:
        """Give up all searches but those in ``slots``, which then are 0, 1, ..."""
        index = torch.tensor(slots, device=self._corrections.device)
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
            skew = s["skew"].detach().requires_grad_(not is_last)
            q = ops.skew_exp(skew)
            z = ops.patch_rotate(s["eps"], q, self._options.patch_size)
            loss = self._objective(z, self.problem)
        gradient = None if is_last else torch.autograd.grad(loss.sum(), skew)[0]
        loss = loss.detach()
        self._record(loss, q.detach())
        self._stop(loss)
        if gradient is not None:
            self._move(gradient)
        return loss

    def _record(self, loss: Tensor, q: Tensor) -> None:
        s = self._state
        step, running = s["step"], s["running"]
        before = s["losses"].gather(1, step[:, None])
        now = torch.where(running[:, None], loss[:, None], before)
        s["losses"].scatter_(1, step[:, None], now)
        better = running & (loss < s["best_loss"])
        s["best_loss"] = torch.where(better, loss, s["best_loss"])
        s["best_step"] = torch.where(better, step, s["best_step"])
        s["best_q"] = torch.where(_per_row(better, q), q, s["best_q"])

    def _stop(self, loss: Tensor) -> None:
        """End the searches that took all steps or need no more."""
        s, options = self._state, self._options
        on = s["running"] & (s["step"] < options.steps)
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

    def _move(self, gradient: Tensor) -> None:
        """One step of Adam (Kingma and Ba 2015, arXiv 1412.6980), rounded as torch.optim's."""
        s, (beta1, beta2) = self._state, _BETAS
        minus_rate, root = self._corrections[:, s["step"]]
        s["exp_avg"].lerp_(gradient, 1 - beta1)
        s["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (s["exp_avg_sq"].sqrt() / _per_row(root, gradient)).add_(_EPS)
        moved = s["skew"] + _per_row(minus_rate, gradient) * s["exp_avg"] / scale
        s["skew"] = torch.where(_per_row(s["running"], gradient), moved, s["skew"])
        s["step"] = s["step"] + s["running"]

    def result(self, slots: Sequence[int] | None = None) -> Assignment:
        """What the searches in ``slots`` (default: all) have found so far."""
        s = self._state
        if slots is not None:
            index = torch.tensor(slots, device=self._corrections.device)
            names = ("eps", "best_q", "losses", "best_loss", "best_step", "step")
            s = {name: s[name].index_select(0, index) for name in names}
        z = ops.patch_rotate(s["eps"], s["best_q"], self._options.patch_size)
        losses = s["losses"].T.contiguous()
        return Assignment(z, s["best_q"], losses, s["best_loss"], s["best_step"], s["step"])


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] shaped to broadcast over ``like`` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))
