"""Movers by the names that ``method`` gives them."""

import functools
from collections.abc import Callable, Sequence

import torch

from oneshot_fast.errors import UserError
from oneshot_fast.search.movers.free import Free, FreeSgd
from oneshot_fast.search.movers.lbfgs import QuasiNewtonSphere
from oneshot_fast.search.movers.mover import Mover
from oneshot_fast.search.movers.rotation import RawRotation, Rotation
from oneshot_fast.search.movers.sphere import Sphere
from oneshot_fast.search.options import CHOICES, SearchOptions


def _rotation(options: SearchOptions) -> Mover:
    given = options.patch_size, options.rotation_groups, options.max_angle
    if options.rotation_optimizer == "raw_adam":
        return RawRotation(*given, in_radians=options.lr_unit == "radians")
    return Rotation(*given)


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


def check_fits(options: SearchOptions, noise_shape: Sequence[int]) -> None:
    """Raise UserError if the mover that ``options`` name cannot move noises [C, h, w]."""
    mover_of(options).start(torch.zeros(1, *noise_shape))


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
