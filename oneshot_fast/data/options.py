"""Which pairs are read, and how: the flags of every command that takes images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from oneshot_fast.data.records import Failure, Record
    from oneshot_fast.data.sources import Source


@dataclass(frozen=True)
class DataOptions:
    """Which pairs, and how their images are read."""

    data_root: str | None = None
    """Folder with pairs.jsonl ({"prompt", "image"}), metadata.jsonl (file_name, text), WebDataset
    *.tar or *.parquet; or one such file, or a pattern of shards with * or {000..123}, also a URL
    such as hf://datasets/user/name/*.parquet or s3://bucket/{000..123}.tar."""
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
    resolution: int | None = None
    """Image side in pixels; by default the model's own (512 for SDXL-Turbo)."""
    resize_mode: Literal["crop", "squash"] = "crop"
    """Other aspect ratios: cut the centre square, or squash to a square."""

    def open(self, data_root: str | Path) -> Source:
        """The data set in ``data_root`` as a stream, read as these options say."""
        from oneshot_fast.data.sources import open_source

        return open_source(
            data_root,
            prompt_field=self.prompt_field,
            image_field=self.image_field,
            start_index=self.start_index,
            max_samples=self.max_samples,
            allow_outside_root=self.allow_outside_root,
        )

    def read(self, data_root: str | Path) -> tuple[list[Record], list[Failure]]:
        """All records and failures of the data set in ``data_root``."""
        from oneshot_fast.data.records import Failure, Record

        items = list(self.open(data_root))
        records = [item for item in items if isinstance(item, Record)]
        return records, [item for item in items if isinstance(item, Failure)]
