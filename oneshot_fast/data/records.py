"""What the readers of user input share: records and failures, JSON lines, text fields, ids."""

import hashlib
import itertools
import json
from collections.abc import Container, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from oneshot_fast.data.image_refs import ImageRef
from oneshot_fast.errors import DataError, one_line

PROMPT_FIELDS = ("prompt", "text", "caption")
MAX_TEXT = 1 << 16  # bytes of a prompt or path; text encoders read some 77 tokens
MAX_LINE = 1 << 22  # bytes of a JSON object: a long run's curve of losses takes some 100 kB


@dataclass(frozen=True)
class Record:
    """One (prompt, target image) of a data set.

    `id` is the first 12 hex digits of sha256(image as written + NUL + prompt), of several captions
    all, with NUL between them; the second and later lines with the same pair get "-1", "-2", ... in
    file order, whatever part of the file is used.
    """

    id: str
    line: int  # 1-based
    prompt: str
    image: str  # as written
    image_path: ImageRef  # absolute, symlinks resolved; of a shard, the part that holds it
    prompts: tuple[str, ...] = ()  # where there are several captions: all; `prompt` is one of them


@dataclass(frozen=True)
class Failure:
    """One line of failures.jsonl: an input that was left out, and why."""

    reason: str
    line: int | None = None  # 1-based
    id: str | None = None
    prompt: str | None = None
    image: str | None = None
    digest: str | None = field(default=None, compare=False)  # of a manifest's line

    @property
    def row(self) -> dict[str, object]:
        """What is known of it, by name."""
        known = {key: value for key, value in vars(self).items() if value is not None}
        known.pop("digest", None)
        return known


def read_lines(path: Path, limit: int = MAX_LINE) -> Iterator[tuple[int, str | DataError]]:
    """Iterate over the lines of a text file, whatever their length, in little memory.

    Yields:
        1-based line number, and the line, or why it cannot be used.

    Raises:
        DataError: the file cannot be opened or read.
    """
    try:
        with path.open("rb") as file:
            for number in itertools.count(1):
                raw = file.readline(limit + 1)
                if not raw:
                    return
                if len(raw) > limit:
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(limit)
                    yield number, DataError(f"longer than {limit >> 10} kB: shorten it")
                    continue
                try:
                    yield number, raw.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    reason = f"invalid UTF-8 at byte {error.start}: save the file as UTF-8"
                    yield number, DataError(reason)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, object] | str]]:
    """Iterate over the records (non-blank lines) of a JSON lines file.

    Yields:
        1-based line number, and the line's object, or the reason why it is none.

    Raises:
        DataError: the file cannot be opened or read.
    """
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            yield number, str(line)
        elif line.strip():
            yield number, _parse_object(line)


def text_field(record: dict[str, object], name: str) -> str:
    """The non-empty text of a record's field, unchanged.

    Raises:
        DataError: the field is missing, no string, blank, no Unicode text without NUL, or longer
            than ``MAX_TEXT``.
    """
    if name not in record:
        raise DataError(f"missing field '{name}'")
    value = record[name]
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"'{name}' must be a string, not {kind}")
    if not value.strip():
        raise DataError(f"'{name}' is empty")
    if "\0" in value:
        raise DataError(f"'{name}' has a NUL character")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise DataError(f"'{name}' has half of a surrogate pair: it is no Unicode text") from None
    check_size(name, size)
    return value


def texts_field(record: dict[str, object], name: str) -> tuple[str, ...]:
    """The text of a field, or those of a list of several captions, each as ``text_field`` has it.

    Raises:
        DataError: as there, or the list is empty, or longer than a quarter of ``MAX_LINE``.
    """
    values = record.get(name)
    if not isinstance(values, list):
        return (text_field(record, name),)
    if not values:
        raise DataError(f"'{name}' is an empty list")
    named = {f"{name}[{k}]": value for k, value in enumerate(values)}
    texts = tuple(text_field(named, key) for key in named)
    check_size(name, sum(len(text.encode()) for text in texts), MAX_LINE // 4)
    return texts


def check_size(name: str, size: int, limit: int = MAX_TEXT) -> None:
    """Raise DataError if a text called ``name`` has too many bytes to be one."""
    if size > limit:
        raise DataError(f"'{name}' has {size:,} bytes, more than {limit >> 10} kB: shorten it")


def first_field(columns: Container[str], wanted: str | None, defaults: Sequence[str]) -> str | None:
    """The ``wanted`` one of the columns, else the first of the defaults, as "Text", too."""
    names = [wanted] if wanted else [x for name in defaults for x in (name, name.capitalize())]
    return next((name for name in names if name in columns), None)


def pair_id(image: str, *prompts: str, digits: int = 12) -> str:
    """Id of an image as written and its prompts: hex digits of sha256, NUL between the texts."""
    return hashlib.sha256("\0".join((image, *prompts)).encode()).hexdigest()[:digits]


def claim_id(base: str, used: MutableMapping[str, int]) -> str:
    """`base`, or where that is taken the first free one of `base`-1, `base`-2, ...

    Args:
        base: the wanted id.
        used: every id taken so far, with the last suffix tried for it; updated.
    """
    name, suffix = base, used.get(base, 0)
    while name in used:
        suffix += 1
        name = f"{base}-{suffix}"
    used[name] = 0
    used[base] = suffix
    return name


def nothing_usable(path: Path, failures: Sequence[Failure], example: str) -> DataError:
    """Error of a JSON lines file without one usable line."""
    if not failures:
        return DataError(f"{path}: is empty; write one JSON object per line: {example}")
    first = failures[0]
    count = f"no usable line, {len(failures)} failed"
    return DataError(f"{path}: {count}; the first, line {first.line}: {first.reason}")


def _parse_object(text: str) -> dict[str, object] | str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"broken JSON: {one_line(error)}"
    return value if isinstance(value, dict) else f"not a JSON object but {type(value).__name__}"
