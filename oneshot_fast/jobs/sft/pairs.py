"""The matched pairs of a training: read and encoded once, and then from disk as it goes on."""

import contextlib
from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from oneshot_fast.data.image_refs import ImageRef, file_sha256
from oneshot_fast.data.images import MUCH, crop_loss, cut_warning
from oneshot_fast.data.manifests import MatchedPair
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.data.records import Failure
from oneshot_fast.data.sizes import Size
from oneshot_fast.errors import DamagedError, DataError, UserError
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.runtime.files import read_metadata, read_safetensors, write_safetensors
from oneshot_fast.runtime.processes import map_over_processes
from oneshot_fast.runtime.stored import View, Without
from oneshot_fast.training.run import contents_of

Kind: TypeAlias = tuple[tuple[int, ...], bool]  # shape of the noise, and whether it is no bucket's
_ROWS = 64  # pairs whose latents are in one file
_OPEN = 64  # files that are kept open


class Examples:
    """What the training reads: noises in their shards, and target latents in ``folder``.

    Both are read when a batch needs them, through memory maps.

    Attributes:
        pairs: n matched pairs.
        kinds: What the pairs of a batch have in common: their size, and whether it is a bucket's.
        cut_images: What is to be said of images that a crop takes too much of; None: nothing.
    """

    def __init__(
        self,
        generator: Generator,
        targets: TargetImages,
        pairs: Sequence[MatchedPair],
        failures: list[Failure],
        folder: Path,
        left_out: Container[str] = (),
    ) -> None:
        """Read the noises of ``pairs`` and encode their targets; each process does its part of it.

        Args:
            generator: Gives the shape of a noise.
            targets: Reads and encodes the target images.
            pairs: What to read.
            failures: Takes the pairs that cannot be read.
            folder: Takes the latents; those that are there already are not encoded again.
            left_out: Ids of pairs that are not to be read.

        Raises:
            UserError: If no pair can be used.
        """
        self._folder, known, numbers = folder, dict[Kind, int](), array("H")
        # by NumPy: safetensors 0.8 never frees 64 bytes of a tensor of torch's
        self._open = lru_cache(_OPEN)(lambda path: safe_open(path, framework="np"))
        cut, digests = list[tuple[ImageRef, float]](), [sha256(), sha256()]
        absent = list[int]()  # places of the list that was given

        def read(start: int) -> _Block:
            block = pairs[start : start + _ROWS]
            return _encode(generator, targets, block, self._path(start), left_out)

        given = iter(enumerate(pairs))
        for block in map_over_processes(read, range(0, len(pairs), _ROWS)):
            for digest, more in zip(digests, (block.noises, block.latents), strict=True):
                digest.update(more)
            for result in block.results:
                place, pair = next(given)
                if isinstance(result, tuple):
                    shape, lost = result
                    numbers.append(known.setdefault((shape, pair.frame is None), len(known)))
                    if lost > MUCH:
                        cut.append((pair.image_path, lost))
                    continue
                absent.append(place)
                if result is not None:
                    failures.append(Failure(result, pair.line or None, pair.id, pair.prompt))
        self._places = Without(len(pairs), absent)
        self.pairs: Sequence[MatchedPair] = View(pairs, lambda pair: pair, self._places)
        self.kinds: Sequence[Kind] = View([*known], lambda kind: kind, numbers)
        if not self.pairs:
            raise UserError(f"no pair of the manifest can be used; the first: {failures[0].reason}")
        keeps = '"resize_mode": "pad" in the manifest keeps all of them'
        self.cut_images = cut_warning(cut, keeps)
        self._digests = [digest.hexdigest() for digest in digests]

    @property
    def contents(self) -> dict[str, Any]:
        """What a training goes on with."""
        return contents_of(self.pairs, *self._digests)

    def shape(self, row: int) -> tuple[int, ...]:
        """[C, h, w] of a pair's noise."""
        return self.kinds[row][0]

    def noises(self, rows: Sequence[int]) -> Tensor:
        """Those of pairs of one kind, [B, C, h, w] float32 on the CPU."""
        pairs = [self.pairs[k] for k in rows]
        return torch.stack([read_noise(x.noise_path, x.noise_index, verify=False) for x in pairs])

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Of the targets of pairs of one kind, [B, C, h, w] float32 on the CPU."""
        return torch.stack([self._latent(k) for k in rows])

    def _latent(self, row: int) -> Tensor:
        place = self._places[row]
        file: Any = self._open(self._path(place))
        return torch.from_numpy(file.get_tensor(_name(self.pairs[row])))

    def _path(self, place: int) -> Path:
        """File of the latents of a pair and its neighbours in the list."""
        return self._folder / f"{place // _ROWS:08d}.safetensors"


@dataclass(frozen=True)
class Texts(Iterable[str]):
    """All captions of some pairs, and a few more."""

    pairs: Sequence[MatchedPair]
    more: Sequence[str] = ()

    def __iter__(self) -> Iterator[str]:
        for pair in self.pairs:
            yield from (pair.prompt, *pair.prompts)
        yield from self.more


@dataclass(frozen=True)
class _Block:
    """What is known of neighbours in the list.

    Attributes:
        results: Of each the shape of its noise, and the part of its image that a crop takes away,
            of what no assignment spoke of; or what is wrong; None: it is not to be read.
        noises: Hashes of the noises, one after another.
        latents: Hashes of the latents.
    """

    results: list[tuple[tuple[int, ...], float] | str | None]
    noises: bytes
    latents: bytes


def _encode(
    generator: Generator,
    targets: TargetImages,
    pairs: Sequence[MatchedPair],
    path: Path,
    left_out: Container[str],
) -> _Block:
    """Read some pairs, and keep their latents in a file, by id."""
    latents, images = dict[str, Tensor](), dict[str, str]()
    with contextlib.suppress(DamagedError, FileNotFoundError):
        latents, images = read_safetensors(path), read_metadata(path, "images")
    known, shapes, digests = {**images}, dict[torch.Size, torch.Size](), (bytearray(), bytearray())
    results = list[tuple[tuple[int, ...], float] | str | None]()
    for pair in pairs:
        if pair.id in left_out:
            results.append(None)
            continue
        try:
            noise, lost = _read(pair, targets, generator)
            name, image = _name(pair), pair.image_sha256 or file_sha256(pair.image_path)
            if images.get(name) != image:
                latents[name] = targets.latent(*pair.place)
                images[name] = image
        except DataError as error:
            results.append(str(error))
            continue
        results.append((shapes.setdefault(noise.shape, noise.shape), lost))
        for digest, tensor in zip(digests, (noise, latents[name]), strict=True):
            digest += sha256(tensor.numpy().data).digest()
    if known != images:
        write_safetensors(path, latents, {"images": images})
    return _Block(results, *map(bytes, digests))


def _name(pair: MatchedPair) -> str:
    """Of its latent; an id may be any text."""
    return f"latent {pair.id}"


def can_be_read(
    generator: Generator, targets: TargetImages, pairs: Sequence[MatchedPair]
) -> list[bool]:
    """Of each pair whether it can be used; each process does its part."""

    def read(pair: MatchedPair) -> bool:
        with contextlib.suppress(DataError):
            _read(pair, targets, generator)
            targets.latent(*pair.place)
            return True
        return False

    return [*map_over_processes(read, pairs)]


def size_of_pairs(generator: Generator, pairs: Sequence[MatchedPair]) -> Size:
    """That of the first noise that can be read; of pairs in buckets the size that most have.

    Raises:
        DataError: If no noise can be read.
    """
    wrong: DataError | None = None
    for pair in (pair for pair in pairs if pair.frame is None):
        try:
            return generator.size_of_noise(read_noise(pair.noise_path, pair.noise_index).shape)
        except DataError as error:
            wrong = error
    if wrong is not None:
        raise wrong
    sizes = Counter(pair.frame.size for pair in pairs if pair.frame is not None)
    return sizes.most_common(1)[0][0]


def _read(pair: MatchedPair, targets: TargetImages, generator: Generator) -> tuple[Tensor, float]:
    """Noise of one pair, [C, h, w] float32, and what a crop takes of its image, see ``_Block``.

    Raises:
        DataError: If it cannot be read, or does not fit the image.
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
    return noise, cut
