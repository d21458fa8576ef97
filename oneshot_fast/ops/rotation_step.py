"""rotation_step: one Adam step of a batch of rotations, on the group itself, in place."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.ops._backends import backend, serve_cuda
from oneshot_fast.ops._checks import check_like, check_square
from oneshot_fast.ops._register import without_autocast
from oneshot_fast.ops.skew_exp import skew_exp


def rotation_step(
    q: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    steps: Tensor,
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    max_angle: float = math.pi / 4,
) -> None:
    """Riemannian Adam: move the rotations ``q`` and the state ``m``, ``v``, ``steps`` in place.

    With A = g - g^T, the gradient of X -> loss(exp(X) q) at X = 0 up to a factor that Adam ignores,
    and m^, v^ the moments with their biases removed::

        m <- beta1 m + (1 - beta1) A
        v <- beta2 v + (1 - beta2) A * A          (its mean over i != j if v is one per matrix)
        X = lr m^ / (sqrt(v^) + eps)
        q <- exp(-X) q, then q <- q (3 I - q^T q) / 2

    X turns by angles theta_1, theta_2, ... in orthogonal planes. Their 8-norm (sum of theta_i^8) to
    the power 1/8, at least the largest and at most (D / 2)^(1/8) times that, is kept below
    ``max_angle``: a longer X is shortened. The last line, a step of Newton and Schulz, removes what
    rounding adds to q^T q. The derivative of exp at 0 is the identity, so there is no exponential
    to differentiate. A matrix whose sum of squares of A is not finite keeps its ``q``, ``m``, ``v``
    and ``steps``. Nothing synchronises; a CUDA graph may capture it, with the options as constants.

    Sources: Becigneul and Ganea, "Riemannian adaptive optimization methods", 2019 (arXiv
    1810.00760); Lezcano-Casado, "Trivializations for gradient-based optimization on manifolds",
    2019 (arXiv 1909.09501), here with a new base point at every step; Kingma and Ba 2015 for Adam.

    Args:
        q: Orthogonal matrices, [..., D, D], float32, or float64 for a float64 ``g``.
        g: Gradient in the frame of q, [..., D, D]: dq q^T for a Euclidean gradient dq, which is
            ``patch_outer(dz, z, p, like=q)`` for z = ``patch_rotate(x, q, p)``. Float32, float64,
            float16 or bfloat16.
        m: First moments, [..., D, D], skew, in the dtype of ``q``; zeros at the start.
        v: Second moments, [..., D, D], or [...] for one per matrix, in the dtype of ``q``; zeros at
            the start.
        steps: Steps taken so far by each matrix, [...], in the dtype of ``q``; zeros at the start.
        lr: Step size in radians: the size of an element of X where m^ = sqrt(v^). A tensor [...] in
            the dtype of ``q`` gives each matrix its own, without the fused kernel.
        beta1: Decay of the first moments, in [0, 1).
        beta2: Decay of the second moments, in [0, 1).
        eps: Added to sqrt(v^); above 0, as A has zeros on its diagonal.
        max_angle: Trust radius, in radians.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not agree, an option is out of its range, or what
            is to be written is an expanded tensor.
    """
    _check_options(beta1=beta1, beta2=beta2, eps=eps, max_angle=max_angle)
    for name, t in (("q", q), ("m", m), ("v", v), ("steps", steps)):
        if any(n > 1 and stride == 0 for n, stride in zip(t.shape, t.stride(), strict=True)):
            raise RuntimeError(f"rotation_step: {name} is expanded and cannot be written; clone it")
    step = _op if _has_op(g) else _composed
    if isinstance(lr, Tensor):
        check_like("rotation_step", "lr", lr, g.shape[:-2], g, q.dtype)
        step = _composed
    if torch.compiler.is_compiling():
        step(q, g, m, v, steps, lr, beta1, beta2, eps, max_angle)
        return
    with torch._C._AutoDispatchBelowAutograd():
        step(q, g, m, v, steps, lr, beta1, beta2, eps, max_angle)
    # a later backward pass through the old q raises
    torch.autograd.graph.increment_version((q, m, v, steps))


@torch.no_grad()
def reference(
    q: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    steps: Tensor,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    max_angle: float = math.pi / 4,
    *,
    exp: Callable[[Tensor], Tensor] = torch.linalg.matrix_exp,
) -> None:
    """Plain-torch definition of ``rotation_step``, by any exponential of skew matrices."""
    if isinstance(lr, Tensor):
        lr = _per_matrix(lr)
    D = q.shape[-1]
    g = g.to(q.dtype)
    a = g - g.mT
    total = a.square().sum((-2, -1))
    t = steps + 1
    logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    bias1, bias2 = (_per_matrix(-torch.expm1(t * log)) for log in logs)
    scalar = v.dim() < q.dim()
    new_m = beta1 * m + (1 - beta1) * a
    new_v = beta2 * v + (1 - beta2) * (total / max(1, D * (D - 1)) if scalar else a.square())
    root = ((_per_matrix(new_v) if scalar else new_v) / bias2).sqrt()
    r = exp(-_within(lr * (new_m / bias1) / (root + eps), max_angle)) @ q
    r = r + r @ (torch.eye(D, dtype=q.dtype, device=q.device) - r.mT @ r) / 2
    for old, new in ((q, r), (m, new_m), (v, new_v), (steps, steps + 1)):
        finite = total.isfinite()
        old.copy_(torch.where(finite if old.dim() < q.dim() else _per_matrix(finite), new, old))


def _within(x: Tensor, max_angle: float) -> Tensor:
    """Skew ``x`` [..., D, D], shortened where its rotation angles exceed ``max_angle``."""
    norm = torch.linalg.matrix_norm(x)
    unit = x / _per_matrix(norm.clamp_min(torch.finfo(x.dtype).tiny))
    square = unit @ unit
    # x^4 has every angle^4 twice
    fourth = torch.linalg.matrix_norm(square @ square) / math.sqrt(2)
    return x * _per_matrix((max_angle / (norm * fourth.sqrt().sqrt())).clamp_max(1))


def _per_matrix(values: Tensor) -> Tensor:
    return values[..., None, None]


def _fake(q: Tensor, g: Tensor, m: Tensor, v: Tensor, steps: Tensor, *options: float) -> None:
    op, leading = "rotation_step", g.shape[:-2]
    check_square(op, g)
    state = torch.promote_types(g.dtype, torch.float32)
    check_like(op, "q", q, g.shape, g, state)
    check_like(op, "m", m, g.shape, g, state)
    check_like(op, "v", v, leading if v.shape == leading else g.shape, g, state)
    check_like(op, "steps", steps, leading, g, state)


def _check_options(**options: float) -> None:
    for name, value in options.items():
        decay = name.startswith("beta")
        if not (0 <= value < 1 if decay else value > 0):
            allowed = "in [0, 1)" if decay else "above 0"
            raise RuntimeError(f"rotation_step: {name} must be {allowed}, got {value}")


def _has_op(g: Tensor) -> bool:
    return g.is_cpu or g.is_meta or _in_one_launch(g)


def _in_one_launch(g: Tensor) -> bool:
    """Whether a matrix fits into the shared memory of the kernel that serves its device."""
    fits = g.shape[-1] <= (32 if g.dtype == torch.float64 else 64)
    return g.is_cuda and fits and backend("rotation_step", g.get_device()) == "cuda"


def _cuda(q: Tensor, g: Tensor, m: Tensor, v: Tensor, steps: Tensor, *options: float) -> None:
    """One launch where a matrix fits into shared memory, else torch's products and ``skew_exp``."""
    if _in_one_launch(g):
        torch.ops.oneshot_fast_cuda.rotation_step(q, g, m, v, steps, *options)
    else:
        _composed(q, g, m, v, steps, *options)


def _composed(q: Tensor, g: Tensor, m: Tensor, v: Tensor, steps: Tensor, *options: Any) -> None:
    _fake(q, g, m, v, steps)  # for its checks
    with without_autocast(g):
        reference(q, g, m, v, steps, *options, exp=lambda x: skew_exp(x / 2))


_op: Any = torch.ops.oneshot_fast.rotation_step.default
torch.library.register_fake("oneshot_fast::rotation_step", _fake)
serve_cuda("rotation_step", _cuda)
