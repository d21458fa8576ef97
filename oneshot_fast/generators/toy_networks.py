"""The networks of the small generators: noise to image, and image to class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oneshot_fast.embedded.classifier import NUM_FEATURES, ConvolutionalJudge


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of a small generator.

    Attributes:
        prompts: The text of every class.
        image_size: Side in pixels.
        noise_shape: [C, h, w] of a noise: h = w = 1 for a plain vector.
        width: Channels at the full resolution; deeper layers have more.
    """

    prompts: tuple[str, ...]
    image_size: int
    noise_shape: tuple[int, int, int]
    width: int = 32


class ToyNetwork(nn.Module):
    """Noise and class in, image in [-1, 1] out: convolutions, each followed by doubling the side.

    The class scales and shifts the channels of every layer. It trains like a network of diffusers.
    """

    def __init__(self, config: ToyConfig) -> None:
        """Make the network with torch's initial weights."""
        super().__init__()
        C, h, _ = config.noise_shape
        start = max(4, h)
        stages = (config.image_size // start).bit_length() - 1
        widths = [config.width * min(4, 2 ** (stages - k)) for k in range(stages + 1)]
        self.first: nn.Module = nn.Conv2d(C, widths[0], 3, padding=1)
        if h == 1:
            self.first = nn.ConvTranspose2d(C, widths[0], start)
        self.blocks = nn.ModuleList(
            _Block(a, b, len(config.prompts)) for a, b in pairwise(widths[:1] + widths)
        )
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self._run: Callable[..., Tensor] = _plain

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.last.weight.dtype

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Tensor] | None = None
    ) -> None:
        """Recompute the blocks' activations in the backward pass, all or as the function does."""
        self._run = gradient_checkpointing_func or partial(checkpoint, use_reentrant=False)

    def disable_gradient_checkpointing(self) -> None:
        """Keep them."""
        self._run = _plain

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        """Images [B, 3, s, s], [-1, 1] RGB, of noises [B, C, h, w] and one-hot classes [B, K]."""
        x = self.first(noise)
        for k, block in enumerate(self.blocks):
            x = x if k == 0 else F.interpolate(x, scale_factor=2.0)
            x = self._run(block, x, classes)
        return torch.tanh(self.last(F.silu(x)))


def _plain(block: nn.Module, *args: Tensor) -> Tensor:
    return block(*args)


class _Block(nn.Module):
    """Normalisation scaled and shifted by the class, SiLU, convolution, twice, and a shortcut."""

    def __init__(self, fan_in: int, fan_out: int, classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, n, affine=False) for n in (fan_in, fan_out))
        self.styles = nn.ModuleList(nn.Linear(classes, 2 * n) for n in (fan_in, fan_out))
        self.convs = nn.ModuleList(nn.Conv2d(n, fan_out, 3, padding=1) for n in (fan_in, fan_out))
        self.shortcut = nn.Conv2d(fan_in, fan_out, 1)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        skip = self.shortcut(x)
        for norm, style, conv in zip(self.norms, self.styles, self.convs, strict=True):
            scale, shift = style(classes)[:, :, None, None].chunk(2, 1)
            x = conv(F.silu(norm(x) * (1 + scale) + shift))
        return x + skip


class ToyClassifier(ConvolutionalJudge):
    """Judge of samples: the class, and the features that distances are measured in."""

    def __init__(self, prompts: Sequence[str], image_size: int) -> None:
        """Make the network for the classes ``prompts`` and images of ``image_size`` pixels."""
        super().__init__(image_size, (16, 32, 64))
        self.prompts = tuple(prompts)
        self.head = nn.Linear(NUM_FEATURES, len(prompts))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, 3, s, s] in [0, 1] RGB."""
        return self.head(self.features(images))

    def label_of(self, prompt: str) -> int | None:
        """The class that ``prompt`` names, None if none."""
        return self.prompts.index(prompt) if prompt in self.prompts else None
