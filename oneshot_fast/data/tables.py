"""Columns of Parquet files, some rows at a time, and how large what lies in them is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from oneshot_fast.errors import DataError, one_line

_ROWS = 1024  # read at once
_BYTES = 64 << 20  # read at once, as the file says; of texts no page may have more
IMAGES = 1 << 30  # bytes of a page of images, which may have a thousand of them
_HEADER = 1 << 16  # bytes, of a page


def extra_module(name: str) -> Any:
    """Import a module of the optional extra "data".

    Raises:
        DataError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise DataError(
            f"this data set needs the library {name.partition('.')[0]}: "
            "pip install oneshot-fast[data] (quote it in zsh)"
        ) from None


def open_parquet(file: BinaryIO, *columns: str) -> Any:
    """A pyarrow ParquetFile; what ``columns`` repeat is held once.

    Raises:
        DataError: pyarrow is not installed.
        Exception: the file is damaged.
    """
    parquet = extra_module("pyarrow.parquet")
    about = parquet.read_metadata(file)
    leaves = [about.schema.column(k) for k in range(about.num_columns)]
    texts = [
        leaf.path
        for leaf in leaves
        if leaf.physical_type == "BYTE_ARRAY" and any(_is_of(leaf.path, x) for x in columns)
    ]
    return parquet.ParquetFile(file, metadata=about, read_dictionary=texts, buffer_size=1 << 20)


def parquet_rows(file: BinaryIO, table: Any, group: int, columns: list[str]) -> Iterator[Any]:
    """Rows of a row group of a ParquetFile, a dict of some columns each.

    Raises:
        DataError: a text is too long to be read.
    """
    size = sum(check_pages(file, table, group, column, _BYTES) for column in columns)
    count = min(_ROWS, max(1, _BYTES * table.metadata.row_group(group).num_rows // max(1, size)))
    # a thread that still reads when the process ends would make it hang or abort (pyarrow 26)
    parts = table.iter_batches(count, row_groups=[group], columns=columns, use_threads=False)
    for part in parts:
        for cells in zip(*(part[column] for column in columns), strict=True):
            yield {name: cell.as_py() for name, cell in zip(columns, cells, strict=True)}


def read_rows(
    path: Path, columns: Sequence[str], check: Callable[[list[str]], None]
) -> Iterator[tuple[int, int, Any]]:
    """Rows of a Parquet file: row group, row of it, and a dict of some columns.

    Args:
        path: The file.
        columns: Which ones.
        check: Told the names that there are; raises DataError where they are not those.

    Raises:
        DataError: the file is damaged, or pyarrow is not installed, or by ``check``.
    """
    with path.open("rb") as file:
        try:
            table = open_parquet(file, *columns)
            check(table.schema_arrow.names)
            for group in range(table.num_row_groups):
                for row, cells in enumerate(parquet_rows(file, table, group, [*columns])):
                    yield group, row, cells
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except Exception as error:  # damaged bytes raise nearly any class
            raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def check_pages(file: BinaryIO, table: Any, group: int, column: str, limit: int) -> int:
    """Bytes of a column in a row group; a page of it, which is read as a whole, must be small.

    Every page begins with its sizes (https://parquet.apache.org/docs/file-format/data-pages), which
    are looked at where all pages together are too large.

    Raises:
        DataError: a page has more than ``limit`` bytes.
    """
    about, total = table.metadata.row_group(group), 0
    for chunk in (about.column(k) for k in range(about.num_columns)):
        if not _is_of(chunk.path_in_schema, column):
            continue
        total += chunk.total_uncompressed_size
        at = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
        end = at + chunk.total_compressed_size if chunk.total_uncompressed_size > limit else at
        while at < end:
            file.seek(at)
            header = _Header(file.read(_HEADER))
            if header.size > limit:
                raise DataError(
                    f"'{column}' has {header.size:,} bytes in one page of row group {group}, more "
                    f"than {limit >> 20} MB: shorten it, or write smaller row groups"
                )
            at += header.length + header.stored
    return total


def _is_of(path: str, column: str) -> bool:
    return path == column or path.startswith(f"{column}.")


class _Header:
    """Sizes that a page's header states: Thrift's compact protocol, as far as headers use it."""

    def __init__(self, data: bytes) -> None:
        self._data, self.length = data, 0
        fields = self._struct()
        self.size, self.stored = (max(0, int(fields[k])) for k in (2, 3))  # in bytes

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self.length]
            self.length += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _struct(self) -> dict[int, Any]:
        found: dict[int, Any] = {}
        field = 0
        while head := self._data[self.length]:
            self.length += 1
            field = field + (head >> 4) if head >> 4 else self._integer()
            found[field] = self._value(head & 15)
        self.length += 1
        return found

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 8:
            size = self._varint()
            self.length += size
            return size
        if kind == 12:
            return self._struct()
        raise DataError("a page has a header of another form")
