"""Lists of prompts."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from oneshot_fast.data.records import (
    MAX_TEXT,
    PROMPT_FIELDS,
    first_field,
    read_lines,
    read_objects,
    text_field,
    texts_field,
)
from oneshot_fast.errors import DataError, one_line, require
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main

Row = tuple[int, dict[str, object] | str]  # line number, and its columns or what is wrong with it


def named_prompts(
    prompts: Sequence[str], prompt_file: Path | None, prompt_field: str | None
) -> list[str]:
    """The prompts that --prompt, --prompt_file and --prompt_field name.

    Raises:
        UserError: If one is none, there is none, or a field is named of no file.
    """
    found = [text_field({"--prompt": prompt}, "--prompt") for prompt in prompts]
    require(
        prompt_file is not None or prompt_field is None,
        "--prompt_field has no effect without --prompt_file; give both",
    )
    if prompt_file is not None:
        found += read_prompts(prompt_file, prompt_field)
    require(bool(found), "give --prompt TEXT or --prompt_file FILE")
    return found


def read_prompts(path: Path, prompt_field: str | None = None) -> list[str]:
    """Prompts of a file: of text one per line, of a table by its header, of JSON lines by field.

    Args:
        path: .txt (or no suffix), .tsv or .csv with a header, .jsonl, or .json with a list of
            texts or objects.
        prompt_field: column or field; by default the first of prompt, text and caption, which may
            begin with a capital. A text file has none. A list of JSON is several prompts.

    Raises:
        DataError: If the file cannot be read, a line is no prompt, or there is none.
    """
    if "://" in str(path) or str(path).startswith(("http:/", "https:/")):
        raise DataError(f"{path}: URLs are not fetched here; download the file and give its path")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    suffix = path.suffix.lower()
    readers = {"": _text_rows, ".txt": _text_rows, ".jsonl": read_objects}
    readers |= {".csv": read_table, ".tsv": read_table, ".json": _list_rows}
    if suffix not in readers:
        known = ", ".join(sorted(filter(None, readers)))
        raise DataError(f"{path}: files {suffix} are not read as prompts; give one of {known}")
    if prompt_field and suffix in ("", ".txt"):
        raise DataError(f"{path}: a text file has no fields; leave --prompt_field out")
    found: list[str] = []
    for number, row in readers[suffix](path):
        try:
            if isinstance(row, str):
                raise DataError(row)
            name = first_field(row, prompt_field, PROMPT_FIELDS)
            if name is None:
                wanted = prompt_field or ", ".join(PROMPT_FIELDS)
                names = one_line(", ".join(row))
                raise DataError(f"no field {wanted}; set --prompt_field, one of: {names}")
            found += texts_field(row, name)
        except DataError as error:
            place = "entry" if suffix == ".json" else "line"
            raise DataError(f"{path}: {place} {number}: {error}") from None
    require(bool(found), f"{path}: has no prompt")
    return found


def warn_of_cut(
    prompts: Iterable[str], is_cut: Callable[[str], bool], told: frozenset[str], limit: str
) -> frozenset[str]:
    """Say on stderr how many prompts are cut off, and which is the first.

    Args:
        prompts: May repeat.
        is_cut: Whether one is longer than the limit.
        told: Prompts of which this was said before.
        limit: How it is called, such as "77 tokens".

    Returns:
        ``told`` with those of now.
    """
    ask = lru_cache(4096)(is_cut)  # there may be millions, and many times the same
    cut = dict.fromkeys(p for p in prompts if p not in told and ask(p))
    if cut and is_main():
        say(
            f"warning: {len(cut)} prompts are longer than {limit}; cut off, the first of them "
            f'"{one_line(next(iter(cut))):.60}..."'
        )
    return told.union(cut)


def read_table(path: Path) -> Iterator[Row]:
    """Rows of a .csv or .tsv file (by suffix) below its header, blank lines left out.

    A field of .tsv is one line's, as it stands, or in quotes if it begins and ends with them.

    Raises:
        DataError: the file cannot be read, or has no header of different names.
    """
    rows = _tsv_rows(path) if path.suffix.lower() == ".tsv" else _csv_rows(path)
    header: list[str] | None = None
    for number, fields in rows:
        if isinstance(fields, str):
            if header is None:
                raise DataError(f"{path}: line {number}: {fields}")
            yield number, fields
        elif header is None:
            header = [name.strip() for name in fields]
            if len(set(header)) < len(header):
                raise DataError(f"{path}: line {number}: two columns have one name")
        elif len(fields) > len(header):
            yield (
                number,
                f"has {len(fields)} fields, the header {len(header)}: quote the longer one",
            )
        else:
            yield number, dict(zip(header, fields, strict=False))


def _list_rows(path: Path) -> Iterator[Row]:
    """Entries of a JSON file that is one list, with their places in it, from 1."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON: {one_line(error)}") from None
    if not isinstance(found, list):
        raise DataError(f"{path}: it is no list of prompts")
    for number, entry in enumerate(found, 1):
        yield number, entry if isinstance(entry, dict) else {"prompt": entry}


def _text_rows(path: Path) -> Iterator[Row]:
    for number, line in read_lines(path, MAX_TEXT):
        if isinstance(line, DataError):
            yield number, str(line)
        else:  # the file may have other line ends
            for prompt in filter(None, map(str.strip, line.splitlines())):
                yield number, {"prompt": prompt}


def _tsv_rows(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            yield number, str(line)
        elif line.strip():
            yield number, [_unquoted(field) for field in line.rstrip("\r\n").split("\t")]


def _unquoted(field: str) -> str:
    inside = field[1:-1]
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"'
    return inside.replace('""', '"') if is_quoted and '"' not in inside.replace('""', "") else field


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Records, which may have several lines, each with the number of its last."""
    number, broken = 0, ""

    def lines() -> Iterator[str]:
        nonlocal number, broken
        for found, line in read_lines(path):
            number, broken = found, str(line) if isinstance(line, DataError) else ""
            yield "" if isinstance(line, DataError) else line

    reader = csv.reader(lines(), strict=True)
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield number, f"broken CSV: {one_line(error)}"
            continue
        if fields is None:
            return
        if broken or any(fields):
            yield number, broken or fields
