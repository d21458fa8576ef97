"""Settings of the recipe that made the packaged weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Train the embedded generator and its classifier again; finished stages are kept."""

    output_dir: Path
    """Folder of the stages' files and of the finished pipeline."""
    stage: Literal["vae", "teacher", "distill", "classifier", "packaged_teacher", "all"] = "all"
    """Run up to this stage of vae, teacher, distill. Two stand alone: classifier, and
    packaged_teacher, which gives the packaged VAE and text encoders a UNet ("tiny-teacher")."""
    seed: int = 0
    """Seed of the initial weights and of all data."""
    threads: int = 1
    """CPU threads; another number rounds differently, so gives slightly other weights."""
    vae_steps: int = 2500
    """Optimiser steps of the VAE, 16 images each."""
    latent_copies: int = 10
    """Randomly moved copies of each digit that the teacher learns from."""
    teacher_steps: int = 3500
    """Optimiser steps of the teacher."""
    prompt_dropout: float = 0.1
    """Share of prompts that the teacher does not see."""
    guidance: float = 2.0
    """Classifier-free guidance scale of the teacher's samples; 1 is none."""
    solver_steps: int = 10
    """Steps of the teacher's ODE solver."""
    distill_pairs: int = 12800
    """Noises whose end point the teacher computes."""
    distill_steps: int = 4500
    """Optimiser steps of the student."""
    batch_size: int = 48
    """Images per step of teacher, student and classifier."""
    classifier_steps: int = 2000
    """Optimiser steps of the classifier."""
