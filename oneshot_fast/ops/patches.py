"""patch_rotate and patch_outer: a matrix times every patch of a latent, and sums of outer products.

Each is the other's gradient, so derivatives of any order are these two kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from oneshot_fast.ops._checks import check_like, check_patches
from oneshot_fast.ops._register import OpSpec, define, in_front, save


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


def _gradients_fake(grad: Tensor, x: Tensor, q: Tensor, p: int) -> tuple[Tensor, Tensor]:
    op = "d_patch_rotate"
    check_patches(op, grad, p, q.shape[:-2])
    check_like(op, "x", x, grad.shape, grad)
    check_like(op, "q", q, (*q.shape[:-2], *[grad.shape[1] * p * p] * 2), grad)
    return grad.new_empty(grad.shape), grad.new_empty(q.shape)


def _keep_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Each of the two is needed for the gradient of the other only."""
    a, b = inputs[:2]
    if forward_ad._current_level >= 0:
        save(ctx, a, b)
    else:
        needs = ctx.needs_input_grad
        ctx.save_for_backward(a if needs[1] else None, b if needs[0] else None)
    ctx.options = inputs[2], b.shape


def _rotate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, q), (p, q_shape), needs = ctx.saved_tensors, ctx.options, ctx.needs_input_grad
    if needs[0] and needs[1]:
        return *_rotate_gradients(grad, x, q, p), None
    d_x = patch_rotate(grad, q.mT, p) if needs[0] else None
    return d_x, _outer(grad, x, p, list(q_shape[:-2])) if needs[1] else None, None


def _gradients_backward(ctx: Any, u: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
    """Of q^T grad and of the sums of grad x^T."""
    (grad, x, q), (p,) = ctx.saved_tensors, ctx.options
    d_grad = patch_rotate(u, q, p) + patch_rotate(x, v, p)
    return d_grad, patch_rotate(grad, v.mT, p), patch_outer(grad, u, p, q), None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (a, b), (p, _), needs = ctx.saved_tensors, ctx.options, ctx.needs_input_grad
    d_a = patch_rotate(b, grad, p) if needs[0] else None
    return d_a, patch_rotate(a, grad.mT, p) if needs[1] else None, None, None


def _rotate_vmap(info: Any, in_dims: Any, x: Tensor, q: Tensor, p: int) -> tuple[Tensor, int]:
    x = in_front(x, in_dims[0], info.batch_size)
    if in_dims[1] is not None or q.dim() > 2:
        q = in_front(q, in_dims[1], info.batch_size)
        q = (q if q.dim() > 3 else q[:, None].expand(*x.shape[:2], -1, -1)).flatten(0, 1)
    return patch_rotate(x.flatten(0, 1), q, p).unflatten(0, x.shape[:2]), 0


def _outer_vmap(
    info: Any, in_dims: Any, a: Tensor, b: Tensor, p: int, leading: list[int]
) -> tuple[Tensor, int]:
    a, b = (in_front(t, d, info.batch_size) for t, d in zip((a, b), in_dims[:2], strict=True))
    if leading:
        sums = _outer(a.flatten(0, 1), b.flatten(0, 1), p, [a.shape[0] * a.shape[1], *leading[1:]])
        return sums.unflatten(0, a.shape[:2]), 0
    # one sum over all: the images of a batch are parts of a taller one
    a, b = (t.transpose(1, 2).flatten(2, 3) for t in (a, b))
    return _outer(a, b, p, [a.shape[0]]), 0


def _gradients_vmap(
    info: Any, in_dims: Any, grad: Tensor, x: Tensor, q: Tensor, p: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    if in_dims[2] is not None:
        q = q.movedim(in_dims[2], 0)
        in_dims = (*in_dims[:2], 0)
    d_x, _ = _rotate_vmap(info, (in_dims[0], in_dims[2]), grad, q.mT, p)
    leading = list(q.shape[:-2] if in_dims[2] is None else q.shape[1:-2])
    d_q, _ = _outer_vmap(info, in_dims, grad, x, p, leading)
    return (d_x, d_q), (0, 0)


_rotate = define(
    "patch_rotate",
    _rotate_fake,
    _rotate_backward,
    rotate_reference,
    setup_context=_keep_factors,
    vmap=_rotate_vmap,
    autocast="lower",
)
_outer = define(
    "patch_outer",
    _outer_fake,
    _outer_backward,
    outer_reference,
    setup_context=_keep_factors,
    vmap=_outer_vmap,
    autocast="lower",
)
_rotate_gradients = define(
    "d_patch_rotate", _gradients_fake, _gradients_backward, saved=3, vmap=_gradients_vmap
)


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
