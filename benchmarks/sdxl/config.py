"""What the SDXL-Turbo benchmark is told to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Config:
    """What to run."""

    arch: Literal["full", "small", "tiny"] = "tiny"
    """full: SDXL-Turbo's sizes at 512 pixels; small: 57 million parameters at 256; tiny: the
    embedded sizes at 128."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    steps: int = 10
    """Gradient steps per image."""
    reference_lr: float = 0.02
    """Step size of the usual recipe's Adam; ours finds its own."""
    images: int = 16
    """Images of the data set; ours takes them in one batch, or in several."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Batch sizes of ours."""
    options: tuple[Literal["bf16", "compiled"], ...] = ("bf16", "compiled")
    """Variants of ours at the largest batch size, beside the plain one (which on a GPU is in bf16);
    a compiled UNet is compiled in the first turn, which is not counted."""
    rounds: int = 3
    """How often each variant takes its turn."""
    sft_steps: int = 4
    """Training steps per turn; 0 leaves the training out."""
    short: bool = False
    """One round, few images: under four minutes on a GPU."""
    memory: bool = True
    """Also measure peak memory, each variant in a process of its own."""
    threads: int | None = None
    """CPU threads."""
    seed: int = 0
    """Seed."""
    output: Path | None = None
    """JSON file; by default in benchmarks/results."""
    only: str | None = None
    """One turn of one variant, for the peak memory of a process of its own."""
