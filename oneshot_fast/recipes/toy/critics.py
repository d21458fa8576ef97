"""What the small generators are trained against: networks that tell real images from made ones."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

_PENALTY_EVERY = 8  # steps


class HingeCritic(nn.Module):
    """Projection critic (Miyato and Koyama 2018) with spectral norms and the hinge loss.

    Slow to learn, which is safe where there are few images. The loss is Lim and Ye's, 2017.
    """

    rates = 2e-4, 4e-4
    """Learning rates of generator and critic."""

    def __init__(self, classes: int, image_size: int, width: int) -> None:
        """Make the network for K classes and images of a side; ``width`` channels there."""
        super().__init__()
        layers, features = _convolutions(image_size, width, nn.SiLU(), spectral_norm)
        self.body = nn.Sequential(*layers)
        self.head = spectral_norm(nn.Linear(features, 1))
        self.classes = spectral_norm(nn.Linear(classes, features, bias=False))

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """Scores [B] of images [B, 3, s, s] in [-1, 1] and one-hot classes [B, K]."""
        x = self.body(images).flatten(1)
        return self.head(x)[:, 0] + (x * self.classes(classes)).sum(1)

    def loss(self, real: Tensor, made: Tensor, classes: Tensor, step: int) -> Tensor:
        """What the critic minimises: real scores above 1, made ones below -1."""
        return (F.relu(1 - self(real, classes)) + F.relu(1 + self(made, classes))).mean()

    def generator_loss(self, made: Tensor, classes: Tensor) -> Tensor:
        """What the generator minimises."""
        return -self(made, classes).mean()


class LogisticCritic(nn.Module):
    """Projection critic held back by a penalty on its gradient; it learns faster.

    The loss is the non-saturating one (arXiv 1406.2661), the penalty is R1 (arXiv 1801.04406),
    taken now and then only (arXiv 1912.04958).
    """

    rates = 1e-3, 1e-3
    """Learning rates of generator and critic."""

    def __init__(self, classes: int, image_size: int, width: int, penalty: float = 0.2) -> None:
        """Make the network for K classes and images of a side; ``width`` channels there.

        ``penalty`` is the weight on the gradient; with too small a one, what is rare is dropped.
        """
        super().__init__()
        self.penalty = penalty
        layers, features = _convolutions(image_size, width, nn.LeakyReLU(0.2))
        layers += [nn.Flatten(), nn.Linear(features, 128), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128, 1)
        self.classes = nn.Linear(classes, 128, bias=False)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        x = self.body(images)
        return self.head(x)[:, 0] + (x * self.classes(classes)).sum(1) * (4 / 128**0.5)

    def loss(self, real: Tensor, made: Tensor, classes: Tensor, step: int) -> Tensor:
        """What the critic minimises: the cross-entropy of real against made, and the penalty."""
        penalised = step % _PENALTY_EVERY == 0
        scores = self(real.requires_grad_(penalised), classes)
        loss = F.softplus(-scores).mean() + F.softplus(self(made, classes)).mean()
        if penalised:
            slope = torch.autograd.grad(scores.sum(), real, create_graph=True)[0]
            weight = _PENALTY_EVERY * self.penalty / 2
            loss = loss + weight * slope.square().sum((1, 2, 3)).mean()
        return loss

    def generator_loss(self, made: Tensor, classes: Tensor) -> Tensor:
        return F.softplus(-self(made, classes)).mean()


Critic = HingeCritic | LogisticCritic
MakeCritic = Callable[[int, int, int], Critic]


def _convolutions(
    image_size: int,
    width: int,
    activation: nn.Module,
    norm: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> tuple[list[nn.Module], int]:
    """Layers from images to 4 x 4 pixels, all but the first halving the side; their outputs."""
    stages = (image_size // 4).bit_length() - 1
    widths = [3, *(width * min(4, 2**k) for k in range(stages + 1))]
    layers = []
    for k, (fan_in, fan_out) in enumerate(pairwise(widths)):
        size, stride = (4, 2) if k else (3, 1)
        layers += [norm(nn.Conv2d(fan_in, fan_out, size, stride, 1)), activation]
    return layers, 16 * widths[-1]
