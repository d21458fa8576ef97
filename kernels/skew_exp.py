"""Triton kernels of skew_exp for D <= 64, where one program holds one matrix.

Larger matrices go to skew_exp_tiled; checks and autograd are in oneshot_fast.ops.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from oneshot_fast.kernels.patch_tiles import INTERPRETED, dot
from oneshot_fast.kernels.skew_exp_tiled import d_skew_exp_tiled, skew_exp_tiled
from oneshot_fast.kernels.skew_series import (
    MAX_SQUARINGS,
    UNPOLISHED,
    half_power,
    identity,
    largest_column,
    norm_bound,
    quadratic,
    squarings_for,
    top_terms,
)
from oneshot_fast.kernels.skew_table import THETA32, THETA64

# PTX, which neither the interpreter nor an AMD GPU understands
ASSEMBLY = tl.constexpr(not INTERPRETED.value and torch.version.hip is None)


def _on_chip(a: Tensor) -> bool:
    """Whether registers hold four matrices."""
    return a.shape[-1] <= (32 if a.dtype == torch.float64 else 64)


@triton.jit
def _fresh(m):
    """M, through a move that the compiler does not look into."""
    if not ASSEMBLY:
        return m
    if m.dtype == tl.float64:
        return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=d,d", [m], m.dtype, False, 1)
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [m], m.dtype, False, 1)


@triton.jit
def _multiply(a, b, acc, D, PRECISION: tl.constexpr):
    """Acc + a b, in a loop of one step whose number the compiler does not know.

    Otherwise it reads the operands of neighbouring products early, or keeps those used twice, D
    entries per row and thread, and spills.
    """
    for _ in range(tl.cdiv(D, a.shape[0])):
        acc = dot(_fresh(a), _fresh(b), acc, PRECISION)
    return acc


@triton.jit
def _product(a, b, D, PRECISION: tl.constexpr):
    return _multiply(a, b, tl.zeros(a.shape, dtype=a.dtype), D, PRECISION)


@triton.jit
def _read(ptr, D, ACC: tl.constexpr, D2: tl.constexpr):
    """Matrix of this program, padded with zeros, [D2, D2]."""
    i = tl.arange(0, D2)
    mask = (i < D)[:, None] & (i < D)[None, :]
    offsets = tl.program_id(0).to(tl.int64) * D * D + i[:, None] * D + i[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def _write(ptr, m, D, D2: tl.constexpr):
    i = tl.arange(0, D2)
    mask = (i < D)[:, None] & (i < D)[None, :]
    offsets = tl.program_id(0).to(tl.int64) * D * D + i[:, None] * D + i[None, :]
    tl.store(ptr + offsets, m.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scaled_exp(a, D, THETA: tl.constexpr, PRECISION: tl.constexpr, D2: tl.constexpr):
    """S = (a - a^T) / 2^s, exp(S), s, and a bound of ||S||_2."""
    S = a - tl.trans(a)
    S2 = _product(S, S, D, PRECISION)
    S3 = _product(S2, S, D, PRECISION)
    bound = norm_bound(largest_column(S), largest_column(S2), largest_column(S3))
    s = squarings_for(bound, THETA, MAX_SQUARINGS)
    unit = half_power(s).to(a.dtype)
    S = S * unit
    S2 = S2 * unit * unit
    S3 = S3 * unit * unit * unit
    i = tl.arange(0, D2)
    one = identity(i, i, D, a.dtype)
    R = top_terms(one, S, S2, S3)
    R = _multiply(S3, R, quadratic(one, S, S2, 6), D, PRECISION)
    R = _multiply(S3, R, quadratic(one, S, S2, 3), D, PRECISION)
    R = _multiply(S3, R, quadratic(one, S, S2, 0), D, PRECISION)
    return S, R, s, bound * half_power(s)


@triton.jit
def skew_exp_kernel(
    # q = exp(S), S = a - a^T: Taylor series of S / 2^s, squared s times, s chosen per matrix; after
    # many squarings a step of Newton-Schulz, q - q (q^T q - I) / 2, makes it orthogonal again.
    # da = phi(W - W^T), W = q^T dq, phi(Y) the mean of exp(u S) Y exp(-u S) over u in [0, 1].
    a_ptr,  # [B, D, D]
    q_ptr,  # [B, D, D]
    D,
    THETA: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    D2: tl.constexpr,  # D rounded up to a power of two
):
    a = _read(a_ptr, D, ACC, D2)
    _, R, s, _ = _scaled_exp(a, D, THETA, PRECISION, D2)
    for _ in range(s):
        R = _product(R, R, D, PRECISION)
    if s > UNPOLISHED:
        i = tl.arange(0, D2)
        defect = _multiply(tl.trans(R), R, -identity(i, i, D, ACC), D, PRECISION)
        R -= 0.5 * _product(R, defect, D, PRECISION)
    _write(q_ptr, R, D, D2)


@triton.jit
def d_skew_exp_kernel(
    # da = phi(E), E = W - W^T, W = q^T dq. With ad(Y) = S Y - Y S, phi = sum of ad^k / (k + 1)! at
    # the scaled S, and phi at 2 S is (phi + exp(S) phi exp(-S)) / 2: all of it stays skew.
    grad_ptr,  # [B, D, D]
    a_ptr,  # [B, D, D]
    q_ptr,  # [B, D, D]
    da_ptr,  # [B, D, D]
    D,
    THETA: tl.constexpr,
    ROUNDOFF: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    D2: tl.constexpr,
):
    W = _product(tl.trans(_read(q_ptr, D, ACC, D2)), _read(grad_ptr, D, ACC, D2), D, PRECISION)
    E = W - tl.trans(W)
    S, R, s, bound = _scaled_exp(_read(a_ptr, D, ACC, D2), D, THETA, PRECISION, D2)
    # ||ad|| <= 2 ||S||: terms until they fall below the roundoff
    terms = 0
    size = tl.where(bound < 1e38, 1.0, 0.0)
    while size > ROUNDOFF:
        terms += 1
        size = size * 2 * bound / (terms + 1)
    W = E
    for k in range(terms):
        # S W - W S, as S W minus its transpose: both are skew
        T = _product(S, W, D, PRECISION)
        W = E + (T - tl.trans(T)) / (terms - k + 1)
    for k in range(s):
        if k > 0:
            R = _product(R, R, D, PRECISION)
        T = _product(R, W, D, PRECISION)
        W = 0.5 * (W + _product(T, tl.trans(R), D, PRECISION))
    _write(da_ptr, W, D, D2)


def _constants(a: Tensor, precision: str) -> dict[str, object]:
    """Compile-time arguments for the dtype and D of ``a``."""
    D2 = max(16, triton.next_power_of_2(a.shape[-1]))  # tl.dot needs 16
    double = a.dtype == torch.float64
    return {
        "THETA": (THETA64 if double else THETA32).value,
        "PRECISION": precision,
        "ACC": tl.float64 if double else tl.float32,
        "D2": D2,
        # the fewest that do not spill
        "num_warps": {16: 2 if double else 1, 32: 4 if double else 8, 64: 16}[D2],
    }


def skew_exp(a: Tensor, precision: str = "ieee") -> Tensor:
    """exp(a - a^T), one program per matrix up to D = 64.

    Args:
        a: Generators, [..., D, D].
        precision: Of float32 products on the GPU: "ieee", or the tensor cores' "tf32x3", "tf32".

    Returns:
        Orthogonal matrices, [..., D, D].
    """
    a = a.contiguous()
    if not _on_chip(a):
        return skew_exp_tiled(a, precision)
    q = torch.empty_like(a)
    D = a.shape[-1]
    if a.numel() > 0:
        with torch.cuda.device_of(a):
            skew_exp_kernel[(a.numel() // (D * D),)](a, q, D, **_constants(a, precision))
    return q


def d_skew_exp(grad: Tensor, a: Tensor, q: Tensor, precision: str = "ieee") -> Tensor:
    """Gradient of <grad, exp(a - a^T)> in ``a``.

    Args:
        grad: Gradient of the matrices, [..., D, D].
        a: Generators, [..., D, D].
        q: exp(a - a^T), [..., D, D].
        precision: As in ``skew_exp``.

    Returns:
        Gradient, [..., D, D].
    """
    grad, a, q = grad.contiguous(), a.contiguous(), q.contiguous()
    if not _on_chip(a):
        return d_skew_exp_tiled(grad, a, q, precision)
    da = torch.empty_like(a)
    D = a.shape[-1]
    if a.numel() > 0:
        roundoff = torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps / 2
        with torch.cuda.device_of(a):
            d_skew_exp_kernel[(a.numel() // (D * D),)](
                grad, a, q, da, D, ROUNDOFF=roundoff, **_constants(a, precision)
            )
    return da
