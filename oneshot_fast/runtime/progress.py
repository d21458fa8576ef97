"""What a running job shows: progress bars and trackers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot_fast.errors import require

if TYPE_CHECKING:
    from accelerate import Accelerator
    from tqdm import tqdm


def progress(total: int | None, description: str, unit: str) -> tqdm[Any]:
    """Progress bar with ETA on stderr; in a log file it prints a line now and then."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 20.0
    return tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True, mininterval=interval)


def start_tracking(name: str, folder: Path, settings: dict[str, Any]) -> Accelerator:
    """Accelerate's ``Accelerator`` whose ``log`` writes to tracker ``name`` (none: to nowhere).

    Raises:
        UserError: If the tracker's package is not installed.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    require(
        name in ("none", *map(str, get_available_trackers())),
        f"--report_to {name} needs a package that is not installed: pip install {name}",
    )
    accelerator = Accelerator(log_with=None if name == "none" else name, project_dir=folder)
    numbers = {k: v for k, v in settings.items() if isinstance(v, int | float)}
    config = {key: str(value) for key, value in settings.items()} | numbers
    accelerator.init_trackers("logs", config=config)
    return accelerator


def end_tracking(accelerator: Accelerator) -> None:
    """Close the trackers; ``Accelerator.end_training`` would also end the process group."""
    for tracker in accelerator.trackers:
        tracker.finish()


def silence_imports() -> None:
    """Keep diffusers and transformers from warning when they are imported.

    Without it each command starts with, say, that torchvision, which we do not use, is missing.
    """
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
