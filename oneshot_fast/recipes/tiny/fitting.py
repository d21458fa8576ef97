"""What the stages of the recipe share: initial weights and the optimiser's loop."""

import math
from collections.abc import Callable, Iterable

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import trange


@torch.no_grad()
def start_near_linear(module: nn.Module) -> None:
    """Set every residual branch to zero and let convolutions keep the variance.

    torch's default shrinks a signal by sqrt(3) per convolution, until the normalised branches
    drown what the network should carry through, such as the colours in the VAE.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight *= 3**0.5
    for part in module.modules():
        if isinstance(part, ResnetBlock2D):
            last: nn.Module = part.conv2
        elif isinstance(part, Attention):
            last = part.to_out[0]
        else:
            continue
        for parameter in last.parameters():
            parameter.zero_()


def fit(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    lr: float,
    ema_decay: float = 0.995,
) -> None:
    """AdamW with warm-up, cosine decay and clipping; leaves the averaged weights in place.

    ``loss_of_step`` gives the scalar loss of a step, ``lr`` is the highest learning rate.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))
    warmup = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    ema = EMAModel(parameters, ema_decay)
    mean_loss = 0.0
    for step in (bar := trange(steps, desc=name, mininterval=1.0)):
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.step(parameters)
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 100)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{mean_loss:.5f}", refresh=False)
    ema.copy_to(parameters)
