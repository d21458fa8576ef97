"""Matching one batch: the rotation of each base noise that lands closest to its target.

The noise is a base noise whose patches are turned by one orthogonal matrix, found with Adam on the
matrix's skew logarithm. Many targets are solved at once, each with its own rotation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from oneshot_fast import noise_prior, ops
from oneshot_fast.errors import require
from oneshot_fast.search import Assignment, Problem, Search

if TYPE_CHECKING:
    from oneshot_fast.generator import OneStepGenerator, PromptEncoding

__all__ = ["AssignOptions", "Assignment", "assign_batch", "matching_loss", "objective"]


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

    prior_weight: float = 0.0
    """Weight of the negative log density of the noise's norm, see noise_prior.py. A rotation keeps
    the norm: this shows in the loss, but does not change the search."""
    moment_weight: float = 0.0
    """Weight of the distance of the noise's first four moments from the Gaussian's."""
    covariance_weight: float = 0.0
    """Weight of the distance of its covariance, over elements drawn at random, from identity."""
    stop_loss: float | None = None
    """End the search of a target once its loss is this low; its place goes to the next target."""
    stop_patience: int = 0
    """End it once its loss has not fallen by stop_improvement for so many steps; 0: never."""
    stop_improvement: float = 0.01
    """Fall of the loss that counts for stop_patience, relative to the loss."""

    @property
    def stops_early(self) -> bool:
        """Whether a target can end before the last step.

        Then a result depends, to rounding, on the targets that were searched beside it; without it
        an interrupted run that was resumed equals an uninterrupted one bit by bit.
        """
        return self.stop_loss is not None or self.stop_patience > 0

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        require(self.steps >= 1, f"steps is {self.steps}; give at least 1")
        require(0 < self.lr < math.inf, f"lr is {self.lr}; give a positive number")
        names = ("latent_loss", "pixel_l1", "drift_reg", "prior", "moment", "covariance")
        require(
            all(0 <= getattr(self, f"{name}_weight") < math.inf for name in names),
            "loss weights must be finite and not negative",
        )
        require(
            self.latent_loss_weight + self.pixel_l1_weight > 0,
            "both latent_loss_weight and pixel_l1_weight are 0; there is nothing to match",
        )
        require(
            self.stop_loss is None or 0 <= self.stop_loss < math.inf,
            f"stop_loss is {self.stop_loss}; give a loss, 0 or more",
        )
        require(
            self.stop_patience >= 0, f"stop_patience is {self.stop_patience}; give 0 or more steps"
        )
        require(
            0 <= self.stop_improvement < 1,
            f"stop_improvement is {self.stop_improvement}; give a number from 0 to below 1",
        )


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


def objective(
    generator: OneStepGenerator, options: AssignOptions, z: Tensor, problem: Problem
) -> Tensor:
    """What the search lowers: the distance to the target and the weighted penalties, [B]."""
    loss = matching_loss(generator, z, problem.prompts, problem.latents, problem.images, options)
    if options.drift_reg_weight:
        loss = loss + options.drift_reg_weight * (z - problem.eps).square().mean((1, 2, 3))
    for weight, penalty in (
        (options.prior_weight, noise_prior.norm_penalty),
        (options.moment_weight, noise_prior.moment_penalty),
        (options.covariance_weight, noise_prior.covariance_penalty),
    ):
        if weight:
            loss = loss + weight * penalty(z)
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

    All targets take as many steps as the slowest; solving.py gives the places of those that end
    early to others.

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
    problem = Problem(eps, prompts, target_latents, target_images)
    search = Search(problem, options, functools.partial(objective, generator, options))
    for step in range(options.steps + 1):
        on_step(search.advance(is_last=step == options.steps))
    return search.result()
