"""Deterministic reductions: partial sums are added in a fixed order, also to a mean per image."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements that a program sums, a whole latent of 4 x 64 x 64. A constant, so that the rounding is
# the same on every device.
CHUNK = 16384
_BLOCK_S = 64
_BLOCK_I = 64


@triton.jit
def add_partial_sums_kernel(
    # out[g, i] = sum over s of partial[g, s, i], times mean
    partial_ptr,  # [G, S, n]
    out_ptr,  # [G, n]
    S,
    n,
    mean: tl.float64,  # factor of the sums
    BLOCK_S: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK_I)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    s = tl.arange(0, BLOCK_S)
    partial_ptr += g * S * n
    total = tl.zeros((BLOCK_S, BLOCK_I), dtype=partial_ptr.dtype.element_ty)
    for s0 in range(0, S, BLOCK_S):
        rows = (s0 + s)[:, None]
        total += tl.load(
            partial_ptr + rows.to(tl.int64) * n + i[None, :],
            mask=(rows < S) & (i < n)[None, :],
            other=0.0,
        )
    out = tl.sum(total, axis=0) * mean
    tl.store(out_ptr + g * n + i, out.to(out_ptr.dtype.element_ty), mask=i < n)


def block_of(images: Tensor, n: int) -> int:
    """Elements per step of a program of 256 threads over images of ``n`` elements.

    8 per thread, 4 in float64, which needs two registers for each.
    """
    return min(1024 if images.dtype == torch.float64 else 2048, triton.next_power_of_2(n))


def add_partial_sums(partial: Tensor, out: Tensor, mean: float = 1.0) -> Tensor:
    """Write the sum of ``partial`` over its second dimension, times ``mean``, to ``out``.

    Args:
        partial: Partial sums, [G, S, ...], in the accumulation dtype.
        out: Result, [G, ...] or, for G = 1, [...].
        mean: Factor of the sums.

    Returns:
        ``out``.
    """
    G, S = partial.shape[:2]
    items = out.numel() // G
    block_i = min(_BLOCK_I, triton.next_power_of_2(items))
    # few results: more rows at once, for the same latency
    block_s = _BLOCK_S * _BLOCK_I // block_i
    with torch.cuda.device_of(partial):
        add_partial_sums_kernel[(G * triton.cdiv(items, block_i),)](
            partial,
            out,
            S,
            items,
            mean,
            BLOCK_S=min(block_s, triton.next_power_of_2(S)),
            BLOCK_I=block_i,
            num_warps=4,
            num_stages=1,
        )
    return out


def mean_per_image(kernel: Any, images: Sequence[Tensor], *scalars: float) -> Tensor:
    """Losses [B] in the accumulation dtype that are means over an image; NaN without elements.

    Args:
        kernel: Sums CHUNK elements of an image per program; it takes the images, the sums, the
            scalars, n, chunks and mean.
        images: [B, C, H, W] each.
        *scalars: The kernel's.
    """
    images = [x.contiguous() for x in images]
    first = images[0]
    loss = first.new_empty(len(first), dtype=torch.promote_types(first.dtype, torch.float32))
    if first.numel() == 0:
        return loss.fill_(torch.nan)
    n = first[0].numel()
    chunks = triton.cdiv(n, CHUNK)
    sums = loss if chunks == 1 else loss.new_empty(*loss.shape, chunks)
    with torch.cuda.device_of(first):
        kernel[(sums.numel(),)](
            *(*images, sums, *scalars, n, chunks, 1 / n if chunks == 1 else 1.0),
            CHUNK=min(CHUNK, triton.next_power_of_2(n)),
            BLOCK=block_of(first, n),
            num_warps=8,
        )
    return loss if chunks == 1 else add_partial_sums(sums, loss, 1 / n)


def gradient_per_image(
    kernel: Any, grad: Tensor, images: Sequence[Tensor], *scalars: float, **constants: bool
) -> Tensor:
    """Gradient [B, C, H, W] of such losses, whose own is ``grad`` [B].

    Args:
        kernel: It takes grad, the images, the result, the scalars, n, blocks and the constants.
        grad: In the accumulation dtype.
        images: [B, C, H, W] each.
        *scalars: The kernel's.
        **constants: The kernel's.
    """
    images = [x.contiguous() for x in images]
    out = torch.empty_like(images[0])
    if out.numel() == 0:
        return out
    n = out[0].numel()
    block = block_of(out, n)
    blocks = triton.cdiv(n, block)
    with torch.cuda.device_of(out):
        kernel[(len(out) * blocks,)](
            *(grad.contiguous(), *images, out, *scalars, n, blocks),
            **constants,
            BLOCK=block,
            num_warps=8,
        )
    return out
