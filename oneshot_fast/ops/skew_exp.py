"""skew_exp: the orthogonal matrix exp(a - a^T)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.ops._checks import check_like, check_square
from oneshot_fast.ops._register import OpSpec, define, save, without_autocast


def skew_exp(a: Tensor) -> Tensor:
    """Matrix exponential of the skew part of ``a``: exp(a - a^T), orthogonal with determinant 1.

    Scaling and squaring of a Taylor series that uses S^2 = (a - a^T)^2 being symmetric; the
    backward pass averages exp(u S) W exp(-u S) over u in [0, 1] with the same products (Najfeld
    and Havel, "Derivatives of the matrix exponential and their computation", 1995).

    Args:
        a: Generators, [..., D, D]; only a - a^T matters.

    Returns:
        Orthogonal matrices, [..., D, D], in the dtype of ``a``.

    Raises:
        RuntimeError: ``a`` is not a batch of square matrices.
    """
    return _call(a)


def reference(a: Tensor) -> Tensor:
    """Plain-torch definition of ``skew_exp``."""
    half = a.dtype in (torch.float16, torch.bfloat16)  # torch has no matrix_exp for them
    s = (a.float() - a.mT.float() if half else a - a.mT).contiguous()
    exp = torch.linalg.matrix_exp if a.device.type in _WITH_MATRIX_EXP else exp_by_products
    return exp(s).to(a.dtype)


_WITH_MATRIX_EXP = ("cpu", "cuda", "meta")


def exp_by_products(s: Tensor) -> Tensor:
    """exp(s) of matrices [..., D, D] in plain products, for devices without ``matrix_exp``.

    The Taylor series to the 18th power, for s / 2^k of a 1-norm below 1, squared k times.
    """
    if s.numel() == 0:
        return s.clone()
    norm = s.detach().abs().sum(-2).amax(-1)
    squarings = norm.clamp_min(1).log2().ceil().nan_to_num(0, 0)[..., None, None]
    with without_autocast(s):
        s = s * torch.exp2(-squarings)
        one = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
        q = one.expand_as(s)
        for k in range(18, 0, -1):
            q = one + s @ q / k
        for k in range(int(squarings.max())):
            q = torch.where(squarings > k, q @ q, q)
    return q


def _fake(a: Tensor) -> Tensor:
    check_square("skew_exp", a)
    return a.new_empty(a.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    save(ctx, inputs[0], output)
    ctx.options = ()


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    a, q = ctx.saved_tensors
    return _call_adjoint(grad, a, q)


def _adjoint_reference(grad: Tensor, a: Tensor) -> Tensor:
    """Gradient of <grad, exp(a - a^T)> in ``a``, differentiable any number of times.

    The upper right block of exp([[-S, grad], [0, -S]]) is the adjoint derivative of exp at S.
    """
    D = a.shape[-1]
    s = a - a.mT
    top = torch.cat([-s, grad], -1)
    bottom = torch.cat([torch.zeros_like(s), -s], -1)
    block = torch.linalg.matrix_exp(torch.cat([top, bottom], -2))[..., :D, D:]
    return block - block.mT


def _adjoint_fake(grad: Tensor, a: Tensor, q: Tensor) -> Tensor:
    check_square("d_skew_exp", a)
    check_like("d_skew_exp", "grad", grad, a.shape, a)
    check_like("d_skew_exp", "q", q, a.shape, a)
    return a.new_empty(a.shape)


def _adjoint_backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, None]:
    """Second derivative; q is a function of a, so a takes its gradient."""
    pull: Callable[..., Any] = torch.func.vjp(_adjoint_reference, *ctx.saved_tensors[:2])[1]
    return *pull(v), None


_call_adjoint = define("d_skew_exp", _adjoint_fake, _adjoint_backward, saved=3)
_call = define(
    "skew_exp", _fake, _backward, reference, setup_context=_setup_context, autocast="float32"
)


def _inputs(shape: tuple[int, ...], norm: float) -> tuple[Any, ...]:
    a = torch.randn(*shape, dtype=torch.float64)
    return (a * (norm / (a - a.mT).abs().sum(-1).max()) if a.numel() else a,)


SPEC = OpSpec(
    name="skew_exp",
    fn=skew_exp,
    reference=reference,
    inputs=_inputs,
    small=[
        ((3, 16, 16), 0.05),
        ((3, 16, 16), 1.0),
        ((2, 2, 16, 16), 21.0),
        ((2, 5, 5), 3.0),
        ((37, 37), 9.0),
        ((1, 2, 2), 100.0),
        ((0, 8, 8), 1.0),
    ],
    large=[((B, D, D), norm) for D in (16, 64, 256) for B in (1, 64) for norm in (1.0, 10.0)],
    trained=1,
)
