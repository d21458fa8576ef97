"""Files of the Hugging Face hub: listed, transferred in parts, checked by size and hash."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from oneshot_fast.errors import ModelError, one_line

_READ = 10.0  # seconds that the hub may be silent
_PATIENCE, _SLOWEST = 60.0, 1 << 16  # seconds, and bytes in them that are progress
_ABOUT = 16 << 20  # bytes of what the hub tells of a repository, at most


@dataclass(frozen=True)
class RemoteFile:
    """One file on the hub, and where it goes.

    Attributes:
        repository: owner/name.
        commit: revision that the hub serves now.
        name: path in the repository.
        size: in bytes.
        digest: SHA-256 of large files, git's SHA-1 of small ones, as the hub states it.
        path: target.
    """

    repository: str
    commit: str
    name: str
    size: int
    digest: str
    path: Path

    @property
    def is_there(self) -> bool:
        """Whether the target has the right size; the hash is not read."""
        return self.path.is_file() and self.path.stat().st_size == self.size

    @property
    def part(self) -> Path:
        """Where its bytes gather; the name has the hash, so that versions are never mixed."""
        return self.path.with_name(f".tmp-{self.path.name}-{self.digest[:12]}")

    @property
    def partial_size(self) -> int:
        """Bytes that came so far."""
        return self.part.stat().st_size if self.part.is_file() else 0


def list_files(
    repository: str, patterns: Sequence[str], folder: Path, known: Mapping[str, str]
) -> tuple[list[RemoteFile], str]:
    """Files of a repository that match ``patterns``, to go to ``folder``, and the licence.

    Args:
        repository: owner/name.
        patterns: Names in it; * matches any in one folder.
        folder: Target.
        known: SHA-256 of files that are taken only with this one.

    Raises:
        ModelError: If the hub does not answer or lacks one, or states another hash than is known.
    """
    from huggingface_hub import ModelInfo, constants

    url = f"{constants.ENDPOINT}/api/models/{repository}?blobs=true"
    try:
        parts = _chunks(url, f"what the hub tells of {repository}", _ABOUT)
        info: Any = ModelInfo(**json.loads(b"".join(chunk for _, chunk in parts)))
    except ModelError:
        raise
    except Exception as error:  # the hub's client raises many types
        raise ModelError(f"the hub did not tell of {repository}: {one_line(error)}") from None
    found = [
        _remote_file(repository, info.sha or "main", sibling, folder)
        for sibling in info.siblings or ()
        if any(_matches(sibling.rfilename, pattern) for pattern in patterns)
    ]
    for pattern in patterns:
        if not any(_matches(file.name, pattern) for file in found):
            raise ModelError(f"{repository} on the hub has no {pattern}; it may have moved")
    for file in found:
        if known.get(file.name, file.digest) != file.digest:
            raise ModelError(f"{file.name} of {repository} is not the published one; not taken")
    card: Any = info.card_data or {}
    licence = card.get("license_name") or card.get("license") or "not stated on the hub"
    link = card.get("license_link")
    return found, one_line(f"{licence} ({link})" if link else licence)


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _remote_file(repository: str, commit: str, sibling: Any, folder: Path) -> RemoteFile:
    name, size = sibling.rfilename, sibling.size
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    parts = set(name.split("/"))
    if parts & {"", ".", ".."} or not name.isprintable() or {*name} & {*"\\:"}:
        raise ModelError(f"the hub names a file {one_line(name)}; not taken")
    known = isinstance(size, int) and size >= 0 and isinstance(digest, str)
    if not known or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest):
        raise ModelError(f"the hub states no size and hash of {name}; not taken")
    return RemoteFile(repository, commit, name, size, digest, folder / name)


def fetch(file: RemoteFile) -> None:
    """Download one file unless it is there; what was transferred before is not asked for again.

    Raises:
        ModelError: If the transfer fails, or the bytes are not those that the hub states.
        OSError: If they cannot be written.
    """
    if file.is_there and digest_of(file.path, file) == file.digest:
        return
    file.path.parent.mkdir(parents=True, exist_ok=True)
    part = file.part
    try:
        _transfer(file)
        if part.stat().st_size != file.size or digest_of(part, file) != file.digest:
            part.unlink()
            raise ModelError(
                f"{file.name} of {file.repository} came corrupted: its bytes are not those that "
                "the hub states; removed, repeat the command"
            )
        part.replace(file.path)
    except ModelError:
        raise
    except Exception as error:  # the hub's client raises many types
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ModelError(
            f"download of {file.name} of {file.repository} broke off: {one_line(error)}; what came "
            "is kept, repeat the command to go on"
        ) from None


def _transfer(file: RemoteFile) -> None:
    """Append what is missing of the file to its part, in up to three tries without progress.

    The hub's client would start anew in every process, and wait for a slow server for ever.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from tqdm import tqdm

    url = hf_hub_url(file.repository, file.name, revision=file.commit)
    what, failures = f"{file.name} of {file.repository}", 0
    bar = tqdm(total=file.size, desc=file.name, unit="B", unit_scale=True, disable=None)
    with bar, file.part.open("ab", buffering=0) as target:
        if target.tell() > file.size:
            target.truncate(0)
        while (start := file.partial_size) < file.size:
            try:
                for place, chunk in _chunks(url, what, file.size, start):
                    if place == 0 < file.partial_size:  # the server cannot go on
                        target.truncate(0)
                    target.write(chunk)
                    bar.update(place + len(chunk) - bar.n)
            except (HfHubHTTPError, ModelError):
                raise
            except Exception as error:  # of whatever client the hub's is made of
                failures = 0 if file.partial_size - start >= _SLOWEST else failures + 1
                if failures == 3 or (isinstance(error, OSError) and error.errno is not None):
                    raise
                time.sleep(1)
            else:
                break
        os.fsync(target.fileno())


def _chunks(url: str, what: str, size: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """What a server sends of ``url`` from byte ``start``, each part with its place.

    Raises:
        ModelError: If it is more than ``size`` bytes, or hardly goes on.
    """
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    # compressed bytes could not be resumed
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=_READ, retry_on_exceptions=()
    ) as response:
        hf_raise_for_status(response)
        place = start if response.status_code == 206 else 0
        since, had = time.monotonic(), place
        for chunk in response.iter_raw():
            if place + len(chunk) > size:
                raise ModelError(f"{what} is longer than the {size:,} bytes expected; not taken")
            yield place, chunk
            place += len(chunk)
            if place - had >= _SLOWEST:
                since, had = time.monotonic(), place
            elif time.monotonic() - since > _PATIENCE:
                raise ModelError(
                    f"{what} hardly comes: {place - had} bytes in {_PATIENCE:.0f} s; what came is "
                    "kept, repeat the command to go on"
                )


def digest_of(path: Path, file: RemoteFile) -> str:
    """Hash of a local file, of the kind that the hub states for ``file``."""
    if len(file.digest) == 64:
        digest = hashlib.sha256()
    else:  # git's name of a blob
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
