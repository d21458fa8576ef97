"""What tests do without, as it takes half of a small run's time.

Figures are not drawn, but for the fixture plots; a network that was read is copied as long as its
files are the same; a command's flags are looked up in its dataclass once; no one waits for a disk,
as only who pulls the plug has to; garbage is collected less often, as every time looks through all
that is imported. Importing this makes it so, in the tests and in the commands that their server
forks.
"""

import copy
import functools
import gc
import io
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from tyro._parsers import ParserSpecification

Stamps = tuple[tuple[str, int, int], ...]


def blank(figure: Figure, target: Any, **_: Any) -> None:
    """A figure's file with nothing in it."""
    target.write("<svg></svg>") if hasattr(target, "write") else Path(target).touch()


class Pickler(pickle.Pickler):
    """Leaves out tensors, which are kept as they are."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class Copier:
    """Makes copies of an object, of which tensors are much; faster than copy.deepcopy."""

    def __init__(self, original: Any) -> None:
        file = io.BytesIO()
        pickler = Pickler(file)
        pickler.dump(original)
        self._pickled, self._tensors = file.getvalue(), pickler.tensors

    def __call__(self) -> Any:
        unpickler = pickle.Unpickler(io.BytesIO(self._pickled))
        # all at once, as some may be the same
        unpickler.persistent_load = copy.deepcopy(self._tensors).__getitem__
        return unpickler.load()


def share_networks() -> None:
    """Read each network once, if what reads them is imported."""
    pretrained: Any = sys.modules.get("oneshot_fast.generators.pretrained")
    if pretrained is None or hasattr(pretrained.load_network, "__wrapped__"):
        return
    read = pretrained.load_network

    @functools.lru_cache(12)
    def of_files(stamps: Stamps, kind: Any, folder: Path, part: str, **how: Any) -> Copier:
        return Copier(read(kind, folder, part, **how))

    @functools.wraps(read)
    def load_network(kind: Any, folder: Path | str, part: str = "", **how: Any) -> Any:
        files = sorted(Path(folder, part).glob("*"))
        if not files:  # what is on the hub
            return read(kind, folder, part, **how)
        stamps = tuple((str(f), f.stat().st_ctime_ns, f.stat().st_size) for f in files)
        return of_files(stamps, kind, folder, part, **how)()

    pretrained.load_network = load_network


def share_flags() -> None:
    """Find out once what flags a command has."""
    look_up: Any = ParserSpecification.from_callable_or_type
    kept: dict[Any, Any] = {}

    @functools.wraps(look_up)
    def from_callable_or_type(command: Any, **how: Any) -> Any:
        if how["intern_prefix"]:  # a group of flags
            return look_up(command, **how)
        if command not in kept:
            kept[command] = look_up(command, **how)
        return kept[command]

    ParserSpecification.from_callable_or_type = staticmethod(from_callable_or_type)


share_flags()
DRAW, Figure.savefig = Figure.savefig, blank  # type: ignore[method-assign]
os.fsync = lambda _: None
gc.set_threshold(50_000, 20, 10)
