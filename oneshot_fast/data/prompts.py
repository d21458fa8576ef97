"""Lists of prompts."""

from __future__ import annotations

from pathlib import Path

from oneshot_fast.data.records import read_objects, text_field
from oneshot_fast.errors import DataError, require


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one per line, or of JSON lines.

    Raises:
        DataError: If the file cannot be read, a line is no prompt, or there is none.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found = []
    if path.suffix == ".jsonl":
        for number, item in read_objects(path):
            if isinstance(item, str):
                raise DataError(f"{path}: line {number}: {item}")
            try:
                found.append(text_field(item, "prompt"))
            except DataError as error:
                raise DataError(f"{path}: line {number}: {error}") from None
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise DataError(f"{path}: is no UTF-8 text; save it as UTF-8") from None
        found = [line.strip() for line in lines if line.strip()]
    require(bool(found), f"{path}: has no prompt")
    return found
