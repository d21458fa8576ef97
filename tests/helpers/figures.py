"""Figures that are not drawn, which takes a third of a small run's time; the fixture plots draws.

Importing this makes it so, in the tests and in the commands that their server forks.
"""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def blank(figure: Figure, target: Any, **_: Any) -> None:
    """A figure's file with nothing in it."""
    target.write("<svg></svg>") if hasattr(target, "write") else Path(target).touch()


DRAW, Figure.savefig = Figure.savefig, blank  # type: ignore[method-assign]
