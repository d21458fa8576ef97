"""How far what the generator makes of a noise is from its target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.generators.base import unit_rgb
from oneshot_fast.jobs.assign.features import feature_mse
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.noise.prior import norm_penalty
from oneshot_fast.search.problem import Evaluation, Problem

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


class MatchingObjective:
    """What an assignment lowers: the distance to the target and the weighted penalties."""

    def __init__(self, generator: Generator, options: AssignOptions) -> None:
        """Bind the generator, whose weights stay fixed, and the weights of the parts."""
        self._generator, self._options = generator, options

    def __call__(self, z: Tensor, problem: Problem) -> Evaluation:
        """Losses of noises ``z`` [B, C, h, w]; the targets are latents, images and features."""
        options, target = self._options, problem.target
        loss = matching_loss(
            self._generator,
            z,
            problem.conditioning,
            target["latents"],
            target.get("images"),
            options,
            target.get("features"),
        )
        if options.noise_l2_weight:
            loss = loss + options.noise_l2_weight * (z - problem.eps).square().mean((1, 2, 3))
        if options.norm_weight:
            loss = loss + options.norm_weight * norm_penalty(z)
        return Evaluation(loss)
