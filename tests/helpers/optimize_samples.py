"""Rewards of users, as python:optimize_samples.NAME."""

from __future__ import annotations

import torch
from torch import Tensor


def darkness(images: Tensor, prompts: list[str]) -> Tensor:
    """Without a gradient: images are rounded."""
    return -(images * 255).round().mean((1, 2, 3))


darkness.differentiable = False  # type: ignore[attr-defined]


def contrast(images: Tensor, prompts: list[str]) -> Tensor:
    """With a gradient, and a look at values, which a dry run's tensors do not have."""
    return images.flatten(1).std(1) / max(images.max().item(), 0.5)


def not_finite(images: Tensor, prompts: list[str]) -> Tensor:
    """NaN for prompts of a seven."""
    bad = torch.tensor([float("nan") if "seven" in prompt else 0.0 for prompt in prompts])
    return images.mean((1, 2, 3)) + bad
