"""How the patch kernels read a latent: row segments in memory, patch vectors on chip.

A tile of patches is loaded as [rows, columns] whose columns run along W, so that neighbouring
threads read neighbouring addresses, and is then relabelled to [elements, patches].
"""

import triton
import triton.language as tl
from torch import Tensor

# The interpreter's tl.dot is wrong on bfloat16; products of 16-bit numbers are exact in float32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Acc + a b, accumulated in the dtype of ``acc``."""
    if INTERPRETED:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def tile_origin(image, tile, C, H, W, tile_h, tile_w, tiles_w, P: tl.constexpr):
    """Offset of the first element of tile ``tile`` of an image."""
    row = tile // tiles_w * tile_h * P
    column = tile % tiles_w * tile_w * P
    return (image.to(tl.int64) * C * H + row) * W + column


@triton.jit
def segment_offsets(
    r0,  # first row of a patch: row i of channel c is r = c p + i
    h0,  # first row of patches in the tile
    w0,  # first column of patches in the tile
    C,
    H,
    W,
    tile_h,  # rows of patches per tile
    tile_w,  # columns of patches per tile
    P: tl.constexpr,
    P2: tl.constexpr,  # P rounded up to a power of two
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Offsets from the tile's origin and mask, [R BLOCK_H, BLOCK_W P2]."""
    s = tl.arange(0, R * BLOCK_H)
    r = r0 + s // BLOCK_H
    h = h0 + s % BLOCK_H
    rows = ((r // P).to(tl.int64) * H + h * P + r % P) * W
    column = tl.arange(0, BLOCK_W * P2)
    if P == P2:
        # one term, so that the compiler sees that the addresses are contiguous
        columns = w0 * P + column
        inside = column < (tile_w - w0) * P
    else:
        columns = (w0 + column // P2) * P + column % P2
        inside = (column // P2 < tile_w - w0) & (column % P2 < P)
    mask = ((r < C * P) & (h < tile_h))[:, None] & inside[None, :]
    return rows[:, None] + columns[None, :], mask


@triton.jit
def to_patches(
    segments, R: tl.constexpr, P2: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """[R BLOCK_H, BLOCK_W P2] row segments to [R P2, BLOCK_H BLOCK_W] patch vectors."""
    split = tl.reshape(segments, (R, BLOCK_H, BLOCK_W, P2))
    return tl.reshape(tl.permute(split, (0, 3, 1, 2)), (R * P2, BLOCK_H * BLOCK_W))


@triton.jit
def to_segments(
    patches, R: tl.constexpr, P2: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Inverse of ``to_patches``."""
    split = tl.reshape(patches, (R, P2, BLOCK_H, BLOCK_W))
    return tl.reshape(tl.permute(split, (0, 2, 3, 1)), (R * BLOCK_H, BLOCK_W * P2))


@triton.jit
def elements(r0, C, P: tl.constexpr, P2: tl.constexpr, R: tl.constexpr):
    """Index d in [0, D) of each of the R P2 elements from row r0 on, and its mask, [R P2]."""
    e = tl.arange(0, R * P2)
    r = r0 + e // P2
    return r * P + e % P2, (r < C * P) & (e % P2 < P)


def grid_of(x: Tensor, p: int, leading: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Rows and columns of patches per tile, tiles per column and per row, of x [B, C, H, W]."""
    Gh, Gw = (leading[1], leading[2]) if len(leading) == 3 else (1, 1)
    return x.shape[2] // p // Gh, x.shape[3] // p // Gw, Gh, Gw
