"""What a search by rewards lowers, and what it sees on its way; what a training on them lowers.

Every evaluation of a search makes the images, so the images of the first, the best and the chosen
steps are kept as they come by; nothing is generated twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.noise.prior import norm_penalty
from oneshot_fast.search.gradient import Problem
from oneshot_fast.training.batch import Batch, SftOptions, preserve_loss

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator
    from oneshot_fast.rewards import WeightedRewards


class Objective:
    """Loss of a batch of noises: minus their reward, and the penalties. It remembers all scores."""

    def __init__(
        self,
        generator: Generator,
        rewards: WeightedRewards,
        options: OptimizeOptions,
        prompts: Sequence[str],
        save_steps: Sequence[int] = (),
    ) -> None:
        """Bind one batch.

        Args:
            generator: Its weights stay fixed.
            rewards: Score images.
            options: Weights of the penalties.
            prompts: Of the batch.
            save_steps: Evaluations, from 0, whose images are kept.
        """
        self._generator, self._rewards, self._options = generator, rewards, options
        self._prompts, self._save_steps = list(prompts), {0, *save_steps}
        self._scores: list[dict[str, Tensor]] = []
        self._losses: list[Tensor] = []
        self._lowest: Tensor | None = None
        self.best_images: Tensor | None = None  # [B, 3, H, W] uint8
        self.images: dict[int, Tensor] = {}

    def __call__(self, z: Tensor, problem: Problem) -> Tensor:
        """Losses, [B] float32, of noises [B, C, h, w]."""
        images = self._generator.images(self._generator.latents(z, problem.prompts))
        scores = self._rewards.scores(images, self._prompts)
        total = self._rewards.total(scores)
        loss = -total
        if self._options.noise_l2_weight:
            drift = (z - problem.eps).square().mean((1, 2, 3))
            loss = loss + self._options.noise_l2_weight * drift
        if self._options.norm_weight:
            loss = loss + self._options.norm_weight * norm_penalty(z)
        self._remember(images.detach(), {**scores, "total": total}, loss.detach())
        return loss

    def _remember(self, images: Tensor, scores: dict[str, Tensor], loss: Tensor) -> None:
        pixels = (images * 255).round().to(torch.uint8)
        if len(self._losses) in self._save_steps:
            self.images[len(self._losses)] = pixels
        if self._lowest is None or self.best_images is None:
            self._lowest, self.best_images = loss, pixels
        else:
            better = (loss < self._lowest).view(-1, 1, 1, 1)
            self.best_images = torch.where(better, pixels, self.best_images)
            self._lowest = torch.minimum(loss, self._lowest)
        self._scores.append({name: score.detach() for name, score in scores.items()})
        self._losses.append(loss)

    @property
    def losses(self) -> Tensor:
        """Of every evaluation so far, [evaluations, B]."""
        return torch.stack(self._losses)

    def scores(self) -> dict[str, Tensor]:
        """Of every evaluation so far, [evaluations, B] by reward, "total" among them."""
        return {name: torch.stack([s[name] for s in self._scores]) for name in self._scores[0]}


def reward_losses(
    rewards: WeightedRewards, generator: Generator, batch: Batch, options: SftOptions
) -> tuple[Tensor, Tensor]:
    """Minus the mean reward, and the preserve loss, from one evaluation of all rows.

    Args:
        rewards: Score the images of the matched rows, whose latents are not read.
        generator: The trained generator.
        batch: With ``texts``.
        options: Weights of the preserve losses.

    Returns:
        Two scalars, differentiable with respect to the denoiser; their sum is the loss.
    """
    made = generator.predict(batch.noise, batch.prompts)
    n = batch.matched
    keep = preserve_loss(generator, batch, made, options)
    if not n:
        return keep.new_zeros(()), keep
    images = generator.images(made.latents[:n])
    return -rewards(images, batch.texts).mean(), keep
