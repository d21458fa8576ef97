"""Files that survive a kill: each is replaced as a whole, or appended to and mended."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from oneshot_fast.errors import DamagedError
from oneshot_fast.runtime.ledger import carried_digest, digest, ledger_of, say
from oneshot_fast.runtime.sharded import whole

Json = dict[str, Any]
TEMPORARY = ".tmp-"
# Readers that split text into lines end them at these, too; JSON leaves them as they are.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` atomically: temporary name, fsync, rename; what is so already stays."""
    if _is_known(path) and path.read_bytes() == text.encode():
        return  # a finished run may be on a drive that cannot be written
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_known(path: Path) -> bool:
    """Whether the file is there as its run wrote it, to the end."""
    ledger = ledger_of(path)
    return ledger is not None and ledger.is_sealed(ledger.key(path)) and path.is_file()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, _dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically, and as they come: there may be millions."""
    if _is_known(path):
        write_text(path, "".join(map(_line, rows)))
        return
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, rows))


def _line(row: Mapping[str, Any]) -> str:
    return _dumps(row).translate(_LINE_ENDS) + "\n"


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """A JSON value with null in place of numbers that JSON does not have: NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append lines and fsync; without space for all of them, none is left in the file.

    After a kill or a power cut a torn last line is possible: ``mend_jsonl`` cuts it off.
    """
    ledger = ledger_of(path)
    if ledger is not None:
        ledger.claim(path)
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
    if not path.exists():
        return []
    rows, whole = _rows(path)
    if not whole:
        write_jsonl(path, rows)
    return rows


def read_jsonl(path: Path) -> list[Json]:
    """Rows of a JSON lines file that we wrote; none if it is absent.

    What comes after damage is left out, and that is said.
    """
    rows, whole = _rows(path) if path.is_file() else ([], True)
    if not whole:
        say(f"{path} is damaged after line {len(rows)}; the rest is left out")
    return rows


def _rows(path: Path) -> tuple[list[Json], bool]:
    """The rows before the first damaged line, and whether there is none."""
    rows: list[Json] = []
    lines = path.read_bytes().split(b"\n")
    for line in lines[:-1] if not lines[-1] else lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # broken JSON, or broken UTF-8
            return rows, False
        if not isinstance(row, dict):
            return rows, False
        rows.append(row)
    return rows, not lines[-1]


def read_json(path: Path, kind: type = dict) -> Any:
    """Value of a JSON file that we wrote.

    Raises:
        DamagedError: If it is not JSON, or its value not of this ``kind``.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise DamagedError(path)
    return value


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors atomically, the same bytes for the same tensors and metadata.

    The header carries a sha256 of the file, see ``ledger.digest``, which ``read_safetensors``
    compares.

    Args:
        path: The file.
        tensors: By name; sharded ones are gathered one by one, ``in_order``, as all have to ask.
        metadata: Values are stored as JSON.
    """
    texts = {"sha256": "0" * 64}
    texts |= {key: json.dumps(finite(value), ensure_ascii=False) for key, value in metadata.items()}
    names = in_order(tensors)
    header, end = dict[str, Any](__metadata__=texts), 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        kind = _TYPES[tensors[name].dtype]
        header[name] = {
            "dtype": kind,
            "shape": [*tensors[name].shape],
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                data = whole(tensors[name].detach()).cpu().contiguous().flatten()
                file.write(data.view(torch.uint8).numpy().data)
        at = 8 + text.index(b"0" * 64)
        stamp = digest(temporary)
        with temporary.open("r+b") as file:
            file.seek(at)
            file.write(stamp.encode())


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of a file; as safetensors, so that each begins at its type's multiple."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file of ours, on the CPU.

    Raises:
        DamagedError: If its bytes are not those that were written.
    """
    check_safetensors(path)
    try:
        return load_file(path)
    except SafetensorError:
        raise DamagedError(path) from None


def check_safetensors(path: Path) -> None:
    """Raise DamagedError if the file is not what the hash in its header says."""
    stamp = carried_digest(path)
    if stamp is not None and stamp != digest(path):
        raise DamagedError(path)


def read_metadata(path: Path, key: str) -> Any:
    """Metadata ``key`` of a file of ``write_safetensors``, without reading its tensors.

    Raises:
        DamagedError: If its header is damaged, its size wrong, or the key is not there.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()[key])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        raise DamagedError(path) from None


def remove(path: Path) -> None:
    """Remove a file or folder of ours, if it is there; a kill leaves nothing half removed."""
    if not os.path.lexists(path):
        return
    doomed = path.with_name(TEMPORARY + path.name)
    delete(doomed)
    path.rename(doomed)
    delete(doomed)
    ledger = ledger_of(path)
    if ledger is not None:
        ledger.forget(ledger.key(path))


def delete(path: Path) -> None:
    """Delete a file or folder, whichever it is, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary file that becomes ``path`` when the block ends without an error.

    Args:
        path: The file; the run in whose folder it lies notes it.
        durable: Wait until the disk has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, ledger = path.with_name(TEMPORARY + path.name), ledger_of(path)
    try:
        yield temporary
        if durable:
            _fsync(temporary)
        if ledger is not None:
            ledger.claim(path)
        temporary.replace(path)
        if durable:
            _fsync(path.parent)
        if ledger is not None:
            ledger.note(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def if_writable() -> Iterator[None]:
    """For what is only for people to look at: left out on a drive that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        say(f"not written: {error.filename or 'a file'} ({os.strerror(error.errno)})")


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY + path.name)
    old = path.with_name(TEMPORARY + "old-" + path.name)
    ledger = ledger_of(path)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # safetensors makes files that others cannot read
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
            _fsync(file)
        if ledger is not None:
            ledger.claim(path)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _fsync(path.parent)
        if ledger is not None:
            ledger.note(path)
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
