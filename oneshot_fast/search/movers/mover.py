"""How gradients move a noise, by name: what every way to do so must offer, and which there are.

A mover is an optimiser on a manifold of noises. A state is a dict of tensors with a row per search,
so that searches can be at different steps. Step sizes are radians: the RMS angle by which a step of
Adam, where all its elements agree, turns the noise, and the largest angle of a step of L-BFGS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.search.movers.adam import State
from oneshot_fast.search.movers.free import Free, FreeSgd
from oneshot_fast.search.movers.lbfgs import QuasiNewtonSphere
from oneshot_fast.search.movers.rotation import RawRotation, Rotation
from oneshot_fast.search.movers.sphere import Sphere
from oneshot_fast.search.options import CHOICES, SearchOptions


class Mover(Protocol):
    """One way to move noises.

    Attributes:
        first_step: Step size that ``lr auto`` begins with.
        adapts: Whether ``lr auto`` changes it while searching.
    """

    first_step: float
    adapts: bool

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        """The state of new searches.

        Args:
            eps: Base noises, [B, C, h, w] float32.
            at: Noises to begin at, like ``eps``; by default the base noises. Rotations always begin
                there.

        Returns:
            ``point``, [B, ...], where each search is, and its moments, each with B rows.
        """
        ...

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        """Noises [B, C, h, w] at ``point`` [B, ...]; differentiable with respect to it."""
        ...

    def rotation(self, point: Tensor) -> Tensor | None:
        """The rotations that ``point`` stands for, [B, D, D] or [B, G, G, D, D]; None if none."""
        ...

    def move(
        self, state: State, eps: Tensor, gradient: Tensor, step: Tensor, rate: Tensor
    ) -> State:
        """The state after one step.

        Args:
            state: As ``start`` makes it; not changed.
            eps: Base noises, [B, C, h, w] float32.
            gradient: Of the losses with respect to ``point``, like it.
            step: Steps taken so far, [B] int64.
            rate: Step sizes, [B] float32.
        """
        ...


def _rotation(options: SearchOptions) -> Mover:
    kind = RawRotation if options.rotation_optimizer == "raw_adam" else Rotation
    return kind(options.patch_size, options.rotation_groups, options.max_angle)


def _sphere(options: SearchOptions, white: bool = False) -> Mover:
    kind = QuasiNewtonSphere if options.sphere_optimizer == "lbfgs" else Sphere
    return kind(options.max_angle, white=white)


def _free(options: SearchOptions) -> Mover:
    return (FreeSgd if options.free_optimizer == "sgd" else Free)(options.max_angle)


MOVERS: dict[str, Callable[[SearchOptions], Mover]] = {
    "sphere": _sphere,
    "white": functools.partial(_sphere, white=True),
    "rotation": _rotation,
    "free": _free,
}


def register_mover(name: str, make: Callable[[SearchOptions], Mover]) -> None:
    """Let ``method`` of all searches name a mover of yours; ``make`` is given the options."""
    MOVERS[name] = make


def mover_of(options: SearchOptions) -> Mover:
    """The mover that ``options.method`` names; where noises are only chosen, one that could be.

    Raises:
        UserError: If there is none of that name.
    """
    if options.mover is None:
        return Free()
    if options.mover not in MOVERS:
        names = ", ".join([*CHOICES, *MOVERS])
        raise UserError(
            f"method is '{options.method}'; give one of {names}, or two as in best_of_n+sphere"
        )
    return MOVERS[options.mover](options)
