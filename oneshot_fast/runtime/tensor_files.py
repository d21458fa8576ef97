"""Tensors of files that others wrote; code in a pickle is never run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from oneshot_fast.errors import ModelError, one_line


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ModelError: If it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"cannot read {path}: {one_line(error)}; download it anew") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pt or .pth file, on the CPU; code in the file is never run.

    Returns:
        The tensors by key; those under ``state_dict`` where the file has that.

    Raises:
        ModelError: If the file is damaged or holds more than tensors.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many types for a broken file
        raise ModelError(
            f"cannot read the tensors of {path}, damaged or more than tensors: {one_line(error)}"
        ) from None
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(tensors, dict) or not all(torch.is_tensor(v) for v in tensors.values()):
        raise ModelError(f"{path} is no checkpoint: expected tensors by name")
    return tensors
