"""How the small generators and their classifiers are trained: a conditional GAN."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import trange

from oneshot_fast.tiny.fitting import Ema, fit
from oneshot_fast.toy.data import LabelledImages
from oneshot_fast.toy.model import ToyGenerator
from oneshot_fast.toy.networks import ToyClassifier, ToyConfig, ToyNetwork


class _Critic(nn.Module):
    """Real or made, given the class: projection discriminator (Miyato and Koyama 2018)."""

    def __init__(self, classes: int, image_size: int, width: int) -> None:
        super().__init__()
        stages = (image_size // 4).bit_length() - 1
        widths = [3, *(width * min(4, 2**k) for k in range(stages + 1))]
        layers: list[nn.Module] = []
        for k, (fan_in, fan_out) in enumerate(pairwise(widths)):
            stride = 1 if k == 0 else 2
            kernel = 3 if k == 0 else 4
            layers += [spectral_norm(nn.Conv2d(fan_in, fan_out, kernel, stride, 1)), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = spectral_norm(nn.Linear(16 * widths[-1], 1))
        self.classes = spectral_norm(nn.Linear(classes, 16 * widths[-1], bias=False))

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """Scores [B] of images [B, 3, s, s] in [-1, 1]."""
        x = self.body(images).flatten(1)
        return self.head(x)[:, 0] + (x * self.classes(classes)).sum(1)


def train_generator(
    data: LabelledImages,
    noise_shape: Sequence[int],
    *,
    steps: int,
    batch_size: int = 64,
    width: int = 32,
    seed: int = 0,
) -> ToyGenerator:
    """Train a generator with the hinge loss (Lim and Ye 2017) and average its weights.

    Args:
        data: Labelled images.
        noise_shape: [C, h, w] of a noise.
        steps: Steps of generator and critic.
        batch_size: Images per step.
        width: Channels at the full resolution.
        seed: Of weights, batches and noises.
    """
    draw = torch.Generator().manual_seed(seed)
    C, h, w = noise_shape
    config = ToyConfig(data.prompts, data.images.shape[-1], (C, h, w), width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ToyNetwork(config)
        critic = _Critic(len(data.prompts), config.image_size, width)
    slow, fast = (
        torch.optim.Adam(module.parameters(), lr=lr, betas=(0.0, 0.99))
        for module, lr in ((network, 2e-4), (critic, 4e-4))
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda k: min(1.0, 4 * (1 - k / steps)) + 1e-3)
        for o in (slow, fast)
    ]
    average = Ema(network.parameters(), 0.998)
    for _ in trange(steps, desc="generator", mininterval=1.0):
        index = torch.randint(len(data.images), (batch_size,), generator=draw)
        real = data.images[index] * 2 - 1
        classes = F.one_hot(data.labels[index], len(data.prompts)).float()
        made = network(torch.randn(batch_size, C, h, w, generator=draw), classes)
        wrong = F.relu(1 - critic(real, classes)) + F.relu(1 + critic(made.detach(), classes))
        fast.zero_grad()
        wrong.mean().backward()
        fast.step()
        slow.zero_grad()
        (-critic(made, classes).mean()).backward()
        slow.step()
        average.update()
        for schedule in schedules:
            schedule.step()
    average.copy_to_parameters()
    return ToyGenerator(config, network)


def train_classifier(data: LabelledImages, *, steps: int = 1500, seed: int = 0) -> ToyClassifier:
    """Train the classifier on ``data`` with a little noise on the images."""
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = ToyClassifier(data.prompts, data.images.shape[-1]).train()

    def loss_of_step(_: int) -> Tensor:
        index = torch.randint(len(data.images), (64,), generator=draw)
        images = data.images[index]
        images = images + 0.05 * torch.randn(images.shape, generator=draw)
        return F.cross_entropy(classifier(images), data.labels[index], label_smoothing=0.05)

    fit("classifier", classifier.parameters(), loss_of_step, steps, lr=2e-3)
    return classifier.eval().requires_grad_(False)
