"""The matched pairs of a training, read and encoded once."""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.data.image_refs import file_sha256
from oneshot_fast.data.images import MUCH, crop_loss, cut_warning
from oneshot_fast.data.manifests import MatchedPair
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.data.records import Failure
from oneshot_fast.errors import DataError, UserError
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.runtime.processes import map_over_processes


@dataclass(frozen=True)
class Examples:
    """Everything the training reads, on the CPU.

    Attributes:
        pairs: n matched pairs.
        noises: [n, C, h, w] float32.
        latents: Target latents, [n, C, h, w] float32.
        cut_images: What is to be said of images that a crop takes too much of; None: nothing.
    """

    pairs: list[MatchedPair]
    noises: Tensor
    latents: Tensor
    cut_images: str | None = None

    @classmethod
    def load(
        cls,
        generator: Generator,
        targets: TargetImages,
        pairs: Sequence[MatchedPair],
        failures: list[Failure],
    ) -> "Examples":
        """Read the noises of ``pairs`` and encode their targets; each process does its part of it.

        Args:
            generator: Gives the shape of a noise.
            targets: Reads and encodes the target images.
            pairs: What to read.
            failures: Takes the pairs that cannot be read.

        Raises:
            UserError: If no pair can be used.
        """
        usable, noises, latents, cut = [], [], [], []
        for pair, found in zip(pairs, read_pairs(generator, targets, pairs), strict=True):
            if isinstance(found, str):
                failures.append(Failure(found, pair.line or None, pair.id, pair.prompt))
                continue
            usable.append(pair)
            noises.append(found[0])
            latents.append(found[1])
            if found[2] > MUCH:
                cut.append(pair)
            targets.keep(pair.image_path, pair.resize_mode, found[1])
        if not usable:
            raise UserError(f"no pair of the manifest can be used; the first: {failures[0].reason}")
        remedy = '"resize_mode": "pad" in the manifest'
        said = cut_warning(len(cut), cut[0].image_path, remedy) if cut else None
        return cls(usable, torch.stack(noises), torch.stack(latents), said)

    @property
    def contents(self) -> dict[str, Any]:
        """What a training goes on with: ids, and hashes of noises and latents."""
        tensors = {"noises": self.noises, "latents": self.latents}
        hashes = {k: hashlib.sha256(v.numpy().data).hexdigest() for k, v in tensors.items()}
        return {"ids": [pair.id for pair in self.pairs], **hashes}


def read_pairs(
    generator: Generator, targets: TargetImages, pairs: Sequence[MatchedPair]
) -> list[tuple[Tensor, Tensor, float] | str]:
    """Of each pair what ``_read`` returns, or what is wrong; each process does its part."""
    shape = generator.noise_shape(targets.resolution, targets.resolution)

    def read(k: int) -> tuple[Tensor, Tensor, float] | str:
        try:
            return _read(pairs[k], targets, shape)
        except DataError as error:
            return str(error)

    return map_over_processes(read, len(pairs))


def first_noise_shape(pairs: Sequence[MatchedPair]) -> tuple[int, ...]:
    """Shape of the first noise that can be read; the others must be like it.

    Raises:
        DataError: If none can.
    """
    for pair in pairs[:-1]:
        with contextlib.suppress(DataError):
            return tuple(read_noise(pair.noise_path, pair.noise_index).shape)
    return tuple(read_noise(pairs[-1].noise_path, pairs[-1].noise_index).shape)


def _read(
    pair: MatchedPair, targets: TargetImages, shape: Sequence[int]
) -> tuple[Tensor, Tensor, float]:
    """Noise, of ``shape``, and target latent of one pair, [C, h, w] float32 on the CPU.

    The third is the part of the image that a crop takes away, of what no assignment spoke of.

    Raises:
        DataError: If one of them cannot be read, or does not fit.
    """
    noise = read_noise(pair.noise_path, pair.noise_index)
    if noise.shape != shape:
        raise DataError(
            f"{pair.noise_path}: the noise is {list(noise.shape)}, the model takes {list(shape)}"
        )
    if pair.image_sha256 not in (None, file_sha256(pair.image_path)):
        raise DataError(f"{pair.image_path} changed after its noise was assigned")
    is_new = pair.image_sha256 is None and pair.resize_mode == "crop"
    cut = crop_loss(pair.image_path) if is_new else 0.0
    return noise, targets.latent(pair.image_path, pair.resize_mode), cut
