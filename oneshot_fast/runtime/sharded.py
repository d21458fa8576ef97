"""Tensors of which each process holds a part, torch's DTensor, as FSDP2 makes them of weights."""

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it, in every process; of a sharded one all processes ask together."""
    held: Any = tensor
    return held.full_tensor() if is_sharded(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    held: Any = tensor
    return held.to_local() if is_sharded(tensor) else tensor


def device_of(tensor: Tensor) -> torch.device:
    """Where it is computed with; a part of a sharded one may wait elsewhere."""
    if not is_sharded(tensor):
        return tensor.device
    held: Any = tensor
    return torch.empty(0, device=held.device_mesh.device_type).device


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has as a whole, held as ``like`` is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    held: Any = like
    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, held.device_mesh, held.placements, src_data_rank=None)


def join_like(part: Tensor, like: Tensor) -> Tensor:
    """The tensor, held as ``like`` is, of which this process has its ``own_part``."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    held: Any = like
    return DTensor.from_local(
        part.to(like.device),
        held.device_mesh,
        held.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
