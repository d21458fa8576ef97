"""skew_exp: the orthogonal matrix exp(a - a^T)."""

from typing import Any

import torch
from torch import Tensor

from oneshot_fast.ops._checks import check_like, check_square
from oneshot_fast.ops._register import OpSpec, define


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
    s = a.float() - a.mT.float() if half else a - a.mT
    return torch.linalg.matrix_exp(s.contiguous()).to(a.dtype)


def _fake(a: Tensor) -> Tensor:
    check_square("skew_exp", a)
    return a.new_empty(a.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


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


def _adjoint_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """Second derivative; q is a function of a, so a takes its gradient."""
    with torch.enable_grad():
        inputs = [t.view_as(t) for t in ctx.saved_tensors[:2]]
        inputs = [t if t.requires_grad else t.requires_grad_() for t in inputs]
        output = _adjoint_reference(*inputs)
    d_grad, d_a = torch.autograd.grad(output, inputs, grad, create_graph=torch.is_grad_enabled())
    return d_grad, d_a, None


_call_adjoint = define("d_skew_exp", _adjoint_fake, _adjoint_backward, saved=3)
_call = define("skew_exp", _fake, _backward, reference, setup_context=_setup_context)


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
