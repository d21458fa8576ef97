"""Samples of one tar shard (WebDataset) or one Parquet file, in order, their images not read."""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from oneshot_fast.data.image_refs import cell_place, extra_module, open_file
from oneshot_fast.data.records import (
    MAX_LINE,
    MAX_TEXT,
    PROMPT_FIELDS,
    check_size,
    first_field,
    text_field,
)
from oneshot_fast.errors import DataError, one_line

_IMAGES = ("jpg", "jpeg", "png", "webp")
# Everything up to the first dot of the last part is the key, the rest the extension: WebDataset's
# rule, see base_plus_ext in webdataset/tariterators.py.
_NAME = re.compile(r"((?:.*/|)[^.][^./]*)\.([^/]*)", re.DOTALL)
_ROWS = 1024  # prompts read at once
_BYTES = 64 << 20  # of prompts read at once, as the file says


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: a prompt and the image's place, or the reason why there is none."""

    key: str  # unique in the shard, unless the shard repeats a name
    prompt: str | None = None
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
                prompt = _tar_prompt(group, opened, prompt_field)
            except DataError as error:
                if not group.before_damage:  # what is missing is the damage's fault
                    yield Sample(group.key, reason=str(error))
                continue
            offset, length = group.spans[extension]
            yield Sample(f"{group.key}.{extension}", prompt, f"{offset}+{length}")


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
        rows = extra_module("pyarrow.parquet").ParquetFile(opened)
        columns = rows.schema_arrow.names
        wanted = _column(columns, prompt_field, PROMPT_FIELDS, "--prompt_field")
        images = _column(columns, image_field, ("image",), "--image_field")
        number = 0
        for group in range(rows.num_row_groups):
            for row, prompt in enumerate(_values(rows, group, wanted)):
                try:
                    text = text_field({wanted: prompt}, wanted)
                except DataError as error:
                    yield Sample(str(number), reason=str(error))
                else:
                    yield Sample(str(number), text, cell_place(images, group, row))
                number += 1


def _values(rows: Any, group: int, column: str) -> Iterator[object]:
    """Values of a column in a row group of a ParquetFile, some at a time."""
    about = rows.metadata.row_group(group)
    chunks = [about.column(k) for k in range(about.num_columns)]
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)
    count = min(_ROWS, max(1, _BYTES * about.num_rows // max(1, size)))
    # a thread that still reads when the process ends would make it hang or abort (pyarrow 26)
    parts = rows.iter_batches(count, row_groups=[group], columns=[column], use_threads=False)
    return (value for part in parts for value in part[column].to_pylist())


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


def _tar_prompt(group: _Group, file: BinaryIO, prompt_field: str | None) -> str:
    extension = (prompt_field or "txt").lower().removeprefix(".")
    if extension in group.spans:
        text = _decode(group, file, extension).strip()
        return text_field({f".{extension}": text}, f".{extension}")
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
        return text_field(value, name)
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
