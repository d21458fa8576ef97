"""Which pairs are read, and how: the flags of every command that takes images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tyro.conf import UseAppendAction

from oneshot_fast.data.sizes import Resolution
from oneshot_fast.errors import DataError

# a flag for ``find_manifests``: several values, and several times
Manifests: TypeAlias = UseAppendAction[tuple[tuple[Path, ...], ...]]


@dataclass(frozen=True)
class Selection:
    """Which samples of a data set, and which of their fields."""

    prompt_field: str | None = None
    """Field or column of the prompt; by default prompt (text in metadata.jsonl), in shards the
    first of prompt, text and caption, and in tar shards before these the .txt member."""
    image_field: str | None = None
    """Field or column of the image; by default image (file_name in metadata.jsonl; in tar shards
    the extension jpg, jpeg, png or webp)."""
    start_index: int = 0
    """Records to skip at the start."""
    max_samples: int | None = None
    """Records to use at most."""
    allow_outside_root: bool = False
    """Accept image paths that leave the data folder."""

    def check(self) -> None:
        """Raise DataError unless the range of records makes sense."""
        if self.start_index < 0:
            raise DataError(f"start_index is {self.start_index}: give 0 or more")
        if self.max_samples is not None and self.max_samples < 1:
            raise DataError(f"max_samples is {self.max_samples}: give at least 1")


ALL = Selection()


@dataclass(frozen=True)
class SizeOptions:
    """How large images are."""

    resolution: int | None = None
    """Image side in pixels; by default the model's own (512 for SDXL-Turbo)."""
    width: int | None = None
    """With height, instead of resolution: width of the images in pixels."""
    height: int | None = None
    """With width, instead of resolution: height of the images in pixels."""

    @property
    def size(self) -> Resolution | None:
        """What is asked for, None if nothing is.

        Raises:
            DataError: If it is half of something, or two things.
        """
        if self.width is None and self.height is None:
            return self.resolution
        if self.width is None or self.height is None:
            raise DataError("--width and --height go together; give both, or --resolution")
        if self.resolution is not None:
            raise DataError("--resolution is for squares; leave it out, or --width and --height")
        return self.height, self.width


@dataclass(frozen=True)
class DataOptions(SizeOptions, Selection):
    """Which pairs, and how their images are read."""

    data_root: str | None = None
    """Folder with pairs.jsonl ({"prompt", "image"}), metadata.jsonl (file_name, text), WebDataset
    *.tar or *.parquet; or one such file, or a pattern of shards with * or {000..123}, also a URL
    such as hf://datasets/user/name/*.parquet or s3://bucket/{000..123}.tar."""
    resize_mode: Literal["crop", "squash", "pad", "bucket"] = "crop"
    """Images of another shape: cut the centre out, squash them, or pad them with black. bucket:
    each image keeps about its shape, at one of some sizes with sides that are multiples of
    bucket_step and as many pixels as resolution^2 or a few less; batches are of one size, and SDXL
    is told the original size and the crop."""
    bucket_step: int = 64
    """--resize_mode bucket: pixels; 8 or 16 for models of small images."""

    def check(self) -> None:
        """Raise DataError unless these flags make sense together."""
        super().check()
        if self.resize_mode != "bucket":
            if self.bucket_step != DataOptions.bucket_step:
                raise DataError("--bucket_step has no effect without --resize_mode bucket")
        elif isinstance(self.size, tuple):
            raise DataError(
                "--resize_mode bucket has its own sizes; give --resolution, not --width and "
                "--height"
            )
        _ = self.size
