"""patch_outer: sums of outer products of patches, the gradient of patch_rotate in its matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.ops._checks import check_like, check_patches
from oneshot_fast.ops._register import OpSpec, define
from oneshot_fast.ops.patch_rotate import patch_rotate, tile_grid, unfold


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
    return _call(a, b, p, _leading(like))


def reference(a: Tensor, b: Tensor, p: int, like: Tensor | Sequence[int] = ()) -> Tensor:
    """Plain-torch definition of ``patch_outer``."""
    leading = torch.Size(_leading(like))
    u, v = unfold(a, p, tile_grid(leading)), unfold(b, p, tile_grid(leading))
    sums = u @ v.mT
    return sums.reshape(*leading, *sums.shape[-2:]) if leading else sums.sum((0, 1, 2))


def _leading(like: Tensor | Sequence[int]) -> list[int]:
    return list(like.shape[:-2] if isinstance(like, Tensor) else like)


def _fake(a: Tensor, b: Tensor, p: int, leading: list[int]) -> Tensor:
    check_patches("patch_outer", a, p, leading)
    check_like("patch_outer", "b", b, a.shape, a)
    D = a.shape[1] * p * p
    return a.new_empty(*leading, D, D)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.p, _ = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    a, b = ctx.saved_tensors
    d_a = patch_rotate(b, grad, ctx.p) if ctx.needs_input_grad[0] else None
    d_b = patch_rotate(a, grad.mT, ctx.p) if ctx.needs_input_grad[1] else None
    return d_a, d_b, None, None


_call = define("patch_outer", _fake, _setup_context, _backward, reference)


def _inputs(shape: tuple[int, ...], p: int, leading: tuple[int, ...]) -> tuple[Any, ...]:
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    return a, b, p, leading


SPEC = OpSpec(
    name="patch_outer",
    fn=patch_outer,
    reference=reference,
    inputs=_inputs,
    small=[
        ((3, 4, 8, 12), 2, ()),
        ((3, 4, 8, 12), 2, (3,)),
        ((2, 4, 8, 12), 2, (2, 2, 3)),
        ((2, 3, 9, 15), 3, (2, 3, 1)),
        ((1, 1, 5, 7), 1, (1,)),
        ((19, 1, 8, 4), 4, ()),
        ((2, 1, 16, 24), 8, (2,)),
        ((0, 4, 8, 8), 2, ()),
    ],
    large=[((B, 4, 64, 64), p, (B,)) for p in (2, 4, 8) for B in (1, 16)],
    trained=2,
)
