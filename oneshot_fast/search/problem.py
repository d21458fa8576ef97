"""What is searched, what an objective finds of a noise, and what a search finds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oneshot_fast.generators.base import Conditioning
from oneshot_fast.noise.prior import norm_penalty
from oneshot_fast.search.options import SearchOptions


@dataclass(frozen=True)
class Problem:
    """What is searched, a row per search.

    Attributes:
        eps: Base noises, [B, C, h, w] float32, N(0, 1).
        conditioning: What the generator is told, of B prompts.
        prompts: The B prompts themselves; empty where the objective reads none.
        target: What the objective compares with, by name, [B, ...] each.
        start: Noises that the searches begin at, like ``eps``; None: at ``eps``.
    """

    eps: Tensor
    conditioning: Conditioning
    prompts: Sequence[str] = ()
    target: Mapping[str, Tensor] = field(default_factory=dict)
    start: Tensor | None = None

    def select(self, rows: Sequence[int]) -> "Problem":
        """The searches ``rows``, under way, in their order."""
        index = torch.tensor(rows, device=self.eps.device)
        return Problem(
            self.eps[index],
            self.conditioning.select(index),
            [self.prompts[k] for k in rows] if self.prompts else (),
            {name: value[index] for name, value in self.target.items()},
        )

    def cat(self, other: "Problem") -> "Problem":
        """The searches of both, under way."""
        return Problem(
            torch.cat([self.eps, other.eps]),
            self.conditioning.cat([self.conditioning, other.conditioning]),
            [*self.prompts, *other.prompts],
            {name: torch.cat([value, other.target[name]]) for name, value in self.target.items()},
        )

    @property
    def bytes(self) -> int:
        """Memory of what a search keeps: all but ``start``."""
        tensors = [self.eps, *self.conditioning.tensors().values(), *self.target.values()]
        return sum(value.nbytes for value in tensors)


@dataclass(frozen=True)
class Evaluation:
    """What an objective finds of B noises.

    Attributes:
        loss: What a search lowers, [B] float32, differentiable.
        scores: Parts of it to be kept of every step, by name, [B].
        images: Made of the noises, to be kept of some steps, [B, 3, H, W] uint8; None: no images.
    """

    loss: Tensor
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    images: Tensor | None = None


def penalised(loss: Tensor, z: Tensor, eps: Tensor, options: SearchOptions) -> Tensor:
    """``loss`` [B] of noises ``z`` [B, C, h, w] and the weighted penalties on them."""
    if options.noise_l2_weight:
        loss = loss + options.noise_l2_weight * (z - eps).square().mean((1, 2, 3))
    if options.norm_weight:
        loss = loss + options.norm_weight * norm_penalty(z)
    return loss


# Of noises [B, C, h, w]. A row must not depend on the others.
Objective = Callable[[Tensor, Problem], Evaluation]


@dataclass(frozen=True)
class Assignment:
    """The best noises of B searches.

    Attributes:
        z: Best noise, [B, C, h, w] float32.
        q: Its rotation, [B, D, D] or [B, G, G, D, D] float32; None for methods without one.
        losses: Loss of every search at every step, the last one included, [steps + 1, B]; after
            the last step of a search that was stopped early, 0.
        best_loss: Smallest of them, [B].
        best_step: Where it was, [B] int64.
        last_step: The step after which the search ended, [B] int64.
        scores: What the objective told of every step, by name, like ``losses``.
        best_images: Of the best noises, [B, 3, H, W] uint8; None for an objective without images.
        images: The same of some steps, by step.
    """

    z: Tensor
    q: Tensor | None
    losses: Tensor
    best_loss: Tensor
    best_step: Tensor
    last_step: Tensor
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    best_images: Tensor | None = None
    images: Mapping[int, Tensor] = field(default_factory=dict)
