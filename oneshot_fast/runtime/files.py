"""Files that survive a kill: each is replaced as a whole, or appended to and mended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Json = dict[str, Any]
TEMPORARY = ".tmp-"
# Readers that split text into lines end them at these, too; JSON leaves them as they are.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` atomically: temporary name, fsync, rename."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(map(_line, rows)))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False).translate(_LINE_ENDS) + "\n"


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append lines and fsync; without space for all of them, none is left in the file.

    After a kill or a power cut a torn last line is possible: ``mend_jsonl`` cuts it off.
    """
    lines = "".join(map(_line, rows)).encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while lines:  # a nearly full disk takes a part, and refuses the rest
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


def mend_jsonl(path: Path) -> list[Json]:
    """Rows of a JSON lines file that we appended to; a torn last line is cut off."""
    rows: list[Json] = []
    if not path.exists():
        return rows
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:  # broken JSON, or broken UTF-8
            break
    write_jsonl(path, rows)
    return rows


def read_jsonl(path: Path) -> list[Json]:
    """Rows of a JSON lines file; none if it is absent."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_json(path: Path) -> Any:
    """Value of a JSON file that we wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors atomically; ``metadata`` values are stored as JSON."""
    header = {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    data = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    # safetensors writes to a temporary file of its own beside the target: in a folder of ours, a
    # kill leaves nothing that the next run does not know to remove.
    folder = path.with_name(f"{TEMPORARY}folder-{path.name}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary:
            save_file(data, folder / path.name, metadata=header)
            (folder / path.name).rename(temporary)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_metadata(path: Path, key: str) -> Any:
    """Metadata ``key`` of a file of ``write_safetensors``, without reading its tensors."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[key])


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that becomes ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY + path.name)
    old = path.with_name(TEMPORARY + "old-" + path.name)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _fsync(file)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def copy_folder(source: Path, target: Path) -> None:
    """Replace ``target`` by a copy that shares the space of tensor files, where the drive can."""

    def copy(old: str, new: str) -> None:
        if old.endswith(".safetensors"):  # users edit the others
            with contextlib.suppress(OSError):
                os.link(old, new)
                return
        shutil.copy2(old, new)

    if target.is_symlink():
        target.unlink()
    with write_folder(target) as temporary:
        shutil.copytree(source, temporary, copy_function=copy, dirs_exist_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
