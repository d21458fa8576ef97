"""Triton kernels of skew_exp for D > 64: batched tiled products, a fixed number of launches.

Each matrix takes part in as many of the squarings as it needs, a number that only the device knows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oneshot_fast.kernels.matrix_tiles import (
    commutator_kernel,
    load_window,
    product_kernel,
    skew_kernel,
    tile_of_program,
    window,
)
from oneshot_fast.kernels.skew_series import (
    MAX_SQUARINGS,
    UNPOLISHED,
    half_power,
    identity,
    norm_bound,
    squarings_for,
    top_terms,
)
from oneshot_fast.kernels.skew_table import THETA32, THETA64

# Launched, not necessarily done. ||S|| above theta 2^16, a rotation by 16,000 turns, gives NaN.
_SQUARINGS = 16
# Terms of phi that reach the roundoff while ||ad|| <= 2 ||S|| <= theta.
_TERMS = {torch.float32: 12, torch.float64: 13}


@triton.jit
def column_sums_kernel(
    # norms[b, m, c] = largest column sum of |M| in block c of columns of M = S, S^2, S^3
    s_ptr,  # [B, D, D]
    s2_ptr,  # [B, D, D]
    s3_ptr,  # [B, D, D]
    norms_ptr,  # [B, 3, blocks], float32
    D,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK)
    c = tl.program_id(0) % blocks
    m = tl.program_id(0) // blocks % 3
    base = (tl.program_id(0) // (blocks * 3)).to(tl.int64) * D * D
    ptr = s_ptr
    if m == 1:
        ptr = s2_ptr
    if m == 2:
        ptr = s3_ptr
    sums = tl.zeros((BLOCK,), dtype=s_ptr.dtype.element_ty)
    for row in range(0, D, BLOCK):
        sums += tl.sum(tl.abs(load_window(ptr + base, row, c * BLOCK, D, BLOCK, BLOCK)), axis=0)
    tl.store(norms_ptr + tl.program_id(0), tl.max(sums).to(tl.float32))


@triton.jit
def scale_kernel(
    # S, S^2, S^3 of S / 2^squarings in place, and the top terms of its series
    s_ptr,  # [B, D, D]
    s2_ptr,  # [B, D, D]
    s3_ptr,  # [B, D, D]
    top_ptr,  # [B, D, D]
    norms_ptr,  # [B, 3, blocks], float32
    squarings_ptr,  # [B], int32
    D,
    THETA: tl.constexpr,
    SQUARINGS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks rounded up to a power of two
):
    ACC: tl.constexpr = s_ptr.dtype.element_ty
    matrix, i, j = tile_of_program(D, BLOCK)
    blocks = tl.cdiv(D, BLOCK)
    c = tl.arange(0, BLOCKS)
    norms_ptr += matrix * 3 * blocks
    norm1 = tl.max(tl.load(norms_ptr + c, mask=c < blocks, other=0.0))
    norm2 = tl.max(tl.load(norms_ptr + blocks + c, mask=c < blocks, other=0.0))
    norm3 = tl.max(tl.load(norms_ptr + 2 * blocks + c, mask=c < blocks, other=0.0))
    squarings = squarings_for(norm_bound(norm1, norm2, norm3), THETA, MAX_SQUARINGS)
    unit = tl.where(squarings <= SQUARINGS, half_power(squarings), float("nan")).to(ACC)
    offsets, mask = window(i * BLOCK, j * BLOCK, D, D, BLOCK, BLOCK)
    offsets += matrix * D * D
    s = tl.load(s_ptr + offsets, mask=mask, other=0.0) * unit
    s2 = tl.load(s2_ptr + offsets, mask=mask, other=0.0) * unit * unit
    s3 = tl.load(s3_ptr + offsets, mask=mask, other=0.0) * unit * unit * unit
    block = tl.arange(0, BLOCK)
    one = identity(i * BLOCK + block, j * BLOCK + block, D, ACC)
    tl.store(s_ptr + offsets, s, mask=mask)
    tl.store(s2_ptr + offsets, s2, mask=mask)
    tl.store(s3_ptr + offsets, s3, mask=mask)
    tl.store(top_ptr + offsets, top_terms(one, s, s2, s3), mask=mask)
    tl.store(squarings_ptr + matrix, squarings, mask=(i == 0) & (j == 0))


@triton.jit
def select_kernel(
    # out = odd where squarings is odd, else even
    even_ptr,  # [B, D, D]
    odd_ptr,  # [B, D, D]
    squarings_ptr,  # [B], int32
    out_ptr,  # [B, D, D]
    D,
    BLOCK: tl.constexpr,
):
    matrix, i, j = tile_of_program(D, BLOCK)
    offsets, mask = window(i * BLOCK, j * BLOCK, D, D, BLOCK, BLOCK)
    offsets += matrix * D * D
    ptr = even_ptr
    if tl.load(squarings_ptr + matrix) % 2 == 1:
        ptr = odd_ptr
    tl.store(out_ptr + offsets, tl.load(ptr + offsets, mask=mask, other=0.0), mask=mask)


class _Launcher:
    """Launches over the tiles of a batch of matrices like ``a``, and its scratch."""

    def __init__(self, a: Tensor, precision: str) -> None:
        self.D = a.shape[-1]
        self.batch = a.numel() // self.D**2
        self.acc = torch.promote_types(a.dtype, torch.float32)
        self.block = 32 if self.acc == torch.float64 else 64
        self.blocks = triton.cdiv(self.D, self.block)
        self.grid = (self.batch * self.blocks**2,)
        self.theta = (THETA64 if self.acc == torch.float64 else THETA32).value
        self.dot = {
            "PRECISION": precision,
            "BLOCK": self.block,
            "BLOCK_K": 16,
            "num_warps": 16 if self.acc == torch.float64 else 8,
            "num_stages": 2,
        }
        self.like = a

    def scratch(self) -> Tensor:
        return torch.empty_like(self.like, dtype=self.acc)

    def skew(self, m: Tensor, out: Tensor) -> Tensor:
        """Out = m - m^T."""
        skew_kernel[self.grid](m, out, self.D, BLOCK=self.block, num_warps=8)
        return out

    def product(self, a: Tensor, b: Tensor, out: Tensor, **options: Any) -> Tensor:
        """Out = a b; the options are those of ``product_kernel``."""
        product_kernel[self.grid](a, b, out, self.D, **options, **self.dot)
        return out

    def scaled_exp(self, a: Tensor, theta: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        """S = (a - a^T) / 2^squarings below theta, squarings [B], exp(S) and two spare buffers."""
        s = self.skew(a, self.scratch())
        s2 = self.product(s, s, self.scratch())
        s3 = self.product(s2, s, self.scratch())
        norms = s.new_empty(self.batch, 3, self.blocks, dtype=torch.float32)
        column_sums_kernel[(norms.numel(),)](
            s, s2, s3, norms, self.D, BLOCK=self.block, num_warps=8
        )
        squarings = s.new_empty(self.batch, dtype=torch.int32)
        even, odd = self.scratch(), self.scratch()
        scale_kernel[self.grid](
            s,
            s2,
            s3,
            even,
            norms,
            squarings,
            self.D,
            THETA=theta,
            SQUARINGS=_SQUARINGS,
            BLOCK=self.block,
            BLOCKS=triton.next_power_of_2(self.blocks),
            num_warps=8,
        )
        series = {"EPILOGUE": "series", "c_ptr": s, "s2_ptr": s2}
        self.product(s3, even, odd, FIRST=6, **series)
        self.product(s3, odd, even, FIRST=3, **series)
        self.product(s3, even, odd, FIRST=0, **series)
        return s, squarings, [odd, even, s2, s3]


def skew_exp_tiled(a: Tensor, precision: str) -> Tensor:
    """``skew_exp`` for any D; ``a`` is contiguous, [..., D, D]."""
    q = torch.empty_like(a)
    if a.numel() == 0:
        return q
    with torch.cuda.device_of(a):
        launch = _Launcher(a, precision)
        r, squarings, (first, second, t, _) = launch.scaled_exp(a, launch.theta)
        buffers = (first, second)
        for level in range(_SQUARINGS):
            source, target = buffers[level % 2], buffers[(level + 1) % 2]
            launch.product(source, source, target, squarings_ptr=squarings, level=level)
        select_kernel[launch.grid](
            *buffers, squarings, r, launch.D, BLOCK=launch.block, num_warps=8
        )
        polished = {"squarings_ptr": squarings, "level": UNPOLISHED.value}
        launch.product(r, r, t, TRANSPOSED_A=True, **polished)
        launch.product(r, t, q, EPILOGUE="polish", c_ptr=r, **polished)
    return q


def d_skew_exp_tiled(grad: Tensor, a: Tensor, q: Tensor, precision: str) -> Tensor:
    """``d_skew_exp`` for any D; all are contiguous, [..., D, D]."""
    if a.numel() == 0:
        return torch.empty_like(a)
    with torch.cuda.device_of(a):
        launch = _Launcher(a, precision)
        s, squarings, (r, spare, t, w) = launch.scaled_exp(a, launch.theta / 2)
        launch.product(q, grad, t, TRANSPOSED_A=True)
        e = launch.skew(t, launch.scratch())
        terms = _TERMS[launch.acc]
        source, buffers = e, (w, launch.scratch())
        for k in range(terms, 0, -1):
            target = buffers[k % 2]
            commutator_kernel[launch.grid](s, source, e, target, k + 1, launch.D, **launch.dot)
            source = target
        w = source
        for level in range(_SQUARINGS):
            here = {"squarings_ptr": squarings, "level": level}
            if level > 0:
                r, spare = launch.product(r, r, spare, **here), r
            launch.product(w, r, t, TRANSPOSED_B=True, **here)
            launch.product(r, t, w, EPILOGUE="mean", c_ptr=w, **here)
    return w.to(a.dtype)
