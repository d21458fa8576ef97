"""Samples of one tar shard (WebDataset), Parquet or Arrow file, in order, their images not read."""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from oneshot_fast.data.image_refs import cell_place, open_file
from oneshot_fast.data.records import (
    MAX_LINE,
    MAX_TEXT,
    PROMPT_FIELDS,
    check_size,
    first_field,
    texts_field,
)
from oneshot_fast.data.tables import extra_module, open_parquet, parquet_rows
from oneshot_fast.errors import DataError, one_line

_IMAGES = ("jpg", "jpeg", "png", "webp")
# Everything up to the first dot of the last part is the key, the rest the extension: WebDataset's
# rule, see base_plus_ext in webdataset/tariterators.py.
_NAME = re.compile(r"((?:.*/|)[^.][^./]*)\.([^/]*)", re.DOTALL)
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: prompts and the image's place, or the reason why there is none."""

    key: str  # unique in the shard, unless the shard repeats a name
    prompts: tuple[str, ...] = ()  # several where there is a list of captions
    place: str = ""  # as in `Member`
    reason: str | None = None


@dataclass
class _Group:
    """Members of a tar shard with one key."""

    key: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension: offset, length
    repeated: str | None = None  # extension that two members have
    before_damage: bool = False


def read_tar(file: str, prompt_field: str | None, image_field: str | None) -> Iterator[Sample]:
    """Iterate over the samples of a tar shard.

    Args:
        file: path or fsspec URL of an uncompressed tar file.
        prompt_field: extension of the text member, or field of the .json member, with the prompt;
            by default .txt, else the first of prompt, text and caption in .json.
        image_field: extension of the image; by default the first of jpg, jpeg, png and webp.

    Raises:
        Exception: damage, after the whole samples before it; or the file cannot be read.
    """
    with open_file(file) as opened:
        for group in _groups(opened):
            try:
                extension = _image_extension(group, image_field)
                prompts = _tar_prompts(group, opened, prompt_field)
            except DataError as error:
                if not group.before_damage:  # what is missing is the damage's fault
                    yield Sample(group.key, reason=str(error))
                continue
            offset, length = group.spans[extension]
            yield Sample(f"{group.key}.{extension}", prompts, f"{offset}+{length}")


def read_parquet(file: str, prompt_field: str | None, image_field: str | None) -> Iterator[Sample]:
    """Iterate over the rows of a Parquet file; of its columns, only the prompts are read.

    Args:
        file: path or fsspec URL.
        prompt_field: column of the prompts; by default the first of prompt, text and caption.
        image_field: column of the images; by default image.

    Raises:
        DataError: no such column, or a library is missing.
        Exception: damage, after the rows before it; or the file cannot be read.
    """
    with open_file(file) as opened:
        names = open_parquet(opened).schema_arrow.names
        wanted = _column(names, prompt_field, PROMPT_FIELDS, "--prompt_field")
        images = _column(names, image_field, ("image",), "--image_field")
        table, number = open_parquet(opened, wanted), 0
        for group in range(table.num_row_groups):
            for row, cells in enumerate(parquet_rows(opened, table, group, [wanted])):
                yield _sample(number, cells[wanted], wanted, cell_place(images, group, row))
                number += 1


def read_arrow(file: str, prompt_field: str | None, image_field: str | None) -> Iterator[Sample]:
    """Iterate over the rows of an Arrow stream, as ``save_to_disk`` of Hugging Face's datasets.

    Args:
        file: path, or fsspec URL, which is copied to a temporary folder.
        prompt_field: column of the prompts; by default the first of prompt, text and caption.
        image_field: column of the images, bytes or a struct of bytes and path; by default image.

    Raises:
        DataError: no such column, or a library is missing.
        Exception: damage, after the rows before it; or the file cannot be read.
    """
    arrow, local = extra_module("pyarrow"), file
    if "://" in file:
        local = extra_module("fsspec").open_local(f"simplecache::{file}")
    with arrow.memory_map(local) as opened:
        whole, number = opened.read_buffer(), 0
        stream = arrow.ipc.open_stream(whole)
        wanted = _column(stream.schema.names, prompt_field, PROMPT_FIELDS, "--prompt_field")
        images = _column(stream.schema.names, image_field, ("image",), "--image_field")
        for batch in stream:
            for name in (images, wanted):
                batch[name].validate(full=True)  # damaged offsets lead anywhere
            for row, span in enumerate(_spans(batch[images], whole)):
                yield _sample(number, batch[wanted][row : row + 1], wanted, span)
                number += 1
        if bytes(whole[-len(_END) :]) != _END:
            raise DataError("no end mark: the shard is truncated")


def _sample(number: int, cell: Any, name: str, place: str | None) -> Sample:
    """The sample of a row of a table; ``cell`` is its prompt, or an Arrow array of it alone."""
    try:
        if place is None:
            raise DataError("has no image's bytes: save a column of the type datasets.Image")
        if hasattr(cell, "nbytes"):
            check_size(name, cell.nbytes, MAX_LINE)
            cell = cell[0].as_py()
        return Sample(str(number), texts_field({name: cell}, name), place)
    except DataError as error:
        return Sample(str(number), reason=str(error))


def _spans(column: Any, whole: Any) -> Iterator[str | None]:
    """Where the bytes of images lie in the mapped file, as places of `Member`; None: nowhere.

    Raises:
        DataError: the file is compressed.
    """
    data = column.field("bytes") if hasattr(column, "field") else column
    kind = {"binary": "i4", "large_binary": "i8"}.get(str(data.type))
    buffers = data.buffers()
    if kind is None or buffers[2] is None:
        yield from [None] * len(column)
        return
    first = buffers[2].address - whole.address
    if not 0 <= first <= whole.size - buffers[2].size:
        raise DataError("is compressed: save it uncompressed, as save_to_disk does")
    bounds = np.frombuffer(buffers[1], kind)[data.offset : data.offset + len(data) + 1] + first
    is_there = column.is_valid().to_numpy(False) & data.is_valid().to_numpy(False)
    for start, end, there in zip(bounds[:-1], bounds[1:], is_there, strict=True):
        yield f"{start}+{end - start}" if there else None


def _column(columns: Sequence[str], wanted: str | None, defaults: Sequence[str], flag: str) -> str:
    if name := first_field(columns, wanted, defaults):
        return name
    missing = f"'{wanted}'" if wanted else " or ".join(f"'{name}'" for name in defaults)
    names = one_line(", ".join(columns))
    raise DataError(f"no column {missing}; set {flag}, one of: {names}")


def _groups(file: BinaryIO) -> Iterator[_Group]:
    """Neighbouring regular members with one key.

    Raises:
        DataError: damage, after the groups before it; the last of them may lack members.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    group: _Group | None = None
    try:
        for info in _members(file):
            name = _NAME.fullmatch(info.name)
            if not name:
                continue
            key, extension = name[1].removeprefix("./"), name[2].lower()
            if group is None or key != group.key:
                if group:
                    yield group
                group = _Group(key)
            if info.offset_data + info.size > size:
                group = None
                raise DataError(f"{info.name} is cut off")
            if extension in group.spans:
                group.repeated = extension
            group.spans[extension] = (info.offset_data, info.size)
    except (DataError, tarfile.TarError) as error:
        if group:
            group.before_damage = True
            yield group
        raise DataError(f"after key {group.key}: {error}" if group else str(error)) from error
    if group:
        yield group


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Regular members in order; raises DataError or tarfile.TarError at damage between them."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            if info.isreg() and not info.sparse:
                yield info
        # tarfile takes any damaged header but the first for the end
        file.seek(tar.offset)
        end = file.read(tarfile.BLOCKSIZE)
    if not end:
        raise DataError("no end mark: the shard is truncated")
    if end.strip(b"\0"):
        raise DataError(f"damaged header at byte {tar.offset}")


def _image_extension(group: _Group, image_field: str | None) -> str:
    if group.repeated:
        raise DataError(f"has two members .{group.repeated}")
    wanted = [image_field.lower().removeprefix(".")] if image_field else _IMAGES
    for extension in wanted:
        if extension in group.spans:
            return extension
    names = one_line(", ".join(f".{name}" for name in group.spans))
    raise DataError(f"has no image .{' or .'.join(wanted)} (--image_field) but {names}")


def _tar_prompts(group: _Group, file: BinaryIO, prompt_field: str | None) -> tuple[str, ...]:
    extension = (prompt_field or "txt").lower().removeprefix(".")
    if extension in group.spans:
        text = _decode(group, file, extension).strip()
        return texts_field({f".{extension}": text}, f".{extension}")
    if "json" not in group.spans:
        names = one_line(", ".join(f".{name}" for name in group.spans))
        raise DataError(f"has no caption .{extension} or .json (--prompt_field) but {names}")
    try:
        value = json.loads(_decode(group, file, "json"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"broken .json: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise DataError(f".json is not an object but {type(value).__name__}")
    names = one_line(", ".join(value))
    if name := first_field(value, prompt_field, PROMPT_FIELDS):
        return texts_field(value, name)
    missing = prompt_field or ", ".join(PROMPT_FIELDS)
    raise DataError(f".json has no field {missing}; set --prompt_field, one of: {names}")


def _decode(group: _Group, file: BinaryIO, extension: str) -> str:
    offset, length = group.spans[extension]
    check_size(f".{extension}", length, MAX_LINE if extension == "json" else MAX_TEXT)
    file.seek(offset)
    try:
        return file.read(length).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f".{extension} is no UTF-8 at byte {error.start}") from None
