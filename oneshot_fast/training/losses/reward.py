"""Training on rewards through the single step.

    L = -mean sum_i w_i r_i(decoder(x0), prompt)

With one step the gradient of the reward is exact and short: image, decoder, denoiser. This is
DRaFT-1 (Clark et al. 2023, arXiv 2309.17400) and AlignProp (Prabhudesai et al. 2023, arXiv
2310.03739) where the sampler has no other step.
"""

from dataclasses import dataclass

from torch import Tensor

from oneshot_fast.generators.base import Generator, Prediction
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.training.batch import Rows


@dataclass(frozen=True)
class RewardLoss:
    """Minus the mean reward of the images, whose prompts are in ``rows.extra["texts"]``."""

    rewards: WeightedRewards

    def __call__(self, generator: Generator, made: Prediction, rows: Rows) -> Tensor:
        return -self.rewards(generator.images(made.latents), rows.extra["texts"]).mean()
