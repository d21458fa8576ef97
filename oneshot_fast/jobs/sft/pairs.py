"""The matched pairs of a training, read and encoded once."""

import contextlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from oneshot_fast.data.image_refs import file_sha256
from oneshot_fast.data.images import crop_loss, cut_warning
from oneshot_fast.data.manifests import MatchedPair
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.data.records import Failure
from oneshot_fast.data.sizes import Size
from oneshot_fast.errors import DataError, UserError
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.runtime.processes import map_over_processes
from oneshot_fast.training.run import contents_of


@dataclass(frozen=True)
class Examples:
    """Everything the training reads, on the CPU.

    Attributes:
        pairs: n matched pairs.
        noises: n of [C, h, w] float32; sizes differ where there are buckets.
        latents: Target latents, the same.
        cut_images: What is to be said of images that a crop takes too much of; None: nothing.
    """

    pairs: list[MatchedPair]
    noises: list[Tensor]
    latents: list[Tensor]
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
            cut.append((pair.image_path, found[2]))
            targets.keep(found[1], *pair.place)
        if not usable:
            raise UserError(f"no pair of the manifest can be used; the first: {failures[0].reason}")
        said = cut_warning(cut, '"resize_mode": "pad" in the manifest keeps all of them')
        return cls(usable, noises, latents, said)

    @property
    def contents(self) -> dict[str, Any]:
        """What a training goes on with."""
        return contents_of(self.pairs, self.noises, self.latents)

    @property
    def kinds(self) -> list[Hashable]:
        """What the pairs of a batch have in common: their size, and whether it is a bucket's."""
        return [
            (noise.shape, pair.frame is None)
            for noise, pair in zip(self.noises, self.pairs, strict=True)
        ]


def read_pairs(
    generator: Generator, targets: TargetImages, pairs: Sequence[MatchedPair]
) -> list[tuple[Tensor, Tensor, float] | str]:
    """Of each pair what ``_read`` returns, or what is wrong; each process does its part."""

    def read(k: int) -> tuple[Tensor, Tensor, float] | str:
        try:
            return _read(pairs[k], targets, generator)
        except DataError as error:
            return str(error)

    return map_over_processes(read, len(pairs))


def size_of_pairs(generator: Generator, pairs: Sequence[MatchedPair]) -> Size:
    """That of the first noise that can be read; of pairs in buckets the size that most have.

    Raises:
        DataError: If no noise can be read.
    """
    plain = [pair for pair in pairs if pair.frame is None]
    if not plain:
        sizes = Counter(pair.frame.size for pair in pairs if pair.frame is not None)
        return sizes.most_common(1)[0][0]
    for pair in plain[:-1]:
        with contextlib.suppress(DataError):
            return generator.size_of_noise(read_noise(pair.noise_path, pair.noise_index).shape)
    return generator.size_of_noise(read_noise(plain[-1].noise_path, plain[-1].noise_index).shape)


def _read(
    pair: MatchedPair, targets: TargetImages, generator: Generator
) -> tuple[Tensor, Tensor, float]:
    """Noise and target latent of one pair, [C, h, w] float32 on the CPU.

    The third is the part of the image that a crop takes away, of what no assignment spoke of.

    Raises:
        DataError: If one of them cannot be read, or does not fit.
    """
    noise = read_noise(pair.noise_path, pair.noise_index)
    size = targets.size if pair.frame is None else pair.frame.size
    try:
        shape = generator.noise_shape(*size)
    except UserError as error:
        raise DataError(f"{pair.image_path}: {error}") from None
    if noise.shape != shape:
        raise DataError(
            f"{pair.noise_path}: the noise is {list(noise.shape)}, the model takes {list(shape)}"
        )
    if pair.image_sha256 not in (None, file_sha256(pair.image_path)):
        raise DataError(f"{pair.image_path} changed after its noise was assigned")
    is_new = pair.image_sha256 is None and pair.resize_mode == "crop"
    cut = crop_loss(pair.image_path, size) if is_new else 0.0
    return noise, targets.latent(*pair.place), cut
