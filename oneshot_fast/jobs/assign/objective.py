"""Matching one batch: the noise, near each base noise, that lands closest to its target.

How a noise may move is in methods.py. Many targets are solved at once, each on its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.errors import require
from oneshot_fast.jobs.assign.features import feature_function, feature_mse
from oneshot_fast.noise import prior as noise_prior
from oneshot_fast.search.gradient import Assignment, Problem, Search

if TYPE_CHECKING:
    from oneshot_fast.generators.sdxl import OneStepGenerator, PromptEncoding

AssignMethod = Literal[
    "search", "pool", "rotation", "sphere", "white",
    "search+rotation", "search+sphere", "search+white",
    "pool+rotation", "pool+sphere", "pool+white",
]  # fmt: skip

__all__ = ["AssignOptions", "Assignment", "assign_batch", "matching_loss", "objective"]


@dataclass(frozen=True)
class AssignOptions:
    """How a noise is searched."""

    assign_method: AssignMethod = "sphere"
    """How noises are found. search: the best of --candidates random noises of each target; pool:
    the targets of a prompt share their candidates, each gets its own; both only run the generator
    forwards. By gradients from a random noise: rotation of its patches, sphere (free at constant
    energy), white (the energy of each part of its spectrum is constant, too). search+rotation and
    the like start the gradients at the noise that was chosen."""
    candidates: int = 32
    """search and pool: random noises per target."""
    pool_matching: Literal["one_to_one", "nearest"] = "one_to_one"
    """pool: no noise serves twice and the sum of losses is the smallest, or each target takes its
    nearest."""
    pool_window: int = 1024
    """pool: targets, in the order of the data, that share their noises where their prompts are the
    same; bounds the memory."""
    pool_reject_below: float = 0.0
    """pool: drop noises that are nearer than this loss to any target (RS-IMLE)."""
    steps: int = 40
    """Gradient steps per target."""
    lr: float | Literal["auto"] = "auto"
    """Step size in radians by which a step turns the noise; auto: found for every target while it
    is searched."""
    max_angle: float | None = None
    """Keep the noise within so many radians of its base noise; uncorrelated noises are pi/2 apart.
    For rotations, the RMS of the angles by which they turn."""
    shift_weight: float = 0.0
    """Weight of what the noises of a batch have in common: their mean, squared, in standard errors,
    less the 1 that chance gives."""
    sphere_optimizer: Literal["lbfgs", "adam"] = "lbfgs"
    """sphere and white: L-BFGS, whose steps are at most lr long, or Adam."""
    rotation_optimizer: Literal["riemannian", "raw_adam"] = "riemannian"
    """rotation: Adam on the rotations themselves, or on a matrix whose exponential they are."""
    patch_size: int = 2
    """rotation: side of the rotated patches in latent pixels; it divides the latent."""
    rotation_groups: int = 1
    """rotation: G; the latent is cut into G x G tiles with a rotation each."""
    latent_loss_weight: float = 1.0
    """Weight of the mean squared error between the latents."""
    pixel_l1_weight: float = 0.0
    """Weight of the mean absolute error between the images ([0, 1] RGB); 0 never decodes."""
    feature_weight: float = 0.0
    """Weight of the mean squared error between the images' --features; decodes."""
    features: str | None = None
    """python:module.function: a differentiable function of yours, from images [B, 3, H, W] in
    [0, 1] RGB, on the generator's device, to features [B, ...]."""
    drift_reg_weight: float = 0.0
    """Weight of the mean squared distance between the noise and its base noise."""

    prior_weight: float = 0.0
    """Weight of the negative log density of the noise's norm, see noise_prior.py. All methods here
    keep the norm: this shows in the loss, but does not change the search."""
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
    def decodes(self) -> bool:
        """Whether a loss needs images."""
        return self.pixel_l1_weight > 0 or self.feature_weight > 0

    @property
    def choice(self) -> str | None:
        """How random noises are chosen first: search, pool or None."""
        first = self.assign_method.split("+")[0]
        return first if first in ("search", "pool") else None

    @property
    def gradient_method(self) -> str | None:
        """How gradients move the noise then: rotation, sphere, white or None."""
        last = self.assign_method.split("+")[-1]
        return None if last in ("search", "pool") else last

    @property
    def gradient_steps(self) -> int:
        """Steps of the gradient method, 0 without one."""
        return 0 if self.gradient_method is None else self.steps

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
        require(
            self.lr == "auto" or 0 < self.lr < math.inf,
            f"lr is {self.lr}; give a positive number or auto",
        )
        require(self.candidates >= 1, f"candidates is {self.candidates}; give at least 1")
        require(self.pool_window >= 1, f"pool_window is {self.pool_window}; give at least 1")
        require(
            self.max_angle is None or self.max_angle > 0,
            f"max_angle is {self.max_angle}; give radians above 0",
        )
        require(
            not (self.shift_weight and self.stops_early),
            "shift_weight needs targets that are searched together to the end; leave out "
            "stop_loss and stop_patience",
        )
        distances = ("latent_loss", "pixel_l1", "feature")
        penalties = ("drift_reg", "prior", "moment", "covariance", "shift")
        weights = {name: getattr(self, f"{name}_weight") for name in (*distances, *penalties)}
        require(
            all(0 <= weight < math.inf for weight in weights.values()),
            "loss weights must be finite and not negative",
        )
        require(
            any(weights[name] for name in distances),
            "latent_loss_weight, pixel_l1_weight and feature_weight are 0; there is nothing to "
            "match",
        )
        require(
            (self.features is None) == (self.feature_weight == 0),
            "give --features python:module.function and a --feature_weight above 0 together",
        )
        if self.features is not None:
            feature_function(self.features)
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
    target_features: Tensor | None = None,
) -> Tensor:
    """Distance between what the generator makes of ``z`` and the target, per image.

    Args:
        generator: The generator.
        z: Noise, [B, C, h, w].
        prompts: Encoding of B prompts.
        target_latents: [B, C, h, w].
        target_images: [B, 3, H, W] in [0, 1]; needed only with a pixel loss.
        options: Weights.
        target_features: [B, F]; needed only with a feature loss.

    Returns:
        [B] float32, differentiable.
    """
    eps_hat, x = generator.predict(z, prompts)
    sigma = generator.step.sigma
    loss = options.latent_loss_weight * ops.latent_mse(eps_hat, x, target_latents, sigma)
    if not options.decodes:
        return loss
    raw = generator.decode_raw(x - sigma * eps_hat)
    if options.pixel_l1_weight:
        assert target_images is not None
        loss = loss + options.pixel_l1_weight * ops.pixel_l1(raw, target_images)
    if options.features is not None:
        assert target_features is not None
        images = (raw / 2 + 0.5).clamp(0, 1)
        distance = feature_mse(images, target_features, options.features)
        loss = loss + options.feature_weight * distance
    return loss


def objective(
    generator: OneStepGenerator, options: AssignOptions, z: Tensor, problem: Problem
) -> Tensor:
    """What the search lowers: the distance to the target and the weighted penalties, [B]."""
    loss = matching_loss(
        generator, z, problem.prompts, problem.latents, problem.images, options, problem.features
    )
    if options.drift_reg_weight:
        loss = loss + options.drift_reg_weight * (z - problem.eps).square().mean((1, 2, 3))
    for weight, penalty in (
        (options.prior_weight, noise_prior.norm_penalty),
        (options.moment_weight, noise_prior.moment_penalty),
        (options.covariance_weight, noise_prior.covariance_penalty),
    ):
        if weight:
            loss = loss + weight * penalty(z)
    if options.shift_weight:
        shift = len(z) * z.mean(0).square().mean()
        loss = loss + options.shift_weight * (shift - 1).clamp_min(0)
    return loss


def assign_batch(
    generator: OneStepGenerator,
    eps: Tensor,
    prompts: PromptEncoding,
    target_latents: Tensor,
    target_images: Tensor | None,
    options: AssignOptions,
    on_step: Callable[[Tensor], None] = lambda loss: None,
    target_features: Tensor | None = None,
) -> Assignment:
    """Move base noises towards their targets by gradients; nothing here waits for the device.

    All targets take as many steps as the slowest; solving.py gives the places of those that end
    early to others.

    Args:
        generator: Its weights stay fixed.
        eps: Base noise, [B, C, h, w] float32, N(0, 1).
        prompts: Encoding of B prompts.
        target_latents: [B, C, h, w] float32.
        target_images: [B, 3, H, W] float32 in [0, 1]; None without a pixel loss.
        options: Gradient method, steps, step size, weights; no noise is chosen here.
        on_step: Called with the losses [B] after each evaluation.
        target_features: [B, F] float32; None without a feature loss.

    Returns:
        The best noise found for every target.
    """
    problem = Problem(eps, prompts, target_latents, target_images, target_features)
    search = Search(problem, options, functools.partial(objective, generator, options))
    for step in range(options.gradient_steps + 1):
        on_step(search.advance(is_last=step == options.gradient_steps))
    return search.result()
