"""Triton kernels of pixel_l1; checks and autograd are in oneshot_fast.ops."""

import triton
import triton.language as tl
from torch import Tensor

from oneshot_fast.kernels.partial_sums import gradient_per_image, mean_per_image


@triton.jit
def _error(y, target):
    """Clamp(y / 2 + 0.5, 0, 1) - target, by comparisons: a NaN stays a NaN."""
    unit = y * 0.5 + 0.5
    unit = tl.where(unit < 0, 0.0, unit)
    unit = tl.where(unit > 1, 1.0, unit)
    return unit - target


@triton.jit
def _slope(y, error, WRT_TARGET: tl.constexpr):
    """D |error| in y, or in target: 0 at 0; the clamp's borders count as inside, as in torch."""
    sign = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0)).to(y.dtype)
    if WRT_TARGET:
        return -sign
    unit = y * 0.5 + 0.5
    return tl.where((unit >= 0) & (unit <= 1), 0.5 * sign, 0.0)


@triton.jit
def pixel_l1_kernel(
    # loss = mean over the n elements of an image of |e|, e = clamp(y / 2 + 0.5, 0, 1) - target.
    y_ptr,  # [B, n]
    target_ptr,  # [B, n]
    sums_ptr,  # [B, chunks], or [B] the loss itself for one chunk
    n,
    chunks,
    mean: tl.float64,  # factor of the sums: 1 / n for one chunk, else 1
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    image = (tl.program_id(0) // chunks).to(tl.int64)
    i0 = tl.program_id(0) % chunks * CHUNK
    total = tl.zeros((BLOCK,), dtype=ACC)
    for i in range(0, CHUNK, BLOCK):
        offsets = i0 + i + tl.arange(0, BLOCK)
        mask = offsets < n
        offsets = image * n + offsets
        y = tl.load(y_ptr + offsets, mask=mask, other=-1.0).to(ACC)
        target = tl.load(target_ptr + offsets, mask=mask, other=0.0).to(ACC)
        total += tl.abs(_error(y, target))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total) * mean)


@triton.jit
def d_pixel_l1_kernel(
    # out = grad d loss / dy, or grad d loss / dtarget where WRT_TARGET
    grad_ptr,  # [B], accumulation dtype
    y_ptr,  # [B, n]
    target_ptr,  # [B, n]
    out_ptr,  # [B, n]
    n,
    blocks,
    WRT_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = grad_ptr.dtype.element_ty
    image = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    offsets = image * n + offsets
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(ACC)
    target = tl.load(target_ptr + offsets, mask=mask, other=0.0).to(ACC)
    out = _slope(y, _error(y, target), WRT_TARGET) * (tl.load(grad_ptr + image) / n)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


def pixel_l1(y: Tensor, target: Tensor) -> Tensor:
    """Mean over C, H, W of |clamp(y / 2 + 0.5, 0, 1) - target|.

    Args:
        y: Decoder output, [B, C, H, W], in [-1, 1] before clamping.
        target: Images, [B, C, H, W], [0, 1] RGB.

    Returns:
        Loss per image, [B], in the accumulation dtype.
    """
    return mean_per_image(pixel_l1_kernel, (y, target))


def d_pixel_l1(grad: Tensor, y: Tensor, target: Tensor, wrt_target: bool) -> Tensor:
    """Gradient of <grad, loss> in ``y``, or in ``target``.

    Args:
        grad: Gradient of the losses, [B], in the accumulation dtype.
        y: Decoder output, [B, C, H, W].
        target: Images, [B, C, H, W], [0, 1] RGB.
        wrt_target: In ``target`` instead of ``y``.

    Returns:
        Gradient, [B, C, H, W].
    """
    return gradient_per_image(d_pixel_l1_kernel, grad, (y, target), WRT_TARGET=wrt_target)
