"""What every way to move a noise must offer.

A mover is an optimiser on a manifold of noises. A state is a dict of tensors with a row per search,
so that searches can be at different steps. Step sizes are radians: the RMS angle by which a step of
Adam, where all its elements agree, turns the noise, and the largest angle of a step of L-BFGS.
"""

from typing import Protocol

from torch import Tensor

State = dict[str, Tensor]  # a row per search


class Mover(Protocol):
    """One way to move noises.

    Attributes:
        first_step: Step size that ``lr auto`` begins with.
        adapts: Whether ``lr auto`` changes it while searching.
        differentiates: Whether it follows gradients.
    """

    first_step: float
    adapts: bool = True
    differentiates: bool = True

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        """The state of new searches.

        Args:
            eps: Base noises, [B, C, h, w] float32.
            at: Noises to begin at, like ``eps``; by default the base noises. Rotations always begin
                there.

        Returns:
            ``point``, [B, ...], where each search is, and its moments, each with B rows.
        """

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        """Noises [B, C, h, w] at ``point`` [B, ...]; differentiable with respect to it."""

    def rotation(self, point: Tensor) -> Tensor | None:
        """The rotations that ``point`` stands for, [B, D, D] or [B, G, G, D, D]; None if none."""
        return None

    def move(self, state: State, eps: Tensor, grad: Tensor, step: Tensor, rate: Tensor) -> State:
        """The state after one step.

        Args:
            state: As ``start`` makes it; not changed.
            eps: Base noises, [B, C, h, w] float32.
            grad: Of the losses with respect to ``point``, like it; 0 where the mover does not
                differentiate.
            step: Steps taken so far, [B] int64.
            rate: Step sizes, [B] float32.
        """
