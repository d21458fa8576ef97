"""latent_mse: the one-step Euler update and its squared distance to a target latent."""

import torch
from torch import Tensor


def latent_mse(eps_hat: Tensor, x: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Mean over C, H, W of (x0 - target)^2 with the one-step Euler update x0 = x - sigma eps_hat.

    Args:
        eps_hat: Predicted noise, [B, C, H, W].
        x: Noisy latents in the scheduler's unscaled units (sigma times unit noise), [B, C, H, W].
        target: Target latents, [B, C, H, W].
        sigma: Noise level of the step.

    Returns:
        Loss per image, [B], float64 for float64 inputs and float32 otherwise.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not agree.
    """
    return reference(eps_hat, x, target, sigma)


def reference(eps_hat: Tensor, x: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Plain-torch definition of ``latent_mse``."""
    acc = torch.promote_types(x.dtype, torch.float32)
    error = x.to(acc) - sigma * eps_hat.to(acc) - target.to(acc)
    return error.square().mean((1, 2, 3))
