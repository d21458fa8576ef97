"""Download models: the generator and those of the rewards, checked by size and hash."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from oneshot_fast.cli import OK, run_command
from oneshot_fast.errors import ModelError

Name = Literal["sdxl-turbo", "CLIP-ViT-L-14", "Aesthetic", "PickScore_v1", "ImageReward", "HPSv2"]
# files by repository on the hub; * matches any name in one folder
CLIP, CLIP_TOKENIZER = "openai/clip-vit-large-patch14", ("vocab.json", "merges.txt")
MODELS: Mapping[Name, Mapping[str, tuple[str, ...]]] = {
    "sdxl-turbo": {
        "stabilityai/sdxl-turbo": (
            "model_index.json",
            "scheduler/*.json",
            "tokenizer/*",
            "tokenizer_2/*",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "text_encoder_2/config.json",
            "text_encoder_2/model.safetensors",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        )
    },
    "CLIP-ViT-L-14": {CLIP: ("config.json", "model.safetensors", *CLIP_TOKENIZER)},
    "Aesthetic": {"camenduru/improved-aesthetic-predictor": ("sac+logos+ava1-l14-linearMSE.pth",)},
    # both were trained with CLIP's vocabulary
    "PickScore_v1": {
        "yuvalkirstain/PickScore_v1": ("config.json", "model.safetensors"),
        CLIP: CLIP_TOKENIZER,
    },
    "HPSv2": {
        "xswu/HPSv2": ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"),
        CLIP: CLIP_TOKENIZER,
    },
    "ImageReward": {
        "THUDM/ImageReward": ("ImageReward.pt",),
        "google-bert/bert-base-uncased": ("vocab.txt", "tokenizer_config.json"),
    },
}
# of copies that are not their authors' own
SHA256 = {
    "sac+logos+ava1-l14-linearMSE.pth": (
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
    )
}


@dataclass(frozen=True)
class DownloadCommand:
    """Download models into a folder each, from the Hugging Face hub (HF_ENDPOINT: a mirror).

    What is there already is checked and kept, a broken transfer goes on where it stopped, and a
    file whose size or hash is not the hub's is refused.
    """

    only: tuple[Name, ...] = ()
    """These models; by default all of them."""
    models_dir: Path = Path("models")
    """Folder that gets one folder per model."""
    dry_run: bool = False
    """Say licences and bytes, and download nothing."""


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


def execute(command: DownloadCommand) -> int:
    """Run the command; returns the exit code.

    Raises:
        ModelError: If the hub cannot be asked, or serves something else than it states.
        OSError: If there is no space.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    files: list[RemoteFile] = []
    for model in dict.fromkeys(command.only) or MODELS:
        for repository, patterns in MODELS[model].items():
            found, licence = list_files(repository, patterns, command.models_dir / model)
            total = sum(file.size for file in found)
            print(f"{model}: {total:,} bytes of {repository}, licence {licence}")
            files += found
    missing = sum(file.size for file in files if not file.is_there)
    print(f"to download: {missing:,} bytes of {sum(file.size for file in files):,}", flush=True)
    if command.dry_run:
        return OK
    command.models_dir.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(command.models_dir).free < missing - sum(map(_partial_size, files)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(command.models_dir))
    for file in files:
        fetch(file)
    print(f"all files are in {command.models_dir}, sizes and hashes checked")
    return OK


def list_files(
    repository: str, patterns: Sequence[str], folder: Path
) -> tuple[list[RemoteFile], str]:
    """Files of a repository that match ``patterns``, to go to ``folder``, and the licence.

    Raises:
        ModelError: If the hub does not answer or lacks one, or states another hash than we know.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository, files_metadata=True)
    except Exception as error:  # the hub's client raises many types
        raise ModelError(f"the hub did not tell of {repository}: {_reason(error)}") from None
    found = [
        _remote_file(repository, info.sha or "main", sibling, folder)
        for sibling in info.siblings or ()
        if any(_matches(sibling.rfilename, pattern) for pattern in patterns)
    ]
    for pattern in patterns:
        if not any(_matches(file.name, pattern) for file in found):
            raise ModelError(f"{repository} on the hub has no {pattern}; it may have moved")
    for file in found:
        if SHA256.get(file.name, file.digest) != file.digest:
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
    part = _part(file)
    try:
        _transfer(file, part)
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
            f"download of {file.name} of {file.repository} broke off: {_reason(error)}; what came "
            "is kept, repeat the command to go on"
        ) from None


def _transfer(file: RemoteFile, part: Path) -> None:
    """Append to ``part`` what is missing of the file.

    ``hf_hub_download`` starts a file anew in every process (since huggingface_hub 1.0); the
    function below it can go on.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(file.repository, file.name, revision=file.commit)
    with part.open("ab") as target:
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


def _part(file: RemoteFile) -> Path:
    """Bytes so far; the name has the hash, so that versions are never mixed."""
    return file.path.with_name(f".tmp-{file.path.name}-{file.digest[:12]}")


def _partial_size(file: RemoteFile) -> int:
    return _part(file).stat().st_size if _part(file).is_file() else 0


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


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m oneshot_fast.download``."""
    return run_command("download", DownloadCommand, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
