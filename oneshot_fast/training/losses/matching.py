"""Latent-matched SFT: what the generator makes of a noise against that noise's own target.

    L = w_latent mean (x0 - target)^2 + w_pixel mean |decoder(x0) - image|,   x0 = x - sigma output

Regression on pairs of noise and image, as of DMD (Yin et al. 2023, arXiv 2311.18828, section 3.3)
and of reflow (Liu et al. 2022, arXiv 2209.03003), but the images are given and their noises found.
"""

from dataclasses import dataclass

from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.generators.base import Generator, Prediction
from oneshot_fast.training.batch import Rows


@dataclass(frozen=True)
class Matching:
    """Distance of latents, and of images, to those in ``rows.extra``.

    "latents" are [B, C, h, w] float32; "images", only with a pixel weight, [B, 3, H, W] in [0, 1].

    Attributes:
        latent_weight: Of the mean squared error of the latents.
        pixel_weight: Of the mean absolute error of the images; 0 never decodes.
    """

    latent_weight: float = 1.0
    pixel_weight: float = 0.0

    def __call__(self, generator: Generator, made: Prediction, rows: Rows) -> Tensor:
        """See ``Term``."""
        latent = ops.latent_mse(made.output, made.x, rows.extra["latents"], made.sigma)
        loss = self.latent_weight * latent.sum() / len(rows)
        if self.pixel_weight:
            raw, images = generator.decode_raw(made.latents), self.images(generator, rows)
            loss = loss + self.pixel_weight * ops.pixel_l1(raw, images).mean()
        return loss

    def images(self, generator: Generator, rows: Rows) -> Tensor:
        """Target images, [B, 3, H, W] in [0, 1]."""
        images: Tensor = rows.extra["images"]
        return images
