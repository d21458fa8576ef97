"""Target images and their latents, each decoded and encoded once."""

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from oneshot_fast.data.image_refs import ImageRef, file_sha256
from oneshot_fast.data.images import load_image, size_in
from oneshot_fast.data.sizes import Resolution, Size, size_fields, size_of
from oneshot_fast.errors import DataError, require
from oneshot_fast.generators.base import Generator
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main

_FAR = 8  # times: a native size that is so much larger than the images is warned of
_IMAGE_BYTES = 128 << 20  # 42 images: latent, features and losses of a batch read them in turn
# of an image: its path, resize mode, and size if it has its own
Place: TypeAlias = tuple[ImageRef, str] | tuple[ImageRef, str, Size | None]


class TargetImages:
    """Images and their latents, by path; the last of both are kept in memory.

    Images are encoded one by one, so a latent never depends on its neighbours' rounding.
    """

    def __init__(
        self,
        generator: Generator,
        resolution: Resolution | None = None,
        latent_bytes: int = 4 << 30,
    ) -> None:
        """Bind the generator's encoder.

        Args:
            generator: Its VAE encodes; it is not trained.
            resolution: Image side in pixels, or height and width; default the generator's own.
            latent_bytes: Most of the latents in memory, by default 65,536 of 512 x 512 pixels: a
                data set may be a long stream.

        Raises:
            UserError: If the model makes no images of that size.
        """
        factor = generator.size_multiple
        self.size = size_of(generator.image_size if resolution is None else resolution)
        square = self.size[0] == self.size[1]
        for name, side in zip(("height", "width"), self.size, strict=True):
            require(
                side > 0 and side % factor == 0,
                f"{'resolution' if square else name} {side} is not a positive multiple of {factor}",
            )
        self._generator, self._latent_bytes = generator, latent_bytes
        kept = max(1, _IMAGE_BYTES // (12 * self.size[0] * self.size[1]))
        self._load = lru_cache(kept)(
            lambda path, mode, size: load_image(path, size[0], size[1], mode)
        )
        self._latents: dict[tuple[ImageRef, str, Size], Tensor] = {}

    def warn_of_size(self, path: ImageRef) -> None:
        """Say on stderr if the model is made for images of 8 times the size of this one, or more.

        At sizes that it has never seen a model makes little sense, and enlarged images teach blur.
        """
        native = self._generator.image_size
        with contextlib.suppress(DataError):  # it fails alone, later
            side = min(*self.size, *size_in(path, upright=False))
            if native >= _FAR * side and is_main():
                say(
                    f"warning: the model is made for {native} x {native} pixels, {path} is taken "
                    f"at {side}: take larger images, or a model of that size"
                )

    def latent(self, path: ImageRef, resize_mode: str, size: Size | None = None) -> Tensor:
        """Scaled latent [C, h, w] float32 of the image at ``path``, on the CPU.

        It is of this size, by default that of all.

        Raises:
            DataError: If the image cannot be read.
        """
        key = (path, resize_mode, size or self.size)
        if key not in self._latents:
            latent = self._generator.cached_latent(
                lambda: self.image(*key),
                lambda: (file_sha256(path), resize_mode, *size_fields(key[2]).values()),
            )
            self.keep(latent, *key)
        return self._latents[key]

    def keep(
        self, latent: Tensor, path: ImageRef, resize_mode: str, size: Size | None = None
    ) -> None:
        """Remember the latent [C, h, w] float32 of an image, whichever process encoded it."""
        self._latents[path, resize_mode, size or self.size] = latent
        if len(self._latents) * latent.nbytes > self._latent_bytes:
            del self._latents[next(iter(self._latents))]  # the oldest

    def image(self, path: ImageRef, resize_mode: str, size: Size | None = None) -> Tensor:
        """Image [3, H, W] float32 in [0, 1], of this size or else that of all, on the CPU.

        Raises:
            DataError: If the image cannot be read.
        """
        return self._load(path, resize_mode, size or self.size)

    def latents(self, places: Sequence[Place]) -> Tensor:
        """Latents [B, C, h, w] of images, which are of one size, on the generator's device."""
        return torch.stack([self.latent(*place) for place in places]).to(self._generator.device)

    def images(self, places: Sequence[Place]) -> Tensor:
        """Images [B, 3, H, W], which are of one size, on the generator's device."""
        return torch.stack([self.image(*place) for place in places]).to(self._generator.device)
