"""The VAE of the recipe, and the latents that the other stages learn from."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from oneshot_fast.recipes.tiny.config import TrainConfig
from oneshot_fast.recipes.tiny.fitting import fit, start_near_linear
from oneshot_fast.recipes.tiny.material import Material


def train_vae(config: TrainConfig, vae: AutoencoderKL, material: Material) -> None:
    """Train the VAE on the material's images of any style.

    Loss: pixel MSE in [-1, 1] plus 1e-4 of the KL divergence per latent element.
    """
    draw = torch.Generator().manual_seed(config.seed)
    start_near_linear(vae)
    # Little noise at first: with the default, unit variance, colours are not found.
    nn.init.constant_(vae.quant_conv.bias[4:], -6.0)
    vae.to(memory_format=torch.channels_last).train()

    def loss_of_step(_: int) -> Tensor:
        images = 2 * material.of_any_style(16, draw) - 1
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


def base_latents(
    vae: AutoencoderKL, parts: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Latents [M, 4, 8, 8] and labels [M] of the images that ``Material.base`` gives."""
    latents, labels = zip(*((encode_images(vae, x), y) for x, y in parts), strict=True)
    return torch.cat(latents), torch.cat(labels)


def set_scaling_factor(vae: AutoencoderKL, material: Material) -> None:
    """Set the VAE's `scaling_factor` so that latents of the base style have unit deviation."""
    vae.register_to_config(scaling_factor=1.0)
    latents, _ = base_latents(vae, material.base(1, seed=0))
    vae.register_to_config(scaling_factor=1 / latents.std().item())
