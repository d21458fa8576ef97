"""Run folders: files that survive a kill, one writer, resumed only with equal settings."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from oneshot_fast.errors import RunError

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


def mend_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file that we appended to; a torn last line is cut off."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:  # broken JSON, or broken UTF-8
            break
    write_jsonl(path, rows)
    return rows


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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunFolder:
    """Exclusive use of one output folder, bound to one set of settings.

    ``run.json`` keeps the settings. Entering locks the folder (the lock dies with the process) and
    compares; a finished or interrupted run goes on only with equal settings.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        outputs: Sequence[str],
        overwrite: bool = False,
    ) -> None:
        """Describe the run; nothing is touched before ``with``.

        Args:
            path: The folder; made if absent.
            settings: Whatever a result depends on; JSON values.
            outputs: Names inside ``path`` that the run owns and ``overwrite`` removes.
            overwrite: Start anew instead of resuming.
        """
        self.path = Path(path)
        self._settings = json.loads(json.dumps(settings))
        self._outputs = (*outputs, "run.json")
        self._overwrite = overwrite
        self._lock = filelock.FileLock(self.path / ".lock")

    def __enter__(self) -> RunFolder:
        """Lock the folder and compare settings.

        Raises:
            RunError: If the folder is in use or holds other files or a different run.
            OSError: If it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RunError(f"{self.path} is in use by another process; choose another") from None
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock."""
        self._lock.release()

    def _prepare(self) -> None:
        run_json = self.path / "run.json"
        present = [name for name in self._outputs if os.path.lexists(self.path / name)]
        if present and not run_json.exists():
            raise RunError(
                f"{self.path} holds {', '.join(present)}, which no run of ours wrote; choose "
                "another folder"
            )
        for name in self._outputs:
            path, doomed = self.path / name, self.path / (TEMPORARY + name)
            for leftover in (*self.path.glob(f"{TEMPORARY}*{name}"), *path.glob(TEMPORARY + "*")):
                _remove(leftover)
            if self._overwrite and os.path.lexists(path):
                path.rename(doomed)  # a kill leaves nothing half removed
                _remove(doomed)
        if not run_json.exists():
            write_json(run_json, self._settings)
            return
        changes = _differences(read_json(run_json), self._settings)
        if changes:
            raise RunError(
                f"{self.path} holds a run with other settings ({'; '.join(changes)}); "
                "repeat the old ones to resume, or start anew with --overwrite"
            )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} then, {new.get(key)} now" for key in keys]
