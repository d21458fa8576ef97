"""cayley: the orthogonal matrix (I - S)^-1 (I + S) of a skew S."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.ops._checks import check_like, check_square
from oneshot_fast.ops._register import define, save
from oneshot_fast.ops.skew_exp import SPEC as _SKEW_EXP


def cayley(a: Tensor) -> Tensor:
    """Cayley transform of the skew part of ``a``: (I - S)^-1 (I + S) with S = (a - a^T) / 2.

    It reaches every rotation that turns no plane by pi. Source: Cayley 1846; for orthogonal
    fine-tuning Liu et al., "Orthogonal over-parameterized training", 2021 (arXiv 2004.04690), and
    Qiu et al., "Controlling text-to-image diffusion by orthogonal finetuning", 2023 (arXiv
    2306.07280).

    With M = (I - S)^-1 it is 2 M - I: one exact inverse (on a CPU a Gauss-Jordan elimination of
    its own), from which the gradient in S, 2 M^T grad M^T, takes two products and no further solve.
    Saving M instead of the result keeps that gradient exact for large S, where the result is close
    to -I. The eigenvalues of I - S are 1 - i t with real t, so it is never singular and no check of
    it has to wait for the device.

    Args:
        a: Generators, [..., D, D]; only a - a^T matters. Float16 and bfloat16 are computed in
            float32.

    Returns:
        Orthogonal matrices, [..., D, D], in the dtype of ``a``.

    Raises:
        RuntimeError: ``a`` is not a batch of square matrices of a floating-point dtype.
    """
    return _call(a)[0]


def reference(a: Tensor) -> Tensor:
    """Plain-torch definition of ``cayley``."""
    s, identity = _generator(a)
    return torch.linalg.solve(identity - s, identity + s).to(a.dtype)


def _generator(a: Tensor) -> tuple[Tensor, Tensor]:
    """S and the identity, in the dtype of the computation."""
    b = a.to(torch.promote_types(a.dtype, torch.float32))
    return (b - b.mT) / 2, torch.eye(a.shape[-1], dtype=b.dtype, device=b.device)


def _composed(a: Tensor) -> tuple[Tensor, Tensor]:
    """The op where it has no kernel: result and resolvent M."""
    check_square("cayley", a)
    s, identity = _generator(a)
    resolvent = torch.linalg.inv_ex(identity - s).inverse
    return (2 * resolvent - identity).to(a.dtype), resolvent


def _fake(a: Tensor) -> tuple[Tensor, Tensor]:
    check_square("cayley", a)
    acc = torch.promote_types(a.dtype, torch.float32)
    return a.new_empty(a.shape), a.new_empty(a.shape, dtype=acc)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    save(ctx, output[1])
    ctx.options = ()


def _backward(ctx: Any, d_out: Tensor | None, d_resolvent: Tensor | None) -> Tensor | None:
    """The result is twice the resolvent less a constant; only second derivatives use the latter."""
    (resolvent,) = ctx.saved_tensors
    if d_resolvent is None:
        return None if d_out is None else _call_gradient(d_out, resolvent)
    half = d_resolvent / 2 if d_out is None else d_out + d_resolvent / 2
    return _call_gradient(half, resolvent)


def _gradient_fake(grad: Tensor, resolvent: Tensor) -> Tensor:
    check_square("d_cayley", grad)
    acc = torch.promote_types(grad.dtype, torch.float32)
    check_like("d_cayley", "resolvent", resolvent, grad.shape, grad, acc)
    return grad.new_empty(grad.shape)


def _gradient_backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of W - W^T with W = M^T grad M^T."""
    grad, m = ctx.saved_tensors
    g, u = grad.to(m.dtype), (v - v.mT).to(m.dtype)
    return (m @ u @ m).to(grad.dtype), -(g @ m.mT @ u + u @ m.mT @ g)


_call_gradient = define("d_cayley", _gradient_fake, _gradient_backward, saved=2, cuda=False)
_call = define("cayley", _fake, _backward, _composed, setup_context=_setup_context, cuda=False)

# the same matrices as for the other way from a skew matrix to a rotation
SPEC = dataclasses.replace(
    _SKEW_EXP,
    name="cayley",
    fn=cayley,
    reference=reference,
    large=[((B, D, D), 1.0) for D in (16, 64, 256) for B in (1, 4, 64)],
    gpu_kernels=False,
)
