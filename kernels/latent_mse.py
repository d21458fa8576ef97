"""Triton kernels of latent_mse; checks and autograd are in oneshot_fast.ops."""

import triton
import triton.language as tl
from torch import Tensor

from oneshot_fast.kernels.partial_sums import gradient_per_image, mean_per_image


@triton.jit
def _error(eps_hat_ptr, x_ptr, target_ptr, sigma, offsets, mask, ACC: tl.constexpr):
    """X - sigma eps_hat - target."""
    eps_hat = tl.load(eps_hat_ptr + offsets, mask=mask, other=0.0).to(ACC)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    target = tl.load(target_ptr + offsets, mask=mask, other=0.0).to(ACC)
    return x - sigma * eps_hat - target


@triton.jit
def latent_mse_kernel(
    # loss = mean over the n elements of an image of e^2, e = x - sigma eps_hat - target.
    eps_hat_ptr,  # [B, n]
    x_ptr,  # [B, n]
    target_ptr,  # [B, n]
    sums_ptr,  # [B, chunks], or [B] the loss itself for one chunk
    sigma: tl.float64,
    n,
    chunks,
    mean: tl.float64,  # factor of the sums: 1 / n for one chunk, else 1
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    image = (tl.program_id(0) // chunks).to(tl.int64)
    i0 = tl.program_id(0) % chunks * CHUNK
    s = tl.full((BLOCK,), sigma, ACC)
    total = tl.zeros((BLOCK,), dtype=ACC)
    for i in range(0, CHUNK, BLOCK):
        offsets = i0 + i + tl.arange(0, BLOCK)
        mask = offsets < n
        offsets = image * n + offsets
        error = _error(eps_hat_ptr, x_ptr, target_ptr, s, offsets, mask, ACC)
        total += error * error
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total) * mean)


@triton.jit
def d_latent_mse_kernel(
    # out = scale grad d loss / dx = grad (2 scale / n) (x - sigma eps_hat - target)
    grad_ptr,  # [B], accumulation dtype
    eps_hat_ptr,  # [B, n]
    x_ptr,  # [B, n]
    target_ptr,  # [B, n]
    out_ptr,  # [B, n]
    sigma: tl.float64,
    factor: tl.float64,  # 2 scale / n
    n,
    blocks,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = grad_ptr.dtype.element_ty
    image = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    offsets = image * n + offsets
    s = tl.full((BLOCK,), sigma, ACC)
    error = _error(eps_hat_ptr, x_ptr, target_ptr, s, offsets, mask, ACC)
    out = tl.full((BLOCK,), factor, ACC) * tl.load(grad_ptr + image) * error
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


def latent_mse(eps_hat: Tensor, x: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Mean over C, H, W of (x - sigma eps_hat - target)^2.

    Args:
        eps_hat: Predicted noise, [B, C, H, W].
        x: Noisy latents, [B, C, H, W].
        target: Target latents, [B, C, H, W].
        sigma: Noise level of the step.

    Returns:
        Loss per image, [B], in the accumulation dtype.
    """
    return mean_per_image(latent_mse_kernel, (eps_hat, x, target), sigma)


def d_latent_mse(
    grad: Tensor, eps_hat: Tensor, x: Tensor, target: Tensor, sigma: float, scale: float
) -> Tensor:
    """Gradient of <grad, loss> in ``x`` times ``scale``.

    Args:
        grad: Gradient of the losses, [B], in the accumulation dtype.
        eps_hat: Predicted noise, [B, C, H, W].
        x: Noisy latents, [B, C, H, W].
        target: Target latents, [B, C, H, W].
        sigma: Noise level of the step.
        scale: 1 for the gradient in x, -sigma in eps_hat, -1 in target.

    Returns:
        Gradient, [B, C, H, W].
    """
    factor = 2 * scale / max(1, x[:1].numel())
    return gradient_per_image(d_latent_mse_kernel, grad, (eps_hat, x, target), sigma, factor)
