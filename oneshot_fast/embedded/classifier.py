"""A small classifier of handwritten digits: the judge of samples and the features of distances."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from oneshot_fast.embedded.digits import IMAGE_SIZE, digit_of

NUM_FEATURES = 64
WEIGHTS = Path(__file__).with_name("classifier.safetensors")


class ConvolutionalJudge(nn.Module):
    """Strided convolutions to the features that distances between samples are measured in."""

    def __init__(self, image_size: int, widths: Sequence[int]) -> None:
        """Make the body for images of ``image_size`` pixels; each of ``widths`` halves the side."""
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((3, *widths)):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), nn.BatchNorm2d(fan_out)]
            layers += [nn.SiLU()]
        pixels = (image_size >> len(widths)) ** 2
        layers += [nn.Flatten(), nn.Linear(pixels * widths[-1], NUM_FEATURES), nn.SiLU()]
        self.body = nn.Sequential(*layers)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, [B, 64], of images [B, 3, s, s] in [0, 1] RGB."""
        return self.body(2 * images - 1)


class DigitClassifier(ConvolutionalJudge):
    """Two heads: the digit, and the style it is drawn in.

    The style head (ink and paper colour, thickness) is used in training only: it keeps in the
    features what a classifier alone would discard, so that a distance between features sees style.
    """

    def __init__(self) -> None:
        super().__init__(IMAGE_SIZE, (16, 32, 64, 64))
        self.digit_head = nn.Linear(NUM_FEATURES, 10)
        self.style_head = nn.Linear(NUM_FEATURES, 7)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, [B, 64], of images [B, 3, s, s] in [0, 1] RGB, of any side s."""
        if images.shape[-1] != IMAGE_SIZE:
            images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
        return super().features(images)

    def label_of(self, prompt: str) -> int | None:
        """The digit that ``prompt`` names, None if it names none."""
        return digit_of(prompt)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten digits, [B, 10], of images [B, 3, s, s] in [0, 1] RGB."""
        return self.digit_head(self.features(images))


def load_classifier(path: Path | None = None) -> DigitClassifier:
    """The classifier in ``path``, or the packaged one, in evaluation mode, fp32, frozen."""
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(path or WEIGHTS))
    return classifier.eval().requires_grad_(False)
