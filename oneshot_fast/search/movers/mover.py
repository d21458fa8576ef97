"""How gradients move a noise on the Gaussian shell: by rotations, on a sphere, or keeping it white.

Each is Adam (Kingma and Ba 2015, arXiv 1412.6980) or L-BFGS on a manifold that holds every noise of
the base noise's energy that the method can reach. A state is a dict of tensors with a row per
search. Step sizes are radians: the RMS angle by which a step of Adam, where all its elements agree,
turns the noise, and the largest angle of a step of L-BFGS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from oneshot_fast.search.movers.adam import State
from oneshot_fast.search.movers.rotation import RawRotation, Rotation
from oneshot_fast.search.movers.sphere import QuasiNewtonSphere, Sphere

if TYPE_CHECKING:
    from oneshot_fast.jobs.assign.objective import AssignOptions


class Method(Protocol):
    """One way to move noises.

    Attributes:
        first_step: Step in radians that ``lr auto`` begins with.
    """

    first_step: float

    def start(self, eps: Tensor, at: Tensor | None = None) -> State:
        """``point``, where each search is, and its moments.

        Args:
            eps: Base noises, [B, C, h, w].
            at: Noises to begin at; by default the base noises. Rotations always begin there.
        """
        ...

    def noise(self, eps: Tensor, point: Tensor) -> Tensor:
        """Noises [B, C, h, w] at ``point``; differentiable with respect to it."""
        ...

    def rotation(self, point: Tensor) -> Tensor | None:
        """The rotations that ``point`` stands for, [B, D, D] or [B, G, G, D, D]; None if none."""
        ...

    def move(
        self, state: State, eps: Tensor, gradient: Tensor, step: Tensor, rate: Tensor
    ) -> State:
        """The state after one step.

        Args:
            state: As ``start`` makes it.
            eps: Base noises, [B, C, h, w].
            gradient: Of the losses with respect to ``point``.
            step: Steps taken so far, [B] int64.
            rate: Step sizes in radians, [B].
        """
        ...


def method_of(options: AssignOptions) -> Method:
    """The gradient method that ``options`` name."""
    if options.gradient_method == "rotation":
        kind = RawRotation if options.rotation_optimizer == "raw_adam" else Rotation
        return kind(options.patch_size, options.rotation_groups, options.max_angle)
    sphere = QuasiNewtonSphere if options.sphere_optimizer == "lbfgs" else Sphere
    return sphere(options.max_angle, white=options.gradient_method == "white")
