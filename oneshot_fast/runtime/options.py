"""How a run is kept and shown: the flags of every resumable command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RunOptions:
    """How a run is kept and shown."""

    seed: int = 0
    """Seed of the run; each sample's own seed follows from it and from the sample's id."""
    overwrite: bool = False
    """Start anew in a folder that holds another run, instead of resuming."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log losses to this tracker."""
