"""Read one noise from a safetensors shard or from a .pt file, tensors only."""

import functools
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor

from oneshot_fast.errors import DataError, refused
from oneshot_fast.runtime.files import check_safetensors
from oneshot_fast.runtime.tensor_files import load_tensors

LARGEST = 1 << 26  # values of a noise; 64 channels of 1024 x 1024 latent pixels


def read_noise(path: Path, index: int | None = None, *, verify: bool = True) -> Tensor:
    """Read one noise; of a safetensors shard, only its row.

    Args:
        path: .safetensors file with a tensor "z", or a torch.save file of one tensor or of a dict
            that holds exactly one noise. Code in a pickle is never run.
        index: row of "z" [N, C, h, w]; None where the file holds one noise, [C, h, w] or
            [1, C, h, w].
        verify: compare a shard of ours with its hash, once.

    Returns:
        [C, h, w] float32 on the CPU, finite.

    Raises:
        DamagedError: a shard of ours is not as it was written.
        DataError: the file is damaged or no plain tensor; the noise has a wrong shape or values.
    """
    with refused(DataError, f"{path}: cannot be read as tensors: "):
        try:
            if path.suffix == ".safetensors":
                if verify:
                    _check(path, path.stat().st_mtime_ns)
                noise = _only_noise(path, _read_row(path, index))
            else:
                noise = _only_noise(path, load_tensors(path))
        except pickle.UnpicklingError:  # torch's own message advises to run the pickled code
            raise DataError(
                f"{path}: holds more than tensors, or is damaged; pickled code is never run: "
                "save the noise again with torch.save(tensor, path)"
            ) from None
    noise = noise.detach().to(torch.float32).contiguous()
    if not noise.isfinite().all():
        row = "" if index is None else f" in row {index}"
        raise DataError(f"{path}: NaN or infinite noise{row}; assign this target again")
    return noise


@functools.lru_cache(1 << 16)
def _check(path: Path, changed: int) -> None:
    """Raise DamagedError if a shard of ours is damaged; read once, unless it ``changed``."""
    check_safetensors(path)


def _read_row(path: Path, index: int | None) -> Tensor:
    """Row `index` of the shard's tensor "z", or all of "z", through a memory map.

    By NumPy where it has the type: safetensors 0.8 never frees 64 bytes of a tensor of torch's.
    """
    with safe_open(path, framework="np") as file:
        names = file.keys()
        if "z" not in names:
            raise DataError(f"{path}: has no tensor 'z' but {', '.join(names) or 'nothing'}")
        rows = file.get_slice("z")
        shape = rows.get_shape()
        _check_size(path, shape if index is None else shape[1:])
        if index is not None and (not shape or index >= shape[0]):
            raise DataError(f"{path}: has no row {index}: tensor 'z' is {shape}")
        if rows.get_dtype() in ("F64", "F32", "F16"):
            return torch.as_tensor(file.get_tensor("z") if index is None else rows[index])
    with safe_open(path, framework="pt") as file:
        return cast(Tensor, file.get_tensor("z") if index is None else file.get_slice("z")[index])


def _check_size(path: Path, shape: Sequence[int]) -> None:
    if math.prod(shape) > LARGEST:
        raise DataError(f"{path}: {list(shape)} is no noise: it would be larger than any latent")


def _only_noise(path: Path, value: object) -> Tensor:
    """The one [C, h, w] or [1, C, h, w] float tensor that `value` is or, as a dict, holds."""
    items = value.values() if isinstance(value, dict) else [value]
    tensors = [item for item in items if isinstance(item, Tensor)]
    noises = [tensor for tensor in tensors if _is_noise(tensor)]
    if len(noises) != 1:
        found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors) or "no tensor"
        raise DataError(
            f"{path}: expected one float noise [C, h, w] or [1, C, h, w], found {found}"
        )
    _check_size(path, noises[0].shape)
    return noises[0].reshape(noises[0].shape[-3:])


def _is_noise(tensor: Tensor) -> bool:
    one = tensor.ndim == 3 or (tensor.ndim == 4 and tensor.shape[0] == 1)
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return one and plain and tensor.is_floating_point() and tensor.numel() > 0
