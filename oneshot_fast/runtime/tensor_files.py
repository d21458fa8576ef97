"""Tensors of files that others wrote; code in a pickle is never run."""

import errno
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from oneshot_fast.errors import ModelError, one_line


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ModelError: If it is damaged.
    """
    refuse_text(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"cannot read {path}: {one_line(error)}; download it anew") from None


def read_header(path: Path) -> tuple[dict[str, tuple[str, list[int]]], dict[str, str]]:
    """Type (F32, ...) and shape of every tensor of a safetensors file, and its metadata.

    Raises:
        ModelError: If it is damaged.
    """
    refuse_text(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
            return kinds, file.metadata() or {}
    except SafetensorError as error:
        raise ModelError(f"cannot read {path}: {one_line(error)}; download it anew") from None


def refuse_text(path: Path) -> None:
    """Raise ModelError for what is often found in a file's place: a pointer, or a web page."""
    with path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a git-lfs pointer, not the file; fetch it (git lfs pull)")
    if start.startswith((b"<!doctype", b"<html")):
        raise ModelError(f"{path} is a web page, not the file; download it anew")


def common_dtype(names: Iterable[str]) -> torch.dtype:
    """Type of weights whose types in a safetensors header are ``names``; float32 for a mixture."""
    known = {"F16": torch.float16, "BF16": torch.bfloat16}
    kinds = {name for name in names if "F" in name}
    return known.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def misfit(info: Mapping[str, Any]) -> str | None:
    """The weight that is missing, unknown or of another shape in what was loaded; None if none is.

    Args:
        info: From ``from_pretrained(output_loading_info=True)`` of diffusers or transformers, which
            leave at random what does not fit.
    """
    wrong = [f"no {key}" for key in sorted(info["missing_keys"])]
    wrong += [f"an unknown {key}" for key in sorted(info["unexpected_keys"])]
    wrong += [
        f"{key} of shape {list(found)}, not {list(expected)}"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    return (wrong[0] + (f" and {len(wrong) - 1} more" if wrong[1:] else "")) if wrong else None


def load_tensors(path: Path, mmap: bool = False) -> Any:
    """What a .pt file of torch.save holds, on the CPU; code in a pickle is never run.

    With ``mmap`` its tensors stay in the file until they are read.

    Raises:
        ValueError: If it claims more bytes than the file has, by compression or strides.
        Exception: torch raises many types for a broken file.
    """
    size, is_zip = path.stat().st_size, zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            _check_claim(sum(entry.file_size for entry in archive.infolist()), size)
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    for value in _tensors_in(loaded):
        _check_claim(value.numel() * value.element_size(), size)
    return loaded


def _tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Tensors in dictionaries of dictionaries, of which there may be a circle."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict) and depth:
        for inner in value.values():
            yield from _tensors_in(inner, depth - 1)


def _check_claim(claimed: int, size: int) -> None:
    if claimed > size:
        raise ValueError(f"it claims {claimed:,} bytes, the file has {size:,}")


def read_pickle(path: Path, mmap: bool = False) -> dict[str, Tensor]:
    """Tensors of a .pt or .pth file, on the CPU; code in the file is never run.

    With ``mmap`` they stay in the file until they are read.

    Returns:
        The tensors by key; those under ``state_dict`` where the file has that.

    Raises:
        ModelError: If the file is damaged or holds more than tensors.
    """
    refuse_text(path)
    try:
        loaded = load_tensors(path, mmap)
    except Exception as error:  # torch raises many types for a broken file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before its start
            raise
        # torch's own message advises to run the pickled code
        why = "" if isinstance(error, pickle.UnpicklingError) else f": {one_line(error)}"
        raise ModelError(
            f"cannot read the tensors of {path}, damaged or more than tensors{why}"
        ) from None
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(tensors, dict) or not all(torch.is_tensor(v) for v in tensors.values()):
        raise ModelError(f"{path} is no checkpoint: expected tensors by name")
    return tensors
