"""pixel_l1: distance of a decoder's output to an image."""

from typing import Any

import torch
from torch import Tensor

from oneshot_fast.ops._checks import check_images, check_like, promoted
from oneshot_fast.ops._register import OpSpec, define


def pixel_l1(y: Tensor, target: Tensor) -> Tensor:
    """Mean over C, H, W of |clamp(y / 2 + 0.5, 0, 1) - target|.

    Args:
        y: Decoder output, [B, C, H, W], in [-1, 1] before clamping; of two floating-point dtypes
            the wider counts.
        target: Images, [B, C, H, W], [0, 1] RGB.

    Returns:
        Loss per image, [B], float64 for float64 inputs and float32 otherwise.

    Raises:
        RuntimeError: Shapes or devices do not agree, or a dtype is no floating-point one.
    """
    return _call(*promoted(y, target))


def reference(y: Tensor, target: Tensor) -> Tensor:
    """Plain-torch definition of ``pixel_l1``."""
    acc = torch.promote_types(y.dtype, torch.float32)
    return ((y.to(acc) / 2 + 0.5).clamp(0, 1) - target.to(acc)).abs().mean((1, 2, 3))


def _fake(y: Tensor, target: Tensor) -> Tensor:
    check_images("pixel_l1", "y", y)
    check_like("pixel_l1", "target", target, y.shape, y)
    return y.new_empty(y.shape[0], dtype=torch.promote_types(y.dtype, torch.float32))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(
        _call_gradient(grad, *ctx.saved_tensors, wrt_target) if needed else None
        for wrt_target, needed in zip((False, True), ctx.needs_input_grad, strict=True)
    )


def _gradient_fake(grad: Tensor, y: Tensor, target: Tensor, wrt_target: bool) -> Tensor:
    check_images("d_pixel_l1", "y", y)
    acc = torch.promote_types(y.dtype, torch.float32)
    check_like("d_pixel_l1", "grad", grad, y.shape[:1], y, acc)
    check_like("d_pixel_l1", "target", target, y.shape, y)
    return y.new_empty(y.shape)


def _gradient_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient is linear in grad and piecewise constant in y and target."""
    grad, y, target = ctx.saved_tensors
    per_unit = _call_gradient(torch.ones_like(grad), y, target, *ctx.options)
    return (v.to(grad.dtype) * per_unit).sum((1, 2, 3)), None, None, None


_call_gradient = define("d_pixel_l1", _gradient_fake, _gradient_backward, saved=3, flat=True)
_call = define("pixel_l1", _fake, _backward, reference, saved=2, flat=True)


def _inputs(shape: tuple[int, ...]) -> tuple[Any, ...]:
    return torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)


SPEC = OpSpec(
    name="pixel_l1",
    fn=pixel_l1,
    reference=reference,
    inputs=_inputs,
    small=[((3, 3, 16, 16),), ((2, 3, 5, 7),), ((1, 1, 1, 1),), ((0, 3, 8, 8),)],
    large=[((B, 3, 512, 512),) for B in (1, 4)],
    trained=1,
)
