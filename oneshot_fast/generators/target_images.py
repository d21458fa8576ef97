"""Target images and their latents, each decoded and encoded once."""

import contextlib
from functools import lru_cache

import torch
from torch import Tensor

from oneshot_fast.data.image_refs import ImageRef, file_sha256
from oneshot_fast.data.images import load_image, sides_of
from oneshot_fast.errors import DataError, require
from oneshot_fast.generators.base import Generator
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main

_LATENT_BYTES = 4 << 30  # 65,536 latents of 512 x 512 pixels: a data set may be a long stream
_FAR = 8  # times: a native size that is so much larger than the images is warned of
_IMAGE_BYTES = 128 << 20  # 42 images: latent, features and losses of a batch read them in turn


class TargetImages:
    """Images of one size and their latents, by path; the last of both are kept in memory.

    Images are encoded one by one, so a latent never depends on its neighbours' rounding.
    """

    def __init__(self, generator: Generator, resolution: int | None = None) -> None:
        """Bind the generator's encoder.

        Args:
            generator: Its VAE encodes; it is not trained.
            resolution: Image side in pixels; default the generator's own.

        Raises:
            UserError: If the model makes no images of that side.
        """
        factor = generator.size_multiple
        self.resolution = generator.image_size if resolution is None else resolution
        require(
            self.resolution > 0 and self.resolution % factor == 0,
            f"resolution {self.resolution} is not a positive multiple of {factor}",
        )
        self._generator = generator
        side, kept = self.resolution, max(1, _IMAGE_BYTES // (12 * self.resolution**2))
        self._load = lru_cache(kept)(lambda path, mode: load_image(path, side, side, mode))
        self._latents: dict[tuple[ImageRef, str], Tensor] = {}

    def warn_of_size(self, path: ImageRef) -> None:
        """Say on stderr if the model is made for images of 8 times the size of this one, or more.

        At sizes that it has never seen a model makes little sense, and enlarged images teach blur.
        """
        native = self._generator.image_size
        with contextlib.suppress(DataError):  # it fails alone, later
            side = min(self.resolution, *sides_of(path))
            if native >= _FAR * side and is_main():
                say(
                    f"warning: the model is made for {native} x {native} pixels, {path} is taken "
                    f"at {side}: take larger images, or a model of that size"
                )

    def latent(self, path: ImageRef, resize_mode: str) -> Tensor:
        """Scaled latent [C, h, w] float32 of the image at ``path``, on the CPU.

        Raises:
            DataError: If the image cannot be read.
        """
        key = (path, resize_mode)
        if key not in self._latents:
            latent = self._generator.cached_latent(
                lambda: self.image(path, resize_mode),
                lambda: (file_sha256(path), resize_mode, self.resolution),
            )
            self.keep(path, resize_mode, latent)
        return self._latents[key]

    def keep(self, path: ImageRef, resize_mode: str, latent: Tensor) -> None:
        """Remember the latent [C, h, w] float32 of an image, whichever process encoded it."""
        self._latents[path, resize_mode] = latent
        if len(self._latents) * latent.nbytes > _LATENT_BYTES:
            del self._latents[next(iter(self._latents))]  # the oldest

    def image(self, path: ImageRef, resize_mode: str) -> Tensor:
        """Image [3, H, W] float32 in [0, 1] at the working resolution, on the CPU.

        Raises:
            DataError: If the image cannot be read.
        """
        return self._load(path, resize_mode)

    def latents(self, paths: list[tuple[ImageRef, str]]) -> Tensor:
        """Latents [B, C, h, w] of (path, resize mode) pairs, on the generator's device."""
        return torch.stack([self.latent(*pair) for pair in paths]).to(self._generator.device)

    def images(self, paths: list[tuple[ImageRef, str]]) -> Tensor:
        """Images [B, 3, H, W] of (path, resize mode) pairs, on the generator's device."""
        return torch.stack([self.image(*pair) for pair in paths]).to(self._generator.device)
