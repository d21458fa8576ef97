"""Triton kernel of patch_rotate; checks and autograd are in oneshot_fast.ops."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oneshot_fast.kernels.patch_outer import patch_outer
from oneshot_fast.kernels.patch_tiles import (
    INTERPRETED,
    dot,
    elements,
    grid_of,
    segment_offsets,
    tile_origin,
    to_patches,
    to_segments,
)

# Tiles of D (M) and of patches (N): they split the results, never a sum.
CONFIGS = [
    # many small programs: a few images or small tiles
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    # more patches per read of q: large batches
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=8, num_stages=2),
    # small D: q is next to nothing, long segments are all
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 256}, num_warps=4, num_stages=2),
    # large D: fewer reads of the latent, products dominate
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    # few registers: float64, and p above 8 or no power of two, which need many for addresses
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=8, num_stages=2),
]


def _useful(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Configurations that fit D and the patches of a tile, and do not spill."""
    x, D = arguments["x_ptr"], constants["ROWS"] * constants["P2"]
    if x.dtype == torch.float64 or constants["P"] != constants["P2"] or constants["P"] > 8:
        return configs[-1:]
    patches = triton.next_power_of_2(arguments["tile_h"]) * constants["COLUMNS"]
    largest = {32: 32, 64: 1 << 30, 128: 1 << 30}  # D for which BLOCK_M is not too small
    smallest = {32: 1, 64: 1, 128: 128}  # D for which it is not too large
    return configs[:1] + [
        config
        for config in configs[1:-1]
        if config.kwargs["BLOCK_N"] <= patches
        and smallest[config.kwargs["BLOCK_M"]] <= D <= largest[config.kwargs["BLOCK_M"]]
    ]


@triton.autotune(
    configs=CONFIGS[:1] if INTERPRETED.value else CONFIGS,
    key=["batch", "C", "H", "W", "tile_h", "tile_w", "P", "TRANSPOSED", "PRECISION"],
    prune_configs_by={"early_config_prune": _useful},
)
@triton.jit(do_not_specialize=["batch"])
def patch_rotate_kernel(
    # z_n = q x_n for every patch vector x_n, ordered (channel, row, column).
    # dx_n = q^T dz_n, the same kernel; dq = sum over n of dz_n x_n^T, patch_outer.
    x_ptr,  # [B, C, H, W]
    q_ptr,  # [D, D], [B, D, D] or [B, Gh, Gw, D, D]; memory of q^T where TRANSPOSED
    z_ptr,  # [B, C, H, W]
    batch,  # images, rounded up to a power of two: who tunes looks at it, nobody else
    C,
    H,
    W,
    tile_h,
    tile_w,
    tiles_h,
    tiles_w,
    SHARED: tl.constexpr,  # one q for all
    TRANSPOSED: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,  # P rounded up to a power of two
    ROWS: tl.constexpr,  # C P rounded up to a power of two
    COLUMNS: tl.constexpr,  # tile_w rounded up to a power of two
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_H x BLOCK_W patches of one tile, rows_m rows of their p elements each.
    rows_m: tl.constexpr = min(ROWS, max(1, BLOCK_M // P2))
    rows_k: tl.constexpr = max(1, BLOCK_K // P2)
    BLOCK_W: tl.constexpr = min(COLUMNS, BLOCK_N)
    BLOCK_H: tl.constexpr = BLOCK_N // BLOCK_W
    D = C * P * P
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(C * P, rows_m)
    r0 = pid % blocks_m * rows_m
    pid = pid // blocks_m
    blocks_w = tl.cdiv(tile_w, BLOCK_W)
    w0 = pid % blocks_w * BLOCK_W
    pid = pid // blocks_w
    blocks_h = tl.cdiv(tile_h, BLOCK_H)
    h0 = pid % blocks_h * BLOCK_H
    matrix = pid // blocks_h
    image = matrix // (tiles_h * tiles_w)
    tile = matrix % (tiles_h * tiles_w)
    origin = tile_origin(image, tile, C, H, W, tile_h, tile_w, tiles_w, P)

    if not SHARED:
        q_ptr += matrix.to(tl.int64) * D * D
    m, inside_m = elements(r0, C, P, P2, rows_m)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((rows_m * P2, BLOCK_N), dtype=ACC)
    # a constant end makes one step no loop
    end = ROWS if rows_k >= ROWS else C * P
    for k0 in range(0, end, rows_k):
        k, inside_k = elements(k0, C, P, P2, rows_k)
        row, column = (k[None, :], m[:, None]) if TRANSPOSED else (m[:, None], k[None, :])
        inside = inside_m[:, None] & inside_k[None, :]
        q = tl.load(q_ptr + row * D + column, mask=inside, other=0.0)
        offsets, mask = segment_offsets(
            k0, h0, w0, C, H, W, tile_h, tile_w, P, P2, rows_k, BLOCK_H, BLOCK_W
        )
        x = tl.load(x_ptr + origin + offsets, mask=mask, other=0.0)
        acc = dot(q, to_patches(x, rows_k, P2, BLOCK_H, BLOCK_W), acc, PRECISION)
    offsets, mask = segment_offsets(
        r0, h0, w0, C, H, W, tile_h, tile_w, P, P2, rows_m, BLOCK_H, BLOCK_W
    )
    z = to_segments(acc.to(z_ptr.dtype.element_ty), rows_m, P2, BLOCK_H, BLOCK_W)
    tl.store(z_ptr + origin + offsets, z, mask=mask)


def patch_rotate(
    x: Tensor, q: Tensor, p: int, transpose: bool = False, precision: str = "ieee"
) -> Tensor:
    """Rotate every patch of ``x``; a first call per size tunes, so make it outside of a capture.

    Args:
        x: Latents, [B, C, H, W].
        q: Matrices, [D, D], [B, D, D] or [B, Gh, Gw, D, D], D = C p p, in the dtype of ``x``.
        p: Patch side, in latent pixels.
        transpose: Multiply by q^T instead.
        precision: Of float32 products on the GPU: "ieee", or the tensor cores' "tf32x3", "tf32".

    Returns:
        Rotated latents, [B, C, H, W].
    """
    x, leading = x.contiguous(), q.shape[:-2]
    if q.dim() > 2 and not any(q.stride()[:-2]):  # one for all, expanded
        q = q[(0,) * (q.dim() - 2)]
    if q.mT.is_contiguous():
        q, transpose = q.mT, not transpose
    q = q.contiguous()
    z = torch.empty_like(x)
    if z.numel() == 0:
        return z
    C = x.shape[1]
    tiles = grid_of(x, p, leading)
    tile_h, tile_w = tiles[:2]
    p2, rows = triton.next_power_of_2(p), triton.next_power_of_2(C * p)
    columns = triton.next_power_of_2(tile_w)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        block_w = min(columns, meta["BLOCK_N"])
        blocks = triton.cdiv(tile_w, block_w) * triton.cdiv(tile_h, meta["BLOCK_N"] // block_w)
        rows_m = min(rows, max(1, meta["BLOCK_M"] // p2))
        return (x.shape[0] * tiles[2] * tiles[3] * blocks * triton.cdiv(C * p, rows_m),)

    with torch.cuda.device_of(x):
        patch_rotate_kernel[grid](
            *(x, q, z, triton.next_power_of_2(x.shape[0]), *x.shape[1:], *tiles),
            SHARED=q.dim() == 2,
            TRANSPOSED=transpose,
            P=p,
            P2=p2,
            ROWS=rows,
            COLUMNS=columns,
            PRECISION=precision,
            # tl.dot needs 16; without tensor cores its operands are in registers and 32 spill
            BLOCK_K=max(16, p2, min(32 if x.element_size() == 2 else 16, rows * p2)),
        )
    return z


def d_patch_rotate(grad: Tensor, x: Tensor, q: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Gradients of <grad, patch_rotate(x, q, p)> in ``x`` and ``q``."""
    return patch_rotate(grad, q, p, transpose=True), patch_outer(grad, x, p, q.shape[:-2])
