"""Images that are no files of their own: parts of tar shards and Parquet files, fsspec URLs."""

import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import quote, unquote

from oneshot_fast.data.tables import IMAGES, check_pages, extra_module, open_parquet
from oneshot_fast.errors import DataError, one_line

_SPAN = re.compile(r"(\d{1,18})\+(\d{1,18})")
_CELL = re.compile(r"([^#:]+):(\d{1,18}):(\d{1,18})")
_REFERENCE = re.compile(rf"(.+)#({_SPAN.pattern}|{_CELL.pattern})", re.DOTALL)
_BATCH = 64  # rows of an image column that are decoded, and kept, at once
_composed = partial(unicodedata.normalize, "NFC")


@dataclass(frozen=True)
class Member:
    """An image inside a larger file, or behind an fsspec URL; its text is `file#place`.

    `place` is "offset+length" in bytes for a tar shard, "column:row group:row" for Parquet (column
    percent-encoded, numbers from 0, the row within its group), and "" for the whole file.
    """

    file: str  # absolute path, or fsspec URL
    place: str = ""

    def __str__(self) -> str:
        return f"{self.file}#{self.place}" if self.place else self.file

    def read(self) -> bytes:
        """The image's bytes; nothing else of a tar shard is read, of Parquet a part of the group.

        Raises:
            DataError: there is no such file or place in it, or it cannot be read.
        """
        try:
            if span := _SPAN.fullmatch(self.place):
                return _read_span(self.file, int(span[1]), int(span[2]))
            if cell := _CELL.fullmatch(self.place):
                return _read_cell(self.file, unquote(cell[1]), int(cell[2]), int(cell[3]))
            with open_file(self.file) as file:
                return file.read()
        except FileNotFoundError:
            raise DataError(f"{self}: no such file") from None
        except Exception as error:  # each of fsspec's file systems has errors of its own
            raise DataError(f"{self}: cannot be read: {one_line(error)}") from error


ImageRef: TypeAlias = Path | Member


def cell_place(column: str, group: int, row: int) -> str:
    """Place of a row of a Parquet file in a `Member`."""
    return f"{quote(column, safe='')}:{group}:{row}"


def image_ref(text: str, *folders: Path) -> ImageRef:
    """Read back an image from the text that `image_text` or `str` made of it.

    Args:
        text: path of a file or `file#place`, absolute or relative to a folder, or an fsspec URL.
        *folders: where relative paths are looked for, in this order; by default where we are.

    Raises:
        DataError: no such local file; URLs are not asked.
    """
    folders = folders or (Path.cwd(),)
    found = _REFERENCE.fullmatch(text)
    if "://" in text:
        return Member(found[1], found[2]) if found else Member(text)
    try:
        return find_file(text, folders)
    except DataError:
        if not found:
            raise
        return Member(str(find_file(found[1], folders)), found[2])


def find_file(name: str, folders: Sequence[Path]) -> Path:
    """Absolute path of a file, absolute or in the first of the folders that has it.

    Raises:
        DataError: there is none.
    """
    for folder in folders:
        if path := existing(folder.absolute() / name):
            return path
    raise DataError(
        f"no such file: {name} (looked from {' and '.join(map(str, folders))})"
        + hint(name, folders[0])
    )


def existing(path: Path) -> Path | None:
    """The file ``path``, its name composed (NFC) or decomposed (NFD); None if there is none."""
    if not os.path.lexists(path) and not str(path).isascii():
        path = _spelled(path, _composed) or path
    return path if os.path.isfile(path) else None


def _loose(part: str) -> str:
    return _composed(part).casefold()


def hint(name: str, folder: Path) -> str:
    """What to say more of a file ``name`` that is not in ``folder``: the name it has, perhaps."""
    if re.match(r"[a-zA-Z][\w+.-]+:/", name):
        return ": URLs are not fetched here: download the file and give its path"
    near = _spelled(folder.absolute() / name.replace("\\", "/"), _loose)
    return f": there is {os.path.relpath(near, folder.absolute())}" if near else ""


def _spelled(path: Path, key: Callable[[str], str]) -> Path | None:
    """The file whose path equals ``path`` under ``key``, part by part."""
    found = Path(path.anchor)
    for part in path.parts[1:]:
        if os.path.lexists(found / part) or part == "..":
            found /= part
            continue
        try:
            names = _names(str(found), os.stat(found).st_mtime_ns, key)
        except OSError:
            return None
        if key(part) not in names:
            return None
        found /= names[key(part)]
    return found if os.path.isfile(found) else None


@lru_cache(maxsize=8)
def _names(folder: str, stamp: int, key: Callable[[str], str]) -> dict[str, str]:
    """Names in a folder by ``key``; ``stamp`` is its time of change."""
    return {key(name): name for name in sorted(os.listdir(folder))}


def image_text(image: ImageRef, folder: Path) -> str:
    """What a manifest in `folder` (absolute, symlinks resolved) holds: local paths relative."""
    if isinstance(image, Path):
        return os.path.relpath(image, folder)
    if "://" in image.file:
        return str(image)
    return str(Member(os.path.relpath(image.file, folder), image.place))


def file_sha256(image: ImageRef) -> str:
    """Sha256 of a file's, or an image's, bytes, as 64 hex digits.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if isinstance(image, Member):
            return hashlib.sha256(image.read()).hexdigest()
        digest = hashlib.sha256()
        with image.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{image}: cannot be read: {one_line(error.strerror)}") from error


def open_file(file: str) -> BinaryIO:
    """Open a local path or an fsspec URL for reading; it can seek."""
    if "://" not in file:  # fsspec would take a name with "::" for a chain
        return open(file, "rb")
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(file)
    return fs.open(path, "rb")


def need_readers(images: Iterable[ImageRef]) -> None:
    """Ask for the libraries that reading these images takes.

    Raises:
        DataError: one is not installed.
    """
    has_cells, protocols = False, set[str]()
    for image in images:  # there may be millions
        if isinstance(image, Member):
            has_cells = has_cells or _CELL.fullmatch(image.place) is not None
            protocols |= {image.file.partition("://")[0]} if "://" in image.file else set()
    if has_cells:
        extra_module("pyarrow.parquet")
    for protocol in sorted(protocols):
        try:
            extra_module("fsspec").get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise DataError(f"{protocol}:// cannot be read: {one_line(error)}") from None


def _read_span(file: str, offset: int, length: int) -> bytes:
    if "://" not in file:
        with open(file, "rb") as local:
            local.seek(offset)
            data = local.read(length)
    else:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(file)
        data = fs.cat_file(path, start=offset, end=offset + length)
    if len(data) != length:
        raise DataError("the file ends before it")
    return data


def _read_cell(file: str, column: str, group: int, row: int) -> bytes:
    """Bytes of a cell: binary, a struct with "bytes", or the path of a file beside the shard."""
    stat = None if "://" in file else os.stat(file)
    stamp = stat and (stat.st_mtime_ns, stat.st_size)  # a rewritten file is read anew
    cells = _read_cells(file, column, group, row // _BATCH, stamp)
    if row % _BATCH >= len(cells):
        raise DataError("no such row")
    cell = cells[row % _BATCH].as_py()
    for value in (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell,):
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return _read_beside(file, value)
    raise DataError(f"no image there: neither bytes nor a path but {type(cell).__name__}")


@lru_cache(maxsize=4)
def _read_cells(
    file: str, column: str, group: int, index: int, stamp: tuple[int, int] | None
) -> Any:
    """Cells of rows `index * _BATCH` and following of a row group; neighbours are read together."""
    with open_file(file) as opened:
        table = open_parquet(opened, column)
        if column not in table.schema_arrow.names:
            raise DataError(f"no column '{column}'")
        if group >= table.num_row_groups:
            raise DataError("no such row group")
        check_pages(opened, table, group, column, IMAGES)
        batches = table.iter_batches(_BATCH, row_groups=[group], columns=[column])
        batch = next(itertools.islice(batches, index, None), None)
        return [] if batch is None else batch.column(0)


def _read_beside(file: str, path: str) -> bytes:
    """A file named in a shard, which must not lead out of the shard's folder."""
    folder = file.rpartition("/")[0]
    if path.startswith(("http://", "https://")):
        raise DataError(f"{path}: URLs are not fetched here: download the file")
    outside = DataError(f"the path {path} leads out of the shard's folder")
    if "://" in path or path.startswith("/") or ".." in path.split("/"):
        raise outside
    if "://" not in file and not Path(os.path.realpath(f"{folder}/{path}")).is_relative_to(
        os.path.realpath(folder)
    ):
        raise outside
    with open_file(f"{folder}/{path}") as opened:
        return opened.read()
