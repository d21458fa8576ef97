"""What a job will need in time, from a few timed steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass

_TIMED = 3


@dataclass(frozen=True)
class Plan:
    """What a command will need.

    Attributes:
        lines: For a person.
        seconds: For all of it; NaN where the number of samples is not known.
    """

    lines: list[str]
    seconds: float

    def __str__(self) -> str:
        """The lines, as printed."""
        return "\n".join(self.lines)


def shortest(run: Callable[[], object]) -> float:
    """Seconds of the shortest of a few runs, each to its end on the device."""
    found = []
    for _ in range(_TIMED):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)
