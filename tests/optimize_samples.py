"""Rewards of users, as python:optimize_samples.NAME."""

from __future__ import annotations

import torch
from torch import Tensor


def darkness(images: Tensor, prompts: list[str]) -> Tensor:
    """Without a gradient: images are rounded."""
    return -(images * 255).round().mean((1, 2, 3))


darkness.differentiable = False  # type: ignore[attr-defined]


def not_finite(images: Tensor, prompts: list[str]) -> Tensor:
    """NaN for prompts of a seven."""
    bad = torch.tensor([float("nan") if "seven" in prompt else 0.0 for prompt in prompts])
    return images.mean((1, 2, 3)) + bad
