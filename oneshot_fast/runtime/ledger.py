"""What a run wrote, file by file: so that damage is seen, and what is not ours is left alone.

``files.jsonl`` has a line before a file is written (its path) and one after (size and sha256); the
last line of a path counts. Small texts are kept in it whole when the run ends.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "files.jsonl"
_SMALL = 1 << 16  # bytes of a file that is read whole by every check
_TEXTS = (".json", ".jsonl")
_STAMP = b'{"__metadata__":{"sha256":"'  # begins the header of our safetensors files
_HEX = 64
_open: list["Ledger"] = []


class Ledger:
    """The list of one run's files; every process of the run appends to it.

    Attributes:
        entries: By path below the folder: "path" alone while a file is written or appended to, with
            "size" and "sha256" when it is whole, and with its "text".
        is_whole: Whether the list itself is as it was written.
    """

    def __init__(self, folder: Path) -> None:
        """Read the list of ``folder``; it may be absent."""
        self.folder = Path(os.path.abspath(folder))
        self.path = self.folder / NAME
        self.entries: dict[str, dict[str, Any]] = {}
        data = self.path.read_bytes() if self.path.is_file() else b""
        self.is_whole = data.endswith(b"\n")
        for line in data.splitlines():
            try:
                row = json.loads(line)
                self.entries[row["path"]] = row
            except (ValueError, TypeError, KeyError, RecursionError):
                self.is_whole = False
        if data and not data.endswith(b"\n"):
            self._append(b"\n")

    @property
    def is_ours(self) -> bool:
        """Whether all in it was written by the run; else some was taken as it was found."""
        return self.is_whole and NAME not in self.entries

    def key(self, path: Path) -> str:
        """Name of a path in the list."""
        return Path(os.path.abspath(path)).relative_to(self.folder).as_posix()

    def owns(self, key: str) -> bool:
        """Whether the run wrote this file, or something in this folder."""
        names = (key, *map(str, PurePosixPath(key).parents))
        return any(not self.entries.get(name, {"gone": True}).get("gone") for name in names)

    def whole(self, key: str) -> str:
        """The folder that this file became visible with, as a checkpoint's do; else the file."""
        folders = reversed([*map(str, PurePosixPath(key).parents)])
        return next((f for f in folders if self.entries.get(f, {}).get("gone")), key)

    def is_sealed(self, name: str) -> bool:
        """Whether this file was written to its end."""
        return "size" in self.entries.get(name, {})

    def claim(self, path: Path) -> None:
        """Note that ``path`` is about to be written; what others put there is set aside."""
        key = self.key(path)
        if set(self.entries.get(key, {})) == {"path"}:
            return
        if os.path.lexists(path):
            files = [path]
            if path.is_dir() and not path.is_symlink():
                files = [file for file in path.rglob("*") if file.is_file()]
            if not all(self.owns(self.key(file)) for file in files):
                say(f"{path} was not written by this run; kept as {set_aside(path, 'old').name}")
        self.put({"path": key})  # before what is inside is forgotten: a kill leaves it ours
        if path.is_dir() and not path.is_symlink():
            self.forget(key, itself=False)

    def note(self, path: Path, with_text: bool = False) -> None:
        """Note that ``path``, a file or a folder, is whole."""
        for file in path.rglob("*") if path.is_dir() else (path,):
            if file.is_file() and file.name != NAME:
                row: dict[str, Any] = {"path": self.key(file), "size": file.stat().st_size}
                row["sha256"] = digest(file)
                if with_text and file.suffix in _TEXTS and row["size"] <= _SMALL:
                    row["text"] = file.read_text(encoding="utf-8")
                self.put(row)
        if path.is_dir():
            self.put({"path": self.key(path), "gone": True})  # from here on its files count

    def forget(self, key: str, itself: bool = True) -> None:
        """Note that a file, or a folder with all in it, or only what is in it, is gone."""
        for name in list(self.entries):
            is_meant = name.startswith(f"{key}/") or (itself and name == key)
            if is_meant and not self.entries[name].get("gone"):
                self.put({"path": name, "gone": True})

    def reread(self) -> None:
        """Take what other processes wrote, too."""
        self.entries = Ledger(self.folder).entries

    def seal(self) -> None:
        """Note all files as they are in the end, small texts whole."""
        self.reread()
        for key, row in list(self.entries.items()):
            path = self.folder / key
            small_text = path.suffix in _TEXTS and row.get("size", 0) <= _SMALL
            is_done = "size" in row and ("text" in row or not small_text)
            is_not = "gone" in row or "by_others" in row or path.is_symlink()
            if not (is_done or is_not) and path.is_file():
                self.note(path, with_text=True)

    def damaged(self, thorough: bool) -> list[str]:
        """Files that are not as they were written, by size; small ones, or all, by their hash.

        A kill while a file is replaced leaves the old one or the new, of which it tells itself.
        """
        rows = (row for row in self.entries.values() if "size" in row or set(row) == {"path"})
        return [row["path"] for row in rows if not _is_as_noted(self.folder, row, thorough)]

    def delete(self) -> None:
        """Delete every file of the list, those of the runs inside too, and then the list."""
        folders = set[Path]()
        for key, row in self.entries.items():
            path = self.folder / key
            if row.get("gone") or key == "run.json":
                continue
            if path.name == NAME:
                Ledger(path.parent).delete()
                (path.parent / ".lock").unlink(missing_ok=True)
            elif path.is_dir() and not path.is_symlink():  # half written, or a tracker's
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            folders |= {folder for folder in path.parents if self.folder in folder.parents}
        for name in ("run.json", NAME):
            (self.folder / name).unlink(missing_ok=True)
        for folder in sorted(folders, reverse=True):  # from below
            with contextlib.suppress(OSError):  # something of others is in it
                folder.rmdir()

    def put(self, row: dict[str, Any]) -> None:
        """Add a line."""
        self.entries[row["path"]] = row
        self._append(json.dumps(row).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            written = os.write(descriptor, line)  # one call: lines of processes do not mix
            if written < len(line):
                os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR) - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(descriptor)


def ledger_of(path: Path) -> Ledger | None:
    """The list of the innermost open run that ``path`` lies in."""
    place = Path(os.path.abspath(path))
    inside = [ledger for ledger in _open if ledger.folder in place.parents]
    return max(inside, key=lambda ledger: len(ledger.folder.parts), default=None)


@contextlib.contextmanager
def listing(ledger: Ledger) -> Iterator[Ledger]:
    """While the block runs, files written below the folder are noted."""
    _open.append(ledger)
    try:
        yield ledger
    finally:
        _open.remove(ledger)


def digest(path: Path) -> str:
    """Sha256 of a file; of a safetensors file of ours with zeros in place of the one it carries."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(8 + len(_STAMP) + _HEX)
        if head[8:].startswith(_STAMP):
            head = head[:-_HEX] + b"0" * _HEX
        found.update(head)
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def carried_digest(path: Path) -> str | None:
    """The sha256 that a safetensors file of ours carries; None in files of others."""
    with path.open("rb") as file:
        head = file.read(8 + len(_STAMP) + _HEX)[8:]
    return head[-_HEX:].decode("ascii", "replace") if head.startswith(_STAMP) else None


def set_aside(path: Path, why: str) -> Path:
    """Rename ``path`` to a free name beside it; returns that."""
    names = (path.with_name(f"{path.name}.{why}{k or ''}") for k in range(10**6))
    free = next(name for name in names if not os.path.lexists(name))
    path.rename(free)
    return free


def say(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr)


def _is_as_noted(folder: Path, row: dict[str, Any], thorough: bool) -> bool:
    path = folder / row["path"]
    if "size" not in row:
        return not path.is_file() or _is_readable(path)
    if not path.is_file() or path.stat().st_size != row["size"]:
        return False
    if thorough or row["size"] <= _SMALL:
        return digest(path) == row["sha256"]
    with path.open("rb") as file:  # what a power cut leaves is often zeros
        return any(file.read(4096))


def _is_readable(path: Path) -> bool:
    """Whether a file of ours is whole, as far as that can be known without its size and hash."""
    if path.suffix == ".safetensors":
        return carried_digest(path) == digest(path)
    with contextlib.suppress(ValueError, RecursionError):
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        return True
    return False
