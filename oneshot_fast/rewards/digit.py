"""``digit``: how clearly an image shows the digit that its prompt names."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.embedded.digits import IMAGE_SIZE, digit_of
from oneshot_fast.errors import UserError
from oneshot_fast.rewards.base import Reward, Setup
from oneshot_fast.rewards.preprocess import resize


class DigitReward(Reward):
    """Log-probability, at most 0, that the embedded classifier gives the prompted digit."""

    name = "digit"

    def __init__(self) -> None:
        """Load the embedded classifier."""
        super().__init__()
        self._classifier = load_classifier()

    @classmethod
    def load(cls, name: str, setup: Setup) -> "DigitReward":
        return cls().to(setup.device)  # it is small and computes in float32

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The digits, [B] int64; UserError if a prompt names none, or several."""
        digits = [digit_of(prompt) for prompt in prompts]
        for prompt, digit in zip(prompts, digits, strict=True):
            if digit is None:
                raise UserError(
                    f"prompt {prompt!r} names no digit; reward digit needs one, such as "
                    '"a handwritten digit three"'
                )
        return torch.tensor(digits, device=self._classifier.digit_head.weight.device)

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        logits = self._classifier(resize(images.float(), IMAGE_SIZE))
        return F.log_softmax(logits, 1).gather(1, features[:, None])[:, 0]
