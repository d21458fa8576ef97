"""pixel_l1: distance of a decoder's output to an image."""

import torch
from torch import Tensor


def pixel_l1(y: Tensor, target: Tensor) -> Tensor:
    """Mean over C, H, W of |clamp(y / 2 + 0.5, 0, 1) - target|.

    Args:
        y: Decoder output, [B, C, H, W], in [-1, 1] before clamping.
        target: Images, [B, C, H, W], [0, 1] RGB.

    Returns:
        Loss per image, [B], float64 for float64 inputs and float32 otherwise.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not agree.
    """
    return reference(y, target)


def reference(y: Tensor, target: Tensor) -> Tensor:
    """Plain-torch definition of ``pixel_l1``."""
    acc = torch.promote_types(y.dtype, torch.float32)
    return ((y.to(acc) / 2 + 0.5).clamp(0, 1) - target.to(acc)).abs().mean((1, 2, 3))
