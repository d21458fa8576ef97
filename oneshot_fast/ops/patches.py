"""patch_rotate and patch_outer: a matrix times every patch of a latent, and sums of outer products.

Each is the other's gradient, so derivatives of any order are these two kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
    return _rotate(x, q, p)


def patch_outer(a: Tensor, b: Tensor, p: int, like: Tensor | Sequence[int] = ()) -> Tensor:
    """Sum a_n b_n^T over the patches n that share one matrix of ``like``.

    With a = b this is the patch covariance times the number of patches.

    Args:
        a: Latents, [B, C, H, W]; H and W are multiples of ``p``.
        b: Latents of the same shape, dtype and device as ``a``.
        p: Patch side, in latent pixels.
        like: The ``q`` of ``patch_rotate``, or its leading shape: () for one sum over all patches,
            (B,) for one per image, (B, Gh, Gw) for one per tile.

    Returns:
        Sums, [*leading, D, D] with D = C p p, in the dtype of ``a``.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not agree.
    """
    return _outer(a, b, p, _leading(like))


def rotate_reference(x: Tensor, q: Tensor, p: int) -> Tensor:
    """Plain-torch definition of ``patch_rotate``."""
    tiles = _tile_grid(q.shape[:-2])
    images = q.shape[0] if q.dim() > 2 else 1
    matrices = q.reshape(images, *tiles, *q.shape[-2:])
    return _fold(matrices @ _unfold(x, p, tiles), x.shape, p)


def outer_reference(a: Tensor, b: Tensor, p: int, like: Tensor | Sequence[int] = ()) -> Tensor:
    """Plain-torch definition of ``patch_outer``."""
    leading = torch.Size(_leading(like))
    u, v = (_unfold(x, p, _tile_grid(leading)) for x in (a, b))
    sums = u @ v.mT
    return sums.reshape(*leading, *sums.shape[-2:]) if leading else sums.sum((0, 1, 2))


def _leading(like: Tensor | Sequence[int]) -> list[int]:
    return list(like.shape[:-2] if isinstance(like, Tensor) else like)


def _tile_grid(leading: torch.Size) -> tuple[int, int]:
    """Tiles (Gh, Gw) with a matrix of their own, from the leading shape of the matrices."""
    return (leading[1], leading[2]) if len(leading) == 3 else (1, 1)


def _unfold(x: Tensor, p: int, tiles: tuple[int, int]) -> Tensor:
    """Cut [B, C, H, W] into the patches of each tile, as columns: [B, Gh, Gw, D, N / (Gh Gw)]."""
    B, C, H, W = x.shape
    Gh, Gw = tiles
    h, w = H // p // Gh, W // p // Gw
    patches = x.reshape(B, C, Gh, h, p, Gw, w, p).permute(0, 2, 5, 1, 4, 7, 3, 6)
    return patches.reshape(B, Gh, Gw, C * p * p, h * w)


def _fold(patches: Tensor, shape: torch.Size, p: int) -> Tensor:
    """Inverse of ``_unfold``: [B, Gh, Gw, D, N / (Gh Gw)] to [B, C, H, W] = ``shape``."""
    B, C, H, W = shape
    Gh, Gw = patches.shape[1:3]
    x = patches.reshape(B, Gh, Gw, C, p, p, H // p // Gh, W // p // Gw)
    return x.permute(0, 3, 1, 6, 4, 2, 7, 5).reshape(shape)


def _rotate_fake(x: Tensor, q: Tensor, p: int) -> Tensor:
    if q.dim() < 2:
        raise RuntimeError(f"patch_rotate: q must be [..., D, D], got {list(q.shape)}")
    leading = q.shape[:-2]
    check_patches("patch_rotate", x, p, leading)
    D = x.shape[1] * p * p
    check_like("patch_rotate", "q", q, (*leading, D, D), x)
    return x.new_empty(x.shape)


def _outer_fake(a: Tensor, b: Tensor, p: int, leading: list[int]) -> Tensor:
    check_patches("patch_outer", a, p, leading)
    check_like("patch_outer", "b", b, a.shape, a)
    D = a.shape[1] * p * p
    return a.new_empty(*leading, D, D)


def _rotate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    (x, q), (p,) = ctx.saved_tensors, ctx.options
    d_x = patch_rotate(grad, q.mT, p) if ctx.needs_input_grad[0] else None
    d_q = patch_outer(grad, x, p, q) if ctx.needs_input_grad[1] else None
    return d_x, d_q, None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    (a, b), (p, _) = ctx.saved_tensors, ctx.options
    d_a = patch_rotate(b, grad, p) if ctx.needs_input_grad[0] else None
    d_b = patch_rotate(a, grad.mT, p) if ctx.needs_input_grad[1] else None
    return d_a, d_b, None, None


_rotate = define("patch_rotate", _rotate_fake, _rotate_backward, rotate_reference, saved=2)
_outer = define("patch_outer", _outer_fake, _outer_backward, outer_reference, saved=2)


def _rotate_inputs(shape: tuple[int, ...], p: int, leading: tuple[int, ...]) -> tuple[Any, ...]:
    D = shape[1] * p * p
    skew = torch.randn(*leading, D, D, dtype=torch.float64) / D
    x = torch.randn(shape, dtype=torch.float64)
    return x, torch.linalg.matrix_exp(skew - skew.mT), p


def _outer_inputs(shape: tuple[int, ...], p: int, leading: tuple[int, ...]) -> tuple[Any, ...]:
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    return a, b, p, leading


# shape of the latent, patch side, leading shape of the matrices
_SMALL = [
    ((3, 4, 8, 12), 2, ()),
    ((3, 4, 8, 12), 2, (3,)),
    ((2, 4, 8, 12), 2, (2, 2, 3)),
    ((2, 3, 9, 15), 3, (2, 3, 1)),
    ((1, 1, 5, 7), 1, (1,)),
    ((2, 1, 16, 24), 8, (2,)),
]

ROTATE = OpSpec(
    name="patch_rotate",
    fn=patch_rotate,
    reference=rotate_reference,
    inputs=_rotate_inputs,
    small=[*_SMALL, ((2, 2, 16, 8), 4, (2, 1, 2)), ((0, 4, 8, 8), 2, (0,))],
    large=[((B, 4, 64, 64), p, (B,)) for p in (2, 4, 8) for B in (1, 16, 64)],
    trained=2,
)
OUTER = OpSpec(
    name="patch_outer",
    fn=patch_outer,
    reference=outer_reference,
    inputs=_outer_inputs,
    small=[*_SMALL, ((19, 1, 8, 4), 4, ()), ((0, 4, 8, 8), 2, ())],
    large=[((B, 4, 64, 64), p, (B,)) for p in (2, 4, 8) for B in (1, 16)],
    trained=2,
)
