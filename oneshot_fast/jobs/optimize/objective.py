"""What a search by rewards lowers."""

from __future__ import annotations

import torch
from torch import Tensor

from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.search.problem import Evaluation, Problem, penalised


class RewardObjective:
    """What a search by rewards lowers: minus the reward, and the penalties."""

    def __init__(
        self, generator: Generator, rewards: WeightedRewards, options: OptimizeOptions
    ) -> None:
        """Bind the generator, whose weights stay fixed, the rewards and the penalties' weights."""
        self._generator, self._rewards, self._options = generator, rewards, options

    def __call__(self, z: Tensor, problem: Problem) -> Evaluation:
        """Losses, scores by reward and in all ("total"), and images of noises [B, C, h, w]."""
        images = self._generator.images(self._generator.latents(z, problem.conditioning))
        scores = self._rewards.scores(images, list(problem.prompts))
        total = self._rewards.total(scores)
        loss = penalised(-total, z, problem.eps, self._options)
        pixels = (images.detach() * 255).round().to(torch.uint8)
        return Evaluation(loss, {**scores, "total": total}, pixels)
