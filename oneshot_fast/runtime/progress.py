"""What a running job shows: progress bars and trackers."""

import os
import sys
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from oneshot_fast.errors import UserError, need_package, one_line


def progress(total: int | None, description: str, unit: str) -> "tqdm[Any]":
    """Progress bar with ETA on stderr; in a log file it prints a line now and then."""
    interval = 0.1 if sys.stderr.isatty() else 20.0
    return tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True, mininterval=interval)


class Tracker:
    """Numbers and pictures of a run, sent to TensorBoard or W&B as they come, or nowhere."""

    def __init__(self, writer: Any = None, prefix: str = "") -> None:
        """Keep accelerate's tracker ``writer``; all names begin with ``prefix``."""
        self._writer, self._prefix = writer, prefix
        self._known: set[str] = set()

    @property
    def is_on(self) -> bool:
        """Whether it sends anything."""
        return self._writer is not None

    def part(self, name: str) -> "Tracker":
        """The same, for a stage whose steps begin anew."""
        return Tracker(self._writer, f"{self._prefix}{name}/")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send the numbers among ``values``."""
        if self._writer is None:
            return
        named = {self._prefix + k: v for k, v in values.items() if isinstance(v, int | float)}
        if self._writer.name == "tensorboard":
            self._writer.log(named, step=step)
            return
        # W&B's own step must not fall, as it would from stage to stage
        steps = f"{self._prefix}step"
        for key in named.keys() - self._known:
            self._writer.tracker.define_metric(key, step_metric=steps)
        self._known |= named.keys()
        self._writer.log({**named, steps: step})

    def images(self, paths: Iterable[Path], step: int, name: str | None = None) -> None:
        """Send image files, named after them, or all by one ``name``."""
        if self._writer is None:
            return
        import numpy as np
        from PIL import Image

        how = {"step": step, "dataformats": "NHWC"} if self._writer.name == "tensorboard" else {}
        for path in paths:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.log_images({self._prefix + (name or path.stem): pixels[None]}, **how)

    def finish(self) -> None:
        """Close what the whole run has written to; a stage leaves it open."""
        if self._writer is not None and not self._prefix:
            self._writer.finish()


def start_tracking(report_to: str | Tracker, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    """What ``report_to`` names: none, tensorboard, wandb or wandb:PROJECT; a tracker is used as is.

    A W&B run is called like ``folder``, whose logs/wandb-run keeps its id: a resumed run goes on.

    Raises:
        UserError: If the tracker's package is not installed, or it cannot start.
    """
    if isinstance(report_to, Tracker):
        return report_to
    from oneshot_fast.runtime.processes import is_main

    if report_to == "none" or not is_main():
        return Tracker()
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    from oneshot_fast.runtime.files import write_text

    name, _, project = report_to.partition(":")
    need_package(name, f"--report_to {name}")
    logs = folder / "logs"
    if name == "tensorboard":
        writer = LOGGER_TYPE_TO_CLASS[name]("logs", folder)
    else:
        logs.mkdir(exist_ok=True)
        kept = logs / "wandb-run"
        if not kept.exists():
            write_text(kept, uuid.uuid4().hex)
        writer = LOGGER_TYPE_TO_CLASS[name](
            project or "oneshot_fast",
            name=folder.resolve().name,
            id=kept.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(logs),
        )
    numbers = {k: v for k, v in settings.items() if isinstance(v, int | float)}
    try:
        writer.start()
        writer.store_init_configuration({k: str(v) for k, v in settings.items()} | numbers)
    except Exception as error:  # of the tracker's package: no login, no network
        raise UserError(f"--report_to {name} cannot start: {one_line(error)}") from None
    return Tracker(writer)


def silence_imports() -> None:
    """Keep diffusers and transformers from warning when they are imported.

    Without it each command starts with, say, that torchvision, which we do not use, is missing.
    """
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
