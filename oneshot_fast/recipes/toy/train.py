"""How the small generators and their classifiers are trained: a conditional GAN."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import trange

from oneshot_fast.generators.toy import ToyGenerator
from oneshot_fast.generators.toy_networks import ToyClassifier, ToyConfig, ToyNetwork
from oneshot_fast.recipes.tiny.fitting import fit
from oneshot_fast.recipes.toy.critics import HingeCritic, MakeCritic
from oneshot_fast.recipes.toy.data import LabelledImages


def train_generator(
    data: LabelledImages,
    noise_shape: Sequence[int],
    *,
    steps: int,
    against: MakeCritic = HingeCritic,
    batch_size: int = 64,
    width: int = 32,
    seed: int = 0,
) -> ToyGenerator:
    """Train a generator against a critic, which ``against`` makes, and average its weights."""
    draw = torch.Generator().manual_seed(seed)
    C, h, w = noise_shape
    config = ToyConfig(data.prompts, data.images.shape[-1], (C, h, w), width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ToyNetwork(config)
        critic = against(len(data.prompts), config.image_size, width)
    slow, fast = (
        torch.optim.Adam(module.parameters(), lr=lr, betas=(0.0, 0.99))
        for module, lr in zip((network, critic), critic.rates, strict=True)
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda k: min(1.0, 4 * (1 - k / steps)) + 1e-3)
        for o in (slow, fast)
    ]
    average = EMAModel(network.parameters(), 0.998)
    for step in trange(steps, desc="generator", mininterval=1.0):
        index = torch.randint(len(data.images), (batch_size,), generator=draw)
        real = data.images[index] * 2 - 1
        classes = F.one_hot(data.labels[index], len(data.prompts)).float()
        made = network(torch.randn(batch_size, C, h, w, generator=draw), classes)
        fast.zero_grad()
        critic.loss(real, made.detach(), classes, step).backward()
        fast.step()
        slow.zero_grad()
        critic.generator_loss(made, classes).backward()
        slow.step()
        average.step(network.parameters())
        for schedule in schedules:
            schedule.step()
    average.copy_to(network.parameters())
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
