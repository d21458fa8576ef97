"""Matching one batch: the noise, near each base noise, that lands closest to its target.

How a noise may move is in search/movers. Many targets are solved at once, each on its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.generators.base import unit_rgb
from oneshot_fast.jobs.assign.features import feature_mse
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.noise.prior import norm_penalty
from oneshot_fast.search.gradient import Assignment, Problem, Search

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Conditioning, Generator


def matching_loss(
    generator: Generator,
    z: Tensor,
    prompts: Conditioning,
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
    made = generator.predict(z, prompts)
    mse = ops.latent_mse(made.output, made.x, target_latents, made.sigma)
    loss = options.latent_loss_weight * mse
    if not options.decodes:
        return loss
    raw = generator.decode_raw(made.latents)
    if options.pixel_l1_weight:
        assert target_images is not None
        loss = loss + options.pixel_l1_weight * ops.pixel_l1(raw, target_images)
    if options.features is not None:
        assert target_features is not None
        distance = feature_mse(unit_rgb(raw), target_features, options.features)
        loss = loss + options.feature_weight * distance
    return loss


def objective(generator: Generator, options: AssignOptions, z: Tensor, problem: Problem) -> Tensor:
    """What the search lowers: the distance to the target and the weighted penalties, [B]."""
    loss = matching_loss(
        generator, z, problem.prompts, problem.latents, problem.images, options, problem.features
    )
    if options.noise_l2_weight:
        loss = loss + options.noise_l2_weight * (z - problem.eps).square().mean((1, 2, 3))
    if options.norm_weight:
        loss = loss + options.norm_weight * norm_penalty(z)
    return loss


def assign_batch(
    generator: Generator,
    eps: Tensor,
    prompts: Conditioning,
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
