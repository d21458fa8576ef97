"""What tests do without, as it takes half of a small run's time.

Figures are not drawn, but for the fixture plots; a network that was read is copied as long as its
files are the same; no one waits for a disk, as only who pulls the plug has to; garbage is collected
less often, as every time looks through all that is imported. Importing this makes it so, in the
tests and in the commands that their server forks.
"""

import copy
import functools
import gc
import os
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Stamps = tuple[tuple[str, int, int], ...]


def blank(figure: Figure, target: Any, **_: Any) -> None:
    """A figure's file with nothing in it."""
    target.write("<svg></svg>") if hasattr(target, "write") else Path(target).touch()


def share_networks() -> None:
    """Read each network once, if what reads them is imported."""
    pretrained: Any = sys.modules.get("oneshot_fast.generators.pretrained")
    if pretrained is None or hasattr(pretrained.load_network, "__wrapped__"):
        return
    read = pretrained.load_network

    @functools.lru_cache(12)
    def of_files(stamps: Stamps, kind: Any, folder: Path, part: str, **how: Any) -> Any:
        return read(kind, folder, part, **how)

    @functools.wraps(read)
    def load_network(kind: Any, folder: Path | str, part: str = "", **how: Any) -> Any:
        files = sorted(Path(folder, part).glob("*"))
        if not files:  # what is on the hub
            return read(kind, folder, part, **how)
        stamps = tuple((str(f), f.stat().st_ctime_ns, f.stat().st_size) for f in files)
        return copy.deepcopy(of_files(stamps, kind, folder, part, **how))

    pretrained.load_network = load_network


DRAW, Figure.savefig = Figure.savefig, blank  # type: ignore[method-assign]
os.fsync = lambda _: None
gc.set_threshold(50_000, 20, 10)
