"""Matching one batch: the rotation of each base noise that lands closest to its target.

The noise is a base noise whose patches are turned by one orthogonal matrix, found with Adam on the
matrix's skew logarithm. Many targets are solved at once, each with its own rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.errors import require
from oneshot_fast.rotation import PatchRotation

if TYPE_CHECKING:
    from oneshot_fast.generator import OneStepGenerator, PromptEncoding


@dataclass(frozen=True)
class AssignOptions:
    """How a noise is searched."""

    steps: int = 40
    """Gradient steps per target."""
    lr: float = 0.02
    """Adam's learning rate on the skew matrix (radians per step and element, about)."""
    patch_size: int = 2
    """Side of the rotated patches in latent pixels; it divides the latent."""
    rotation_groups: int = 1
    """G: the latent is cut into G x G tiles with a rotation each."""
    latent_loss_weight: float = 1.0
    """Weight of the mean squared error between the latents."""
    pixel_l1_weight: float = 0.0
    """Weight of the mean absolute error between the images ([0, 1] RGB); 0 never decodes."""
    drift_reg_weight: float = 0.0
    """Weight of the mean squared distance between the noise and its base noise."""

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        require(self.steps >= 1, f"steps is {self.steps}; give at least 1")
        require(0 < self.lr < math.inf, f"lr is {self.lr}; give a positive number")
        weights = (self.latent_loss_weight, self.pixel_l1_weight, self.drift_reg_weight)
        require(
            all(0 <= weight < math.inf for weight in weights),
            "loss weights must be finite and not negative",
        )
        require(
            self.latent_loss_weight + self.pixel_l1_weight > 0,
            "both latent_loss_weight and pixel_l1_weight are 0; there is nothing to match",
        )


@dataclass(frozen=True)
class Assignment:
    """Result for a batch of targets.

    Attributes:
        z: Best rotated noise, [B, C, h, w] float32.
        q: Its rotation, [B, D, D] or [B, G, G, D, D] float32.
        losses: Loss of every target at every step, the last one included, [steps + 1, B].
        best_loss: Smallest of them, [B].
        best_step: Where it was, [B] int64.
    """

    z: Tensor
    q: Tensor
    losses: Tensor
    best_loss: Tensor
    best_step: Tensor


def matching_loss(
    generator: OneStepGenerator,
    z: Tensor,
    prompts: PromptEncoding,
    target_latents: Tensor,
    target_images: Tensor | None,
    options: AssignOptions,
) -> Tensor:
    """Distance between what the generator makes of ``z`` and the target, per image.

    Args:
        generator: The generator.
        z: Noise, [B, C, h, w].
        prompts: Encoding of B prompts.
        target_latents: [B, C, h, w].
        target_images: [B, 3, H, W] in [0, 1]; needed only with a pixel loss.
        options: Weights.

    Returns:
        [B] float32, differentiable.
    """
    eps_hat, x = generator.predict(z, prompts)
    sigma = generator.step.sigma
    loss = options.latent_loss_weight * ops.latent_mse(eps_hat, x, target_latents, sigma)
    if options.pixel_l1_weight:
        assert target_images is not None
        raw = generator.decode_raw(x - sigma * eps_hat)
        loss = loss + options.pixel_l1_weight * ops.pixel_l1(raw, target_images)
    return loss


def assign_batch(
    generator: OneStepGenerator,
    eps: Tensor,
    prompts: PromptEncoding,
    target_latents: Tensor,
    target_images: Tensor | None,
    options: AssignOptions,
    on_step: Callable[[Tensor], None] = lambda loss: None,
) -> Assignment:
    """Rotate base noises towards their targets; nothing here waits for the device.

    Args:
        generator: Its weights stay fixed.
        eps: Base noise, [B, C, h, w] float32, N(0, 1).
        prompts: Encoding of B prompts.
        target_latents: [B, C, h, w] float32.
        target_images: [B, 3, H, W] float32 in [0, 1]; None without a pixel loss.
        options: Steps, learning rate, patches, weights.
        on_step: Called with the losses [B] after each evaluation.

    Returns:
        The best rotation found for every target.
    """
    B = eps.shape[0]
    rotation = PatchRotation(eps.shape, options.patch_size, options.rotation_groups, eps.device)
    optimizer = torch.optim.Adam([rotation.skew], lr=options.lr)
    best_loss = torch.full((B,), float("inf"), device=eps.device)
    best_step = torch.zeros(B, dtype=torch.int64, device=eps.device)
    best_q = torch.zeros_like(rotation.skew)
    losses = []
    for step in range(options.steps + 1):
        is_last = step == options.steps
        with torch.set_grad_enabled(not is_last):
            q = rotation.q()
            z = ops.patch_rotate(eps, q, options.patch_size)
            loss = matching_loss(generator, z, prompts, target_latents, target_images, options)
            if options.drift_reg_weight:
                loss = loss + options.drift_reg_weight * (z - eps).square().mean((1, 2, 3))
        losses.append(loss.detach())
        on_step(losses[-1])
        better = losses[-1] < best_loss
        best_loss = torch.where(better, losses[-1], best_loss)
        best_step = torch.where(better, step, best_step)
        best_q = torch.where(better.view(B, *[1] * (q.ndim - 1)), q.detach(), best_q)
        if not is_last:
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    z = ops.patch_rotate(eps, best_q, options.patch_size)
    return Assignment(z, best_q, torch.stack(losses), best_loss, best_step)
