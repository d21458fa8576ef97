"""How a generator is trained on matched pairs, or on rewards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from oneshot_fast.data.options import SizeOptions
from oneshot_fast.errors import require
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.rewards.options import RewardTrainingOptions
from oneshot_fast.training.losses.base import OneStepLoss, Term
from oneshot_fast.training.losses.matching import Matching
from oneshot_fast.training.losses.preserve import Preserve
from oneshot_fast.training.losses.reward import RewardLoss
from oneshot_fast.training.options import TrainOptions


@dataclass(frozen=True)
class SftOptions(TrainOptions):
    """How the generator is trained."""

    latent_loss_weight: float = 1.0
    """Weight of the mean squared error between the latents."""
    pixel_l1_weight: float = 0.0
    """Weight of the mean absolute error between the images ([0, 1] RGB); 0 never decodes."""
    noise: Literal["matched", "random"] = "matched"
    """Train on the matched noises, or (baseline: direct SFT) on new random noise at every step."""
    caption_dropout: float = 0.0
    """Probability, for each pair in each epoch, that the empty prompt, as text encoders read it,
    replaces its own: the model also learns to do without one."""

    def check(self) -> None:
        super().check()
        require(
            0 <= self.caption_dropout <= 1,
            f"caption_dropout is {self.caption_dropout}; give a probability, 0 to 1",
        )
        require(
            self.latent_loss_weight + self.pixel_l1_weight > 0,
            "both latent_loss_weight and pixel_l1_weight are 0; there is nothing to learn",
        )

    @property
    def weights(self) -> tuple[float, ...]:
        return (self.latent_loss_weight, self.pixel_l1_weight, *super().weights)

    @property
    def decodes(self) -> bool:
        return self.pixel_l1_weight > 0 or super().decodes

    def loss(self, rewards: WeightedRewards | None = None) -> OneStepLoss:
        """What is lowered: matching, or minus ``rewards`` where they are given, and preserve.

        Both are called "matching", the name of their column in history.jsonl.
        """
        learn: Term = Matching(self.latent_loss_weight, self.pixel_l1_weight)
        if rewards is not None:
            learn = RewardLoss(rewards)
        keep = Preserve(self.preserve_latent_weight, self.preserve_pixel_weight)
        return OneStepLoss(matching=learn, preserve=keep)


@dataclass(frozen=True)
class MeasuredTrainingOptions(SizeOptions, RewardTrainingOptions):
    """Training on rewards: of which images, and what is measured."""

    prompt_field: str | None = None
    """Column or field of prompt_file; by default the first of prompt, text and caption."""
    resolution: int | None = None
    """With --reward: image side in pixels, unless width and height are given; by default the
    model's own. Pairs have the size of their noises."""
    eval_samples: int = 64
    """Random noises, not trained on, on which the generator is measured; with --reward before
    training and after every epoch."""


@dataclass(frozen=True)
class HeldOutOptions:
    """Training on pairs: measured on fresh noise against held-out images as it goes."""

    eval_every: int = 0
    """With pairs: measure after every so many epochs, on --eval_samples noises; checkpoint-best is
    then the best on the held-out images, or the base if nothing beat it. 0: never."""
    heldout_root: Path | None = None
    """With --eval_every: pairs never trained on, in the format of assign's data_root."""
    heldout: float | None = None
    """With --eval_every, without heldout_root: share of the pairs that is held out, chosen by the
    seed. By default a tenth, but 16 to 500 pairs; of fewer than 64 it has to be given."""
    features: str | None = None
    """With --eval_every: what images are compared by, see evaluate --help."""
