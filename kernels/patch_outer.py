"""Triton kernel of patch_outer; checks and autograd are in oneshot_fast.ops."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from oneshot_fast.kernels.partial_sums import add_partial_sums
from oneshot_fast.kernels.patch_tiles import (
    dot,
    elements,
    grid_of,
    segment_offsets,
    tile_origin,
    to_patches,
)

# Patches per step of a program.
_PATCHES = 32
# Steps per partial sum at least, and partial sums of one matrix at most. They depend neither on the
# device nor, for one matrix per image or tile, on the rest of the batch: nor does the rounding.
_STEPS = 8
_MAX_SPLITS = 256


@triton.jit
def patch_outer_kernel(
    # out = sum over n of a_n b_n^T over the patches n that share one matrix.
    # da_n = dout b_n and db_n = dout^T a_n, both patch_rotate.
    a_ptr,  # [B, C, H, W]
    b_ptr,  # [B, C, H, W]
    sums_ptr,  # [G, splits, D, D], G = B Gh Gw, or 1 for one sum over all images
    images,  # that share one sum
    splits,
    C,
    H,
    W,
    tile_h,
    tile_w,
    tiles_h,
    tiles_w,
    P: tl.constexpr,
    P2: tl.constexpr,  # P rounded up to a power of two
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a patch per program, each of P2 elements
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    D = C * P * P
    pid = tl.program_id(0)
    blocks_d = tl.cdiv(C * P, ROWS)
    r_b = pid % blocks_d * ROWS
    pid = pid // blocks_d
    r_a = pid % blocks_d * ROWS
    pid = pid // blocks_d
    split = pid % splits
    group = pid // splits

    # a split takes a range of the blocks of BLOCK_H x BLOCK_W patches of its images
    blocks_w = tl.cdiv(tile_w, BLOCK_W)
    per_image = tl.cdiv(tile_h, BLOCK_H) * blocks_w
    per_split = tl.cdiv(images * per_image, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, images * per_image)
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    DOT: tl.constexpr = tl.float64 if tl.float64 == ACC else tl.float32
    acc = tl.zeros((ROWS * P2, ROWS * P2), dtype=DOT)
    for block in range(first, last):
        tiles = tiles_h * tiles_w
        image = group // tiles * images + block // per_image
        h0 = block % per_image // blocks_w * BLOCK_H
        w0 = block % blocks_w * BLOCK_W
        origin = tile_origin(image, group % tiles, C, H, W, tile_h, tile_w, tiles_w, P)
        offsets_a, mask_a = segment_offsets(
            r_a, h0, w0, C, H, W, tile_h, tile_w, P, P2, ROWS, BLOCK_H, BLOCK_W
        )
        offsets_b, mask_b = segment_offsets(
            r_b, h0, w0, C, H, W, tile_h, tile_w, P, P2, ROWS, BLOCK_H, BLOCK_W
        )
        a = tl.load(a_ptr + origin + offsets_a, mask=mask_a, other=0.0)
        b = tl.load(b_ptr + origin + offsets_b, mask=mask_b, other=0.0)
        a = to_patches(a, ROWS, P2, BLOCK_H, BLOCK_W)
        b = to_patches(b, ROWS, P2, BLOCK_H, BLOCK_W)
        acc = dot(a, tl.trans(b), acc, PRECISION)
    i, inside_i = elements(r_a, C, P, P2, ROWS)
    j, inside_j = elements(r_b, C, P, P2, ROWS)
    sums_ptr += (group.to(tl.int64) * splits + split) * D * D
    mask = inside_i[:, None] & inside_j[None, :]
    tl.store(sums_ptr + i[:, None] * D + j[None, :], acc.to(ACC), mask=mask)


def _splits(steps: int, D: int) -> int:
    """Partial sums of one matrix; at least D patches in each keep the scratch below the input."""
    return max(1, min(steps // max(_STEPS, D // _PATCHES), _MAX_SPLITS))


def patch_outer(
    a: Tensor, b: Tensor, p: int, leading: Sequence[int] = (), precision: str = "ieee"
) -> Tensor:
    """Sum a_n b_n^T over the patches n that share one matrix.

    Args:
        a: Latents, [B, C, H, W].
        b: Latents of the same shape and dtype.
        p: Patch side, in latent pixels.
        leading: (), (B,) or (B, Gh, Gw): the sums' leading shape.
        precision: Of float32 products on the GPU: "ieee", or the tensor cores' "tf32x3", "tf32".

    Returns:
        Sums, [*leading, D, D] with D = C p p, in the dtype of ``a``.
    """
    a, b = a.contiguous(), b.contiguous()
    B, C, H, W = a.shape
    D = C * p * p
    out = a.new_empty(*leading, D, D)
    if a.numel() == 0 or out.numel() == 0:
        return out.zero_()
    tiles = grid_of(a, p, tuple(leading))
    images = 1 if leading else B
    groups = B * tiles[2] * tiles[3] // images
    p2 = triton.next_power_of_2(p)
    # 64 x 64 sums fill the registers of a program; tl.dot needs 16
    rows = max(16 // p2, min(triton.next_power_of_2(C * p), max(1, 64 // p2)))
    blocks_d = triton.cdiv(C * p, rows)
    block_w = min(triton.next_power_of_2(tiles[1]), _PATCHES)
    block_h = _PATCHES // block_w
    splits = _splits(images * triton.cdiv(tiles[0], block_h) * triton.cdiv(tiles[1], block_w), D)
    sums = out
    if splits > 1:
        acc = torch.promote_types(a.dtype, torch.float32)
        sums = a.new_empty(groups, splits, D, D, dtype=acc)
    with torch.cuda.device_of(a):
        patch_outer_kernel[(groups * splits * blocks_d**2,)](
            *(a, b, sums, images, splits, C, H, W, *tiles),
            P=p,
            P2=p2,
            PRECISION=precision,
            ROWS=rows,
            BLOCK_H=block_h,
            BLOCK_W=block_w,
            # 8 or 16 sums per thread; few warps per program leave room for many programs
            num_warps={16: 1, 32: 2}.get(rows * p2, 8),
            num_stages=2,
        )
    return add_partial_sums(sums, out) if splits > 1 else out
