"""Which files a data root names: a folder of shards, one shard, or a pattern, local or remote."""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oneshot_fast.data.tables import extra_module
from oneshot_fast.errors import DataError, one_line
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main

SUFFIXES = (".tar", ".parquet", ".arrow")
_WILDCARD = re.compile(r"[*?[]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Shard:
    """One file of a data set."""

    file: str  # absolute path, symlinks resolved, or fsspec URL
    name: str  # from the data set's folder
    size: int | None  # bytes
    problem: str | None = None  # why it is not read
    changed: str = ""  # when, or of which version, as its file system says

    @property
    def suffix(self) -> str:
        """That of its name; what a link leads to may have none."""
        return os.path.splitext(self.name)[1]


def find_shards(root: str, allow_outside_root: bool = False) -> list[Shard]:
    """Files that a data root names, without reading them; [] for what is no data set of shards.

    Args:
        root: folder, file, or pattern with *, ?, [a-z], {000..123} or {a,b}; a path or fsspec URL.
            A local path that exists is no pattern, whatever its name.
        allow_outside_root: follow links that lead out of the folder; without it, such a shard has
            a ``problem``. A link that is named itself is followed.

    Returns:
        The shards, those of each wildcard sorted by name.

    Raises:
        DataError: a pattern or URL that names no shard, or files of both kinds.
    """
    is_local = os.path.exists(root)
    if is_local and not _holds_shards(root):
        return []
    patterns = [root] if is_local else expand_braces(root)
    if not is_local and patterns == [root] and not _WILDCARD.search(root) and "://" not in root:
        return []
    extra_module("fsspec")
    try:
        shards = _find([(pattern, not is_local) for pattern in patterns], allow_outside_root)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{root}: no such file or folder: {one_line(error)}") from None
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise DataError(f"{root}: cannot be listed: {one_line(error)}") from error
    if not shards:
        raise DataError(
            f"{root}: there is no .tar or .parquet file, and no .arrow; check data_root"
        )
    kinds = [suffix for suffix in SUFFIXES if suffix in {shard.suffix for shard in shards}]
    if kinds[1:]:
        both = " and ".join(kinds)
        raise DataError(f"{root}: holds both {both} files; name one kind, as DIR/*.tar")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """The patterns that {a,b} and {000..123} stand for, in order; numbers keep their zeros."""
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    choices = found[1].split(",")
    if numbers := _NUMBERS.fullmatch(found[1]):
        values = range(int(numbers[1]), int(numbers[2]) + 1)
        choices = [str(value).zfill(len(numbers[1])) for value in values]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [text for choice in choices for text in expand_braces(before + choice + after)]


def _holds_shards(path: str) -> bool:
    """Whether a local path is a shard, or a folder that holds some and no list of pairs."""
    if not os.path.isdir(path):
        return path.endswith(SUFFIXES) and os.path.basename(path) != "metadata.parquet"
    names = os.listdir(path)
    if "pairs.jsonl" in names or "metadata.jsonl" in names:
        return False
    suffixes = SUFFIXES if "state.json" in names else SUFFIXES[:2]
    shards = [name for name in names if name.endswith(suffixes) and name != "metadata.parquet"]
    return bool(shards) or "dataset_dict.json" in names


def _find(patterns: list[tuple[str, bool]], allow_outside_root: bool) -> list[Shard]:
    """Shards of patterns, each with whether its wildcards count; a file named twice counts once."""
    from fsspec.core import url_to_fs

    found: dict[str, Shard] = {}
    roots = []
    for pattern, wildcards in patterns:
        fs, path = url_to_fs(pattern)
        magic = _WILDCARD.search(path) if wildcards else None
        folder = path.rpartition("/")[0]
        files: dict[str, Any]
        if magic:
            folder = path[: magic.start()].rpartition("/")[0]
            files = fs.glob(path, detail=True)
        elif fs.isdir(path):
            folder, files = _listed(fs, path.rstrip("/"))
        else:
            files = {path: fs.info(path)}
        roots.append(folder)
        for name in sorted(files):
            is_link = files[name].get("islink")
            if not name.endswith(SUFFIXES) or not (is_link or files[name]["type"] == "file"):
                continue
            file, size, problem = _address(fs, name), files[name].get("size"), None
            changed = str([files[name].get(key) for key in ("mtime", "etag", "ETag", "created")])
            if is_link:
                root = None if allow_outside_root or name == path else os.path.realpath(folder)
                size, problem = _follow(file, root)
                file = name if problem else file
            found.setdefault(name, Shard(file, name, size, problem, changed))
    folder = _common_folder(roots)
    return [
        replace(shard, name=shard.name.removeprefix(folder).lstrip("/")) for shard in found.values()
    ]


def _listed(fs: Any, folder: str) -> tuple[str, dict[str, Any]]:
    """What lies in a folder, by path; of a folder of datasets' save_to_disk what its list names.

    Of a saved DatasetDict it is the folder of the split train, or of its only one.
    """

    def read(name: str) -> Any:
        return json.loads(fs.cat_file(f"{folder}/{name}")) if f"{folder}/{name}" in files else None

    files = {info["name"]: info for info in fs.ls(folder, detail=True)}
    if several := read("dataset_dict.json"):
        splits = several["splits"]
        chosen = "train" if "train" in splits else splits[0]
        if chosen != "train" and len(splits) > 1:
            raise DataError(
                f"{folder}: has splits {one_line(', '.join(splits))}; give one's folder"
            )
        if len(splits) > 1 and is_main():
            say(f"{folder}: of its splits {chosen} is read")
        return _listed(fs, f"{folder}/{os.path.basename(chosen)}")
    state = read("state.json")
    if state is None:  # .arrow files are caches, with all splits, unless they are named
        return folder, {name: info for name, info in files.items() if not name.endswith(".arrow")}
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder}: is a selection of rows; flatten_indices() it, and save it again"
        )
    names = [os.path.basename(file["filename"]) for file in state["_data_files"]]
    return folder, {f"{folder}/{name}": fs.info(f"{folder}/{name}") for name in names}


def _follow(file: str, root: str | None) -> tuple[int | None, str | None]:
    """Size of a file that a link leads to, or why it is not read; ``root`` must hold it."""
    if root is not None and not Path(file).is_relative_to(root):
        return None, f"its link leads outside {root}: move it there or pass --allow_outside_root"
    if not os.path.isfile(file):
        return None, f"its link leads to no file: {file}"
    return os.path.getsize(file), None


def _address(fs: Any, path: str) -> str:
    """Local path, or URL, by which a file is found again."""
    protocols = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    return os.path.realpath(path) if "file" in protocols else str(fs.unstrip_protocol(path))


def _common_folder(folders: list[str]) -> str:
    try:
        return os.path.commonpath(folders)
    except ValueError:  # of several file systems
        return ""
