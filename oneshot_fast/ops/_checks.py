"""Checks of arguments where no C++ sees them: under torch.compile and before a Triton launch.

Their words are those of the C++ checks; the same tests hold for both.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_dtype(op: str, t: Tensor) -> None:
    """Raise RuntimeError unless the kernels know the dtype of ``t``."""
    if t.dtype not in _DTYPES:
        raise RuntimeError(
            f"{op}: expected float32, float64, float16 or bfloat16, got {_name(t.dtype)}"
        )


def check_like(
    op: str,
    name: str,
    t: Tensor,
    shape: Sequence[int],
    first: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise RuntimeError unless ``t`` has the shape, and device and dtype of ``first``.

    ``dtype`` replaces that of ``first``.
    """
    if tuple(t.shape) != tuple(shape):
        raise RuntimeError(f"{op}: {name} must be {list(shape)}, got {list(t.shape)}")
    if t.device != first.device:
        raise RuntimeError(f"{op}: {name} must be on {first.device}, got {t.device}")
    expected = dtype or first.dtype
    if t.dtype != expected:
        raise RuntimeError(f"{op}: {name} must be {_name(expected)}, got {_name(t.dtype)}")


def check_square(op: str, a: Tensor) -> None:
    """Raise RuntimeError unless ``a`` is [..., D, D]."""
    if a.dim() < 2 or a.shape[-1] != a.shape[-2]:
        raise RuntimeError(f"{op}: expected [..., D, D], got {list(a.shape)}")
    check_dtype(op, a)


def check_images(op: str, name: str, t: Tensor) -> None:
    """Raise RuntimeError unless ``t`` is [B, C, H, W]."""
    if t.dim() != 4:
        raise RuntimeError(f"{op}: {name} must be [B, C, H, W], got {list(t.shape)}")
    check_dtype(op, t)


def check_patches(op: str, x: Tensor, p: int, leading: Sequence[int]) -> None:
    """Raise RuntimeError unless p x p patches in ``leading`` tiles cover ``x`` [B, C, H, W]."""
    if x.dim() != 4:
        raise RuntimeError(f"{op}: expected [B, C, H, W], got {list(x.shape)}")
    B, _, H, W = x.shape
    if p <= 0 or H % p or W % p:
        raise RuntimeError(f"{op}: p = {p} must divide H and W of {list(x.shape)}")
    if len(leading) not in (0, 1, 3) or (len(leading) and leading[0] != B):
        raise RuntimeError(
            f"{op}: one matrix for all, per image ({B}) or per tile ({B}, Gh, Gw), "
            f"got {list(leading)}"
        )
    Gh, Gw = leading[1:] if len(leading) == 3 else (1, 1)
    if Gh <= 0 or Gw <= 0 or H // p % Gh or W // p % Gw:
        raise RuntimeError(
            f"{op}: the grid of {H // p} x {W // p} patches is not divisible into {Gh} x {Gw} tiles"
        )
    check_dtype(op, x)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of floating-point dtypes in the one that torch would compute with."""
    first = tensors[0].dtype
    if all(t.dtype is first or not t.is_floating_point() for t in tensors):
        return tensors
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)
