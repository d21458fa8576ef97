"""What the readers of user input share: records and failures, JSON lines, text fields, ids."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from oneshot_fast.data.image_refs import ImageRef
from oneshot_fast.errors import DataError, one_line


@dataclass(frozen=True)
class Record:
    """One (prompt, target image) of a data set.

    `id` is the first 12 hex digits of sha256(image as written + NUL + prompt); the second and later
    lines with the same pair get "-1", "-2", ... in file order, whatever part of the file is used.
    """

    id: str
    line: int  # 1-based
    prompt: str
    image: str  # as written
    image_path: ImageRef  # absolute, symlinks resolved; of a shard, the part that holds it


@dataclass(frozen=True)
class Failure:
    """One line of failures.jsonl: an input that was left out, and why."""

    reason: str
    line: int | None = None  # 1-based
    id: str | None = None
    prompt: str | None = None
    image: str | None = None

    @property
    def row(self) -> dict[str, object]:
        """What is known of it, by name."""
        return {key: value for key, value in vars(self).items() if value is not None}


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, object] | str]]:
    """Iterate over the records (non-blank lines) of a JSON lines file.

    Yields:
        1-based line number, and the line's object, or the reason why it is none.

    Raises:
        DataError: the file cannot be opened or read.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    text = raw.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    yield number, f"invalid UTF-8 at byte {error.start}: save the file as UTF-8"
                    continue
                if text.strip():
                    yield number, _parse_object(text)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def text_field(record: dict[str, object], name: str) -> str:
    """The non-empty text of a record's field, unchanged.

    Raises:
        DataError: the field is missing, no string, blank, or no Unicode text without NUL.
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
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"'{name}' has half of a surrogate pair: it is no Unicode text") from None
    return value


def pair_id(image: str, prompt: str, digits: int = 12) -> str:
    """Id of a (prompt, image as written) pair: hex digits of sha256(image + NUL + prompt)."""
    return hashlib.sha256(f"{image}\0{prompt}".encode()).hexdigest()[:digits]


def claim_id(base: str, used: dict[str, int]) -> str:
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
