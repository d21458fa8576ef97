"""Gradients that pass through float16 without vanishing."""

import math

import torch
from torch import Tensor


def gradient_scale(dtype: torch.dtype, elements: int) -> float:
    """Factor for gradients that go back through a network computed in ``dtype``.

    A loss that is a mean over n output elements has gradients of the size of 1/n there: 6e-5 for
    SDXL's latent, less for an image, and they shrink on their way back. Below 6e-5 float16 loses
    digits, below 6e-8 it holds only 0 (Micikevicius et al. 2018, arXiv 1710.03740). The factor n
    makes the loss a sum; there is room to 65504 above. torch's GradScaler, too, starts mean losses
    at 65536. It is rounded to a power of two, which rounds no gradient.

    Args:
        dtype: What the network computes in.
        elements: n.

    Returns:
        1 unless ``dtype`` is float16.
    """
    return 2.0 ** max(0, round(math.log2(elements))) if dtype == torch.float16 else 1.0


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``; its gradient is multiplied by ``factor``."""
    scaled = x if factor == 1 else x.view_as(x)
    if factor != 1 and scaled.requires_grad:
        scaled.register_hook(lambda gradient: gradient * factor)
    return scaled


def widened(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
