"""latent_mse: the one-step Euler update and its squared distance to a target latent."""

from typing import Any

import torch
from torch import Tensor

from oneshot_fast.ops._checks import check_images, check_like, promoted
from oneshot_fast.ops._register import OpSpec, define


def latent_mse(eps_hat: Tensor, x: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Mean over C, H, W of (x0 - target)^2 with the one-step Euler update x0 = x - sigma eps_hat.

    Args:
        eps_hat: Predicted noise, [B, C, H, W]; of several floating-point dtypes the widest counts.
        x: Noisy latents in unscaled units (target plus sigma times unit noise), [B, C, H, W].
        target: Target latents, [B, C, H, W].
        sigma: Noise level of the step.

    Returns:
        Loss per image, [B], float64 for float64 inputs and float32 otherwise.

    Raises:
        RuntimeError: Shapes or devices do not agree, or a dtype is no floating-point one.
    """
    return _call(*promoted(eps_hat, x, target), sigma)


def reference(eps_hat: Tensor, x: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Plain-torch definition of ``latent_mse``."""
    acc = torch.promote_types(x.dtype, torch.float32)
    error = x.to(acc) - sigma * eps_hat.to(acc) - target.to(acc)
    return error.square().mean((1, 2, 3))


def _fake(eps_hat: Tensor, x: Tensor, target: Tensor, sigma: float) -> Tensor:
    _check("latent_mse", eps_hat, x, target)
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _check(op: str, eps_hat: Tensor, x: Tensor, target: Tensor) -> None:
    check_images(op, "eps_hat", eps_hat)
    check_like(op, "x", x, eps_hat.shape, eps_hat)
    check_like(op, "target", target, eps_hat.shape, eps_hat)


def _scales(sigma: float) -> tuple[float, float, float]:
    """Derivatives of the error x - sigma eps_hat - target in eps_hat, x and target."""
    return -sigma, 1.0, -1.0


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (sigma,) = ctx.options
    gradients = [
        _call_gradient(grad, *ctx.saved_tensors, sigma, scale) if needed else None
        for scale, needed in zip(_scales(sigma), ctx.needs_input_grad[:3], strict=True)
    ]
    return *gradients, None


def _gradient_fake(
    grad: Tensor, eps_hat: Tensor, x: Tensor, target: Tensor, sigma: float, scale: float
) -> Tensor:
    _check("d_latent_mse", eps_hat, x, target)
    acc = torch.promote_types(x.dtype, torch.float32)
    check_like("d_latent_mse", "grad", grad, x.shape[:1], x, acc)
    return x.new_empty(x.shape)


def _gradient_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient scale 2/n grad[b] error is linear in grad and in error."""
    grad, *tensors = ctx.saved_tensors
    sigma, scale = ctx.options
    d_error = v * (2 * scale / max(1, v[:1].numel())) * grad.to(v.dtype)[:, None, None, None]
    per_unit = _call_gradient(torch.ones_like(grad), *tensors, sigma, scale)
    d_grad = (v.to(grad.dtype) * per_unit).sum((1, 2, 3))
    return d_grad, *(d_error * part for part in _scales(sigma)), None, None


_call_gradient = define("d_latent_mse", _gradient_fake, _gradient_backward, saved=4, flat=True)
_call = define("latent_mse", _fake, _backward, reference, saved=3, flat=True)


def _inputs(shape: tuple[int, ...], sigma: float) -> tuple[Any, ...]:
    return *torch.randn(3, *shape, dtype=torch.float64), sigma


SPEC = OpSpec(
    name="latent_mse",
    fn=latent_mse,
    reference=reference,
    inputs=_inputs,
    small=[((3, 4, 8, 8), 14.6), ((2, 3, 5, 7), 0.5), ((1, 1, 1, 1), 1.0), ((0, 4, 8, 8), 1.0)],
    large=[((B, 4, 64, 64), 14.6) for B in (1, 16, 64)],
    trained=1,
)
