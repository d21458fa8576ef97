"""Which pairs are read, and how: the flags of every command that takes images."""

from dataclasses import dataclass
from typing import Literal

from oneshot_fast.errors import DataError


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
class DataOptions(Selection):
    """Which pairs, and how their images are read."""

    data_root: str | None = None
    """Folder with pairs.jsonl ({"prompt", "image"}), metadata.jsonl (file_name, text), WebDataset
    *.tar or *.parquet; or one such file, or a pattern of shards with * or {000..123}, also a URL
    such as hf://datasets/user/name/*.parquet or s3://bucket/{000..123}.tar."""
    resolution: int | None = None
    """Image side in pixels; by default the model's own (512 for SDXL-Turbo)."""
    resize_mode: Literal["crop", "squash", "pad"] = "crop"
    """Other aspect ratios: cut the centre square, squash to a square, or pad with black."""
