"""Files of the Hugging Face hub: listed, transferred in parts, checked by size and hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from oneshot_fast.errors import ModelError, one_line


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
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository, files_metadata=True)
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
    return found, f"{licence} ({link})" if link else licence


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _remote_file(repository: str, commit: str, sibling: Any, folder: Path) -> RemoteFile:
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if sibling.size is None or digest is None:
        raise ModelError(f"the hub states no size and hash of {sibling.rfilename}; not taken")
    path = folder / sibling.rfilename
    return RemoteFile(repository, commit, sibling.rfilename, sibling.size, digest, path)


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
    """Append what is missing of the file to its part.

    ``hf_hub_download`` starts a file anew in every process (since huggingface_hub 1.0); the
    function below it can go on.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(file.repository, file.name, revision=file.commit)
    with file.part.open("ab") as target:
        if target.tell() > file.size:
            target.truncate(0)
        http_get(
            url,
            target,
            resume_size=target.tell(),
            # compressed bytes could not be resumed
            headers={**build_hf_headers(), "Accept-Encoding": "identity"},
            expected_size=file.size,
            displayed_filename=file.name,
        )
        target.flush()
        os.fsync(target.fileno())


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
