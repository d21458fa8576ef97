"""Small data sets of shards: every image is of one grey level, which its prompt names."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from oneshot_fast.data.images import load_image
from oneshot_fast.data.records import Failure, Record
from oneshot_fast.data.sources import Source

# a folder or URL, and how a file is written into it
Place = tuple[str, Callable[[str, bytes], None]]


def png(grey: int, suffix: str = "png") -> bytes:
    """An image of one grey level, which tells it from every other."""
    buffer = io.BytesIO()
    Image.new("L", (9, 7), grey).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
    return buffer.getvalue()


def grey(record: Record) -> int:
    return round(float(load_image(record.image_path, 4, 4).mean()) * 255)


def tar(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def samples(first: int, last: int, suffix: str = "png") -> list[tuple[str, bytes]]:
    """Members of samples named by number, of that grey, captioned by that number."""
    return [
        member
        for number in range(first, last)
        for member in (
            (f"{number:06d}.{suffix}", png(number, suffix)),
            (f"{number:06d}.txt", f"grey {number}\n".encode()),
        )
    ]


def parquet(rows: list[dict[str, Any]], group: int = 4) -> bytes:
    arrow, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    buffer = io.BytesIO()
    pq.write_table(arrow.Table.from_pylist(rows), buffer, row_group_size=group)
    return buffer.getvalue()


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": png(n), "path": None}, "text": f"grey {n}", "n": n}
        for n in range(first, last)
    ]


def split(source: Source) -> tuple[list[Record], list[Failure]]:
    items = list(source)
    return (
        [item for item in items if isinstance(item, Record)],
        [item for item in items if isinstance(item, Failure)],
    )


def write(path: Path, body: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(body)


def place(where: str, tmp_path: Path) -> Place:
    """A new folder, "local" or in fsspec's "memory"."""
    if where == "local":
        return str(tmp_path / "set"), lambda name, body: write(tmp_path / "set" / name, body)
    fs = fsspec.filesystem("memory")
    return f"memory://{tmp_path}", lambda name, body: fs.pipe(f"{tmp_path}/{name}", body)
