"""A one-step generator of drawn images.

It has the shape and the recipe of the embedded one (``recipes/tiny``), 64 x 64 pixels, and is
trained for a shorter time, so that there is something to improve.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from oneshot_fast.recipes.tiny.config import TrainConfig
from oneshot_fast.recipes.tiny.train import train_pipeline
from oneshot_fast.recipes.toy.data import LabelledImages


class Drawn:
    """What the recipe learns from: the same images for VAE and teacher."""

    def __init__(self, images: LabelledImages) -> None:
        """Take images of 64 x 64 pixels with their classes."""
        self.prompts = images.prompts
        self._drawn = images

    def of_any_style(self, count: int, draw: torch.Generator) -> Tensor:
        """Some of the images."""
        return self._drawn.images[torch.randint(len(self._drawn.images), (count,), generator=draw)]

    def base(self, copies: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of the images; no copies, no other draws."""
        yield self._drawn.images, self._drawn.labels


def train_drawn(images: LabelledImages, folder: Path, quick: bool = False) -> None:
    """Train a generator of them and write ``folder``/pipeline; finished stages are kept."""
    steps = (2, 2, 2, 32) if quick else (1200, 1500, 600, 4800)
    vae, teacher, distill, pairs = steps
    config = TrainConfig(
        folder, "distill", vae_steps=vae, teacher_steps=teacher, distill_steps=distill,
        distill_pairs=pairs, solver_steps=2 if quick else 8,
    )  # fmt: skip
    train_pipeline(config, Drawn(images))
