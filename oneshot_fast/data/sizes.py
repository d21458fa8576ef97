"""Sizes of images, and the aspect-ratio buckets that images of many shapes are sorted into."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from oneshot_fast.errors import DataError, require

Size: TypeAlias = tuple[int, int]  # height and width, pixels
Resolution: TypeAlias = int | Size  # the side of a square, or height and width

_LONGEST = 2  # times the square's side: a bucket is at most 4 times as wide as high
_KEYS = ("target_size", "original_size", "crops_coords_top_left")


def size_of(resolution: Resolution) -> Size:
    """Height and width."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def size_fields(size: Size) -> dict[str, int]:
    """What a run's settings say of a size: of a square its side, as "resolution"."""
    height, width = size
    return {"resolution": height} if height == width else {"height": height, "width": width}


def part_cut(original: Size, size: Size) -> float:
    """Part of a picture that is cut away where it is scaled to cover ``size``."""
    aspect = original[1] * size[0] / (original[0] * size[1])
    return 1 - min(aspect, 1 / aspect)


@dataclass(frozen=True)
class Frame:
    """How a picture came to the size of a bucket, which is what SDXL is told of it.

    Attributes:
        size: Of what is left.
        original: Of the picture in its file, upright.
        corner: Rows and columns that were cut off above and to the left, once it was scaled.
    """

    size: Size
    original: Size
    corner: tuple[int, int]

    @property
    def fields(self) -> dict[str, list[int]]:
        """As diffusers' pipelines call these arguments, in a manifest's line."""
        return dict(zip(_KEYS, map(list, (self.size, self.original, self.corner)), strict=True))

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> "Frame":
        """That of a manifest's line.

        Raises:
            DataError: If something of it is missing or no pair of numbers.
        """

        def pair(key: str, least: int) -> tuple[int, int]:
            value: Any = line.get(key)
            fits = isinstance(value, list) and len(value) == 2
            if not fits or any(type(n) is not int or n < least for n in value):
                raise DataError(f"resize_mode bucket needs '{key}', rows and columns, in pixels")
            return value[0], value[1]

        return cls(*map(pair, _KEYS, (1, 1, 0)))


@dataclass(frozen=True)
class Buckets:
    """Sizes of about the same area, of which each picture takes the one that a crop costs least.

    Sides are multiples of a step, from half of the square's to twice of it, and none has more
    pixels than the square.
    """

    sizes: tuple[Size, ...]

    @classmethod
    def of(cls, side: int, step: int) -> "Buckets":
        """Those around a square.

        Args:
            side: Of the square, pixels; a multiple of ``step``.
            step: What sides are multiples of.

        Raises:
            UserError: If there is no other than the square.
        """
        require(
            side % step == 0,
            f"bucket_step {step} does not divide the resolution {side}; give one that does",
        )
        most = _LONGEST * side
        heights = range(step, most + 1, step)
        made = [(h, min(most, side * side // h // step * step)) for h in heights]
        half = [size for size in made if size[1] and _LONGEST * min(size) >= side]
        sizes = {*half, *((width, height) for height, width in half)}
        require(
            len(sizes) > 1,
            f"bucket_step {step} leaves no other size than {side} x {side}; give a smaller one",
        )
        return cls(tuple(sorted(sizes)))

    def frame(self, original: Size) -> Frame:
        """How a picture of this size is scaled and cut around its centre."""
        size = min(self.sizes, key=lambda size: part_cut(original, size))
        scale = max(new / old for new, old in zip(size, original, strict=True))
        rows, columns = (
            max(0, round((scale * old - new) / 2)) for new, old in zip(size, original, strict=True)
        )
        return Frame(size, original, (rows, columns))
