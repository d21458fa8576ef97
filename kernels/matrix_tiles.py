"""Batched D x D matrices in square tiles: differences, products and commutators for skew_exp."""

import triton
import triton.language as tl

from oneshot_fast.kernels.patch_tiles import dot
from oneshot_fast.kernels.skew_series import identity, quadratic


@triton.jit
def tile_of_program(D, BLOCK: tl.constexpr):
    """Matrix, block row and block column of this program."""
    blocks = tl.cdiv(D, BLOCK)
    pid = tl.program_id(0)
    return (pid // (blocks * blocks)).to(tl.int64), pid // blocks % blocks, pid % blocks


@triton.jit
def window(row, column, D, end, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of the entries from (row, column) on, [ROWS, COLUMNS]; mask of those below end."""
    i = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    return i[:, None] * D + j[None, :], (i < end)[:, None] & (j < end)[None, :]


@triton.jit
def load_window(ptr, row, column, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offsets, mask = window(row, column, D, D, ROWS, COLUMNS)
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def skew_kernel(
    # out = m - m^T
    m_ptr,  # [B, D, D]
    out_ptr,  # [B, D, D], accumulation dtype
    D,
    BLOCK: tl.constexpr,
):
    b, i, j = tile_of_program(D, BLOCK)
    m = load_window(m_ptr + b * D * D, i * BLOCK, j * BLOCK, D, BLOCK, BLOCK)
    t = load_window(m_ptr + b * D * D, j * BLOCK, i * BLOCK, D, BLOCK, BLOCK)
    offsets, mask = window(i * BLOCK, j * BLOCK, D, D, BLOCK, BLOCK)
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + b * D * D + offsets, m.to(ACC) - tl.trans(t.to(ACC)), mask=mask)


@triton.jit(do_not_specialize=["level"])
def product_kernel(
    # out = A B, then by EPILOGUE: nothing; plus the terms I, S, S^2 of the series from degree FIRST
    # on; the mean with C; or, with B = A^T A and C = A, the step of Newton-Schulz (3 A - A B) / 2.
    # dA = dout B^T, dB = A^T dout; the callers have gradients of their own.
    a_ptr,  # [B, D, D], memory of A^T where TRANSPOSED_A
    b_ptr,  # [B, D, D], memory of B^T where TRANSPOSED_B
    out_ptr,  # [B, D, D]
    D,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    c_ptr=None,  # [B, D, D], S for "series"
    s2_ptr=None,  # [B, D, D] for "series"
    squarings_ptr=None,  # [B]: no product for the matrices with squarings <= level
    level=0,
    EPILOGUE: tl.constexpr = "",  # or "series", "mean", "polish"
    FIRST: tl.constexpr = 0,
    TRANSPOSED_A: tl.constexpr = False,
    TRANSPOSED_B: tl.constexpr = False,
):
    ACC: tl.constexpr = tl.float64 if b_ptr.dtype.element_ty == tl.float64 else tl.float32
    matrix, i, j = tile_of_program(D, BLOCK)
    base = matrix * D * D
    end = D
    if squarings_ptr is not None:
        end = tl.where(level < tl.load(squarings_ptr + matrix), D, 0)
    acc = tl.zeros((BLOCK, BLOCK), dtype=ACC)
    for k in range(0, end, BLOCK_K):
        if TRANSPOSED_A:
            a = tl.trans(load_window(a_ptr + base, k, i * BLOCK, D, BLOCK_K, BLOCK))
        else:
            a = load_window(a_ptr + base, i * BLOCK, k, D, BLOCK, BLOCK_K)
        if TRANSPOSED_B:
            b = tl.trans(load_window(b_ptr + base, j * BLOCK, k, D, BLOCK, BLOCK_K))
        else:
            b = load_window(b_ptr + base, k, j * BLOCK, D, BLOCK_K, BLOCK)
        acc = dot(a.to(ACC), b.to(ACC), acc, PRECISION)
    written = D if EPILOGUE == "polish" else end
    offsets, mask = window(i * BLOCK, j * BLOCK, D, written, BLOCK, BLOCK)
    offsets += base
    if EPILOGUE != "":
        c = tl.load(c_ptr + offsets, mask=mask, other=0.0)
    if EPILOGUE == "series":
        s2 = tl.load(s2_ptr + offsets, mask=mask, other=0.0)
        block = tl.arange(0, BLOCK)
        acc += quadratic(identity(i * BLOCK + block, j * BLOCK + block, D, ACC), c, s2, FIRST)
    elif EPILOGUE == "mean":
        acc = 0.5 * (acc + c)
    elif EPILOGUE == "polish":
        acc = tl.where(end > 0, c + 0.5 * (c - acc), c)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["divisor"])
def commutator_kernel(
    # out = E + (S W - W S) / divisor; S and W are skew, so S W - W S = S W - (S W)^T.
    # A program makes the block (i, j) and its mirror image, i >= j.
    s_ptr,  # [B, D, D]
    w_ptr,  # [B, D, D]
    e_ptr,  # [B, D, D]
    out_ptr,  # [B, D, D]
    divisor,
    D,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = s_ptr.dtype.element_ty
    matrix, i, j = tile_of_program(D, BLOCK)
    base = matrix * D * D
    end = tl.where(i >= j, D, 0)
    lower = tl.zeros((BLOCK, BLOCK), dtype=ACC)
    upper = tl.zeros((BLOCK, BLOCK), dtype=ACC)
    for k in range(0, end, BLOCK_K):
        s = load_window(s_ptr + base, i * BLOCK, k, D, BLOCK, BLOCK_K)
        w = load_window(w_ptr + base, k, j * BLOCK, D, BLOCK_K, BLOCK)
        lower = dot(s, w, lower, PRECISION)
        s = load_window(s_ptr + base, j * BLOCK, k, D, BLOCK, BLOCK_K)
        w = load_window(w_ptr + base, k, i * BLOCK, D, BLOCK_K, BLOCK)
        upper = dot(s, w, upper, PRECISION)
    step = (lower - tl.trans(upper)) / divisor
    offsets, mask = window(i * BLOCK, j * BLOCK, D, end, BLOCK, BLOCK)
    e = tl.load(e_ptr + base + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + base + offsets, e + step, mask=mask)
    end = tl.where(i > j, D, 0)
    offsets, mask = window(j * BLOCK, i * BLOCK, D, end, BLOCK, BLOCK)
    e = tl.load(e_ptr + base + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + base + offsets, e - tl.trans(step), mask=mask)
