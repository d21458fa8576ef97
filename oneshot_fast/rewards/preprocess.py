"""Images as CLIP-like networks take them: resized, cut to a square, normalised; differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Mean and deviation of the pixels CLIP was trained on (Radford et al. 2021, arXiv 2103.00020);
# BLIP, ImageReward, HPSv2 and PickScore use the same.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side of [B, 3, H, W] in [0, 1] to ``size`` pixels and cut the centre.

    By an antialiased bicubic filter, the same as Pillow's BICUBIC, which the published
    preprocessing uses on 8-bit images; values that overshoot [0, 1] are cut, as there.
    """
    H, W = images.shape[-2:]
    if min(H, W) != size:
        short = min(H, W)
        images = _bicubic(images, (size * H // short, size * W // short))
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def preprocess(images: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """``resize`` in float32, then CLIP's normalisation: [B, 3, size, size] in ``dtype``."""
    return _normalise(resize(images.float(), size), dtype)


def preprocess_padded(images: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """As ``preprocess``, but what is not square keeps all of its content, between black bars."""
    H, W = images.shape[-2:]
    if H == W:
        return preprocess(images, size, dtype)
    height, width = round(size * H / max(H, W)), round(size * W / max(H, W))
    small = _bicubic(images.float(), (height, width))
    left, top = (size - width) // 2, (size - height) // 2
    bars = (left, size - width - left, top, size - height - top)
    return _normalise(F.pad(small, bars), dtype)


def _bicubic(images: Tensor, shape: tuple[int, int]) -> Tensor:
    # rows, then columns, each cut to [0, 1]: Pillow keeps 8 bits between its two passes
    for size in ((images.shape[-2], shape[1]), shape):
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    return images


def _normalise(images: Tensor, dtype: torch.dtype) -> Tensor:
    mean = images.new_tensor(CLIP_MEAN).view(3, 1, 1)
    std = images.new_tensor(CLIP_STD).view(3, 1, 1)
    return ((images - mean) / std).to(dtype)
