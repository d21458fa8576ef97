"""patch_rotate: multiply every patch of a latent by an orthogonal matrix."""

from typing import Any

import torch
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.ops._checks import check_like, check_patches
from oneshot_fast.ops._register import OpSpec, define


def patch_rotate(x: Tensor, q: Tensor, p: int) -> Tensor:
    """Replace every patch vector v of ``x``, ordered (channel, row, column), by ``q @ v``.

    Args:
        x: Latents, [B, C, H, W]; H and W are multiples of ``p``.
        q: Matrices of D = C p p rows and columns, same dtype and device as ``x``: [D, D] shared by
            all, [B, D, D] one per image, or [B, Gh, Gw, D, D] one per tile, where the H/p x W/p
            patches of an image are cut into Gh x Gw equal tiles.
        p: Patch side, in latent pixels.

    Returns:
        Rotated latents, [B, C, H, W], in the dtype of ``x``.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not agree.
    """
    return _call(x, q, p)


def reference(x: Tensor, q: Tensor, p: int) -> Tensor:
    """Plain-torch definition of ``patch_rotate``."""
    tiles = tile_grid(q.shape[:-2])
    images = q.shape[0] if q.dim() > 2 else 1
    matrices = q.reshape(images, *tiles, *q.shape[-2:])
    return fold(matrices @ unfold(x, p, tiles), x.shape, p)


def tile_grid(leading: torch.Size) -> tuple[int, int]:
    """Tiles (Gh, Gw) with a matrix of their own, from the leading shape of the matrices."""
    return (leading[1], leading[2]) if len(leading) == 3 else (1, 1)


def unfold(x: Tensor, p: int, tiles: tuple[int, int]) -> Tensor:
    """Cut [B, C, H, W] into the patches of each tile, as columns: [B, Gh, Gw, D, N / (Gh Gw)]."""
    B, C, H, W = x.shape
    Gh, Gw = tiles
    h, w = H // p // Gh, W // p // Gw
    patches = x.reshape(B, C, Gh, h, p, Gw, w, p).permute(0, 2, 5, 1, 4, 7, 3, 6)
    return patches.reshape(B, Gh, Gw, C * p * p, h * w)


def fold(patches: Tensor, shape: torch.Size, p: int) -> Tensor:
    """Inverse of ``unfold``: [B, Gh, Gw, D, N / (Gh Gw)] to [B, C, H, W] = ``shape``."""
    B, C, H, W = shape
    Gh, Gw = patches.shape[1:3]
    x = patches.reshape(B, Gh, Gw, C, p, p, H // p // Gh, W // p // Gw)
    return x.permute(0, 3, 1, 6, 4, 2, 7, 5).reshape(shape)


def _fake(x: Tensor, q: Tensor, p: int) -> Tensor:
    if q.dim() < 2:
        raise RuntimeError(f"patch_rotate: q must be [..., D, D], got {list(q.shape)}")
    leading = q.shape[:-2]
    check_patches("patch_rotate", x, p, leading)
    D = x.shape[1] * p * p
    check_like("patch_rotate", "q", q, (*leading, D, D), x)
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, q, ctx.p = inputs
    ctx.save_for_backward(x, q)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, q = ctx.saved_tensors
    d_x = patch_rotate(grad, q.mT, ctx.p) if ctx.needs_input_grad[0] else None
    d_q = ops.patch_outer(grad, x, ctx.p, q) if ctx.needs_input_grad[1] else None
    return d_x, d_q, None


_call = define("patch_rotate", _fake, _setup_context, _backward, reference)


def _inputs(shape: tuple[int, ...], p: int, leading: tuple[int, ...]) -> tuple[Any, ...]:
    D = shape[1] * p * p
    skew = torch.randn(*leading, D, D, dtype=torch.float64) / D
    x = torch.randn(shape, dtype=torch.float64)
    return x, torch.linalg.matrix_exp(skew - skew.mT), p


SPEC = OpSpec(
    name="patch_rotate",
    fn=patch_rotate,
    reference=reference,
    inputs=_inputs,
    small=[
        ((3, 4, 8, 12), 2, ()),
        ((3, 4, 8, 12), 2, (3,)),
        ((2, 4, 8, 12), 2, (2, 2, 3)),
        ((2, 3, 9, 15), 3, (2, 3, 1)),
        ((1, 1, 5, 7), 1, (1,)),
        ((2, 2, 16, 8), 4, (2, 1, 2)),
        ((2, 1, 16, 24), 8, (2,)),
        ((0, 4, 8, 8), 2, (0,)),
    ],
    large=[((B, 4, 64, 64), p, (B,)) for p in (2, 4, 8) for B in (1, 16, 64)],
    trained=2,
)
