"""Which targets have their turn in a cycle, the cycle's seeds, and whether it was the last."""

import sys
from collections.abc import Sequence
from typing import TypeVar

from oneshot_fast.runtime.processes import is_main
from oneshot_fast.runtime.seeds import derived_seed

T = TypeVar("T")


def turn(records: Sequence[T], cycle: int, fraction: float) -> list[T]:
    """The records that get a new noise in ``cycle``, from 1: all at first, then parts in turn."""
    parts = round(1 / fraction)
    if cycle == 1 or parts == 1:
        return [*records]
    return [*records[(cycle - 2) % parts :: parts]]


def cycle_seeds(seed: int, cycle: int, pool_refresh: int) -> tuple[int, int]:
    """Of a cycle, from 1, and of its random noises, which are new every ``pool_refresh`` cycles."""
    drawn = 1 + ((cycle - 1) // pool_refresh if pool_refresh else 0)
    return derived_seed(seed, "cycle", cycle), derived_seed(seed, "cycle", drawn)


def is_stuck(distances: Sequence[float | None], patience: int) -> bool:
    """Whether the last ``patience`` cycles were no better on held-out images; 0: never.

    ``distances`` are of the base model and after each cycle; None where it cannot be measured.
    """
    if not patience or len(distances) <= patience:
        return False
    known = [distance for distance in distances if distance is not None]
    if len(known) < len(distances) or min(known[-patience:]) < min(known[:-patience]):
        return False
    if is_main():
        print(f"not better on held-out images in {patience} cycles: stopping", file=sys.stderr)
    return True
