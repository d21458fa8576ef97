"""The VAE of the recipe, and the latents that the other stages learn from."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import trange

from oneshot_fast.embedded.digits import (
    BASE_STYLE,
    load_digits,
    random_affine,
    random_style,
    render,
)
from oneshot_fast.recipes.tiny.config import TrainConfig
from oneshot_fast.recipes.tiny.fitting import fit, start_near_linear


def train_vae(config: TrainConfig, vae: AutoencoderKL) -> None:
    """Train the VAE on digits of random styles.

    Loss: pixel MSE in [-1, 1] plus 1e-4 of the KL divergence per latent element.
    """
    draw = torch.Generator().manual_seed(config.seed)
    digits, _ = load_digits("train")
    start_near_linear(vae)
    # Little noise at first: with the default, unit variance, colours are not found.
    nn.init.constant_(vae.quant_conv.bias[4:], -6.0)
    vae.to(memory_format=torch.channels_last).train()

    def loss_of_step(_: int) -> Tensor:
        index = torch.randint(len(digits), (16,), generator=draw)
        style = random_style(16, draw)
        images = 2 * render(digits[index], style, random_affine(16, 1.5, draw)) - 1
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample(draw)).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.mse_loss(output, images) + 1e-4 * divergence

    fit("vae", vae.parameters(), loss_of_step, config.vae_steps, lr=8e-4)
    vae.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents [B, 4, 8, 8] (posterior means) of images [B, 3, 64, 64] in [0, 1] RGB."""
    means = [vae.encode(2 * part - 1).latent_dist.mean for part in images.split(64)]
    return torch.cat(means) * vae.config.scaling_factor


def base_latents(vae: AutoencoderKL, copies: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents [M, 4, 8, 8], labels [M] of training digits in base style, moved ``copies`` times."""
    draw = torch.Generator().manual_seed(seed)
    digits, labels = load_digits("train")
    parts = []
    for _ in trange(copies, desc="encode"):
        affine = random_affine(len(digits), 0.6, draw)
        parts.append(encode_images(vae, render(digits, BASE_STYLE, affine)))
    return torch.cat(parts), labels.repeat(copies)


def set_scaling_factor(vae: AutoencoderKL) -> None:
    """Set the VAE's `scaling_factor` so that latents of the base style have unit deviation."""
    vae.register_to_config(scaling_factor=1.0)
    latents, _ = base_latents(vae, 1, seed=0)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
