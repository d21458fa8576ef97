"""Fitting a reward to scores of images.

    L = mean (f' - r')^2 + w mean_pairs CE(sigmoid((r'_i - r'_j) / t), sigmoid((f'_i - f'_j) / t))

where f' = f / s, r' = r / s, f is what the reward says, r what it shall say, s the deviation of all
r, so that the learning rate does not depend on the reward's scale, and t a temperature. Both parts
are least where f = r. The pairs are of images with one prompt.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.rewards.base import Reward
from oneshot_fast.training.batch import Batch

TEMPERATURE = 0.5


class ScoreLoss:
    """Squared error of a reward, and the cross-entropy of which of two images is better.

    A batch's group "images" has the images as noise, [B, 3, H, W] in [0, 1] RGB, and in ``extra``
    their prompts as "texts" and scores as "scores", [B] float32.
    """

    def __init__(self, deviation: float, pair_weight: float = 0.0) -> None:
        """Set s and w; without a weight there is no second part."""
        self._deviation, self._pair_weight = deviation, pair_weight
        self.parts: tuple[str, ...] = ("mse", "pairs") if pair_weight else ("mse",)

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """See ``Loss``; the ``module`` of ``model`` is the reward."""
        rows = batch["images"]
        texts, scores = rows.extra["texts"], rows.extra["scores"]
        found = predict(model.module, rows.noise, texts) / self._deviation
        wanted = scores / self._deviation
        losses = {"mse": (found - wanted).square().mean()}
        if self._pair_weight:
            losses["pairs"] = self._pair_weight * _pair_loss(found, wanted, texts)
        return losses


def predict(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """Scores, [B] float32, with a gradient to all weights, those that read prompts included."""
    once = [*dict.fromkeys(prompts)]
    features = reward.encode(once)
    return reward(images, features[[once.index(prompt) for prompt in prompts]])


def _pair_loss(found: Tensor, wanted: Tensor, texts: list[str]) -> Tensor:
    first, second = torch.triu_indices(len(texts), len(texts), 1, device=found.device)
    same = [k for k, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True))
            if texts[i] == texts[j]]  # fmt: skip
    if not same:
        return found.sum() * 0.0
    differences = [(x[first[same]] - x[second[same]]) / TEMPERATURE for x in (found, wanted)]
    return F.binary_cross_entropy_with_logits(differences[0], differences[1].sigmoid())
