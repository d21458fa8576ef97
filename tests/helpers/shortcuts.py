"""What tests do without, as it takes half of a small run's time: drawn figures, waiting for a disk.

Importing this makes it so, in the tests and in the commands that their server forks. The fixture
plots draws figures; whoever kills a process need not wait for the disk, only who pulls the plug.
"""

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def blank(figure: Figure, target: Any, **_: Any) -> None:
    """A figure's file with nothing in it."""
    target.write("<svg></svg>") if hasattr(target, "write") else Path(target).touch()


DRAW, Figure.savefig = Figure.savefig, blank  # type: ignore[method-assign]
os.fsync = lambda _: None
