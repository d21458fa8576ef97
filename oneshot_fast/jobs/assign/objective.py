"""How far what the generator makes of a noise is from its target."""

from collections.abc import Mapping

from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.generators.base import Conditioning, Generator, unit_rgb
from oneshot_fast.jobs.assign.features import feature_mse
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.search.problem import Evaluation, Problem, penalised


def matching_loss(
    generator: Generator,
    z: Tensor,
    prompts: Conditioning,
    target: Mapping[str, Tensor],
    options: AssignOptions,
) -> Tensor:
    """Distance between what the generator makes of ``z`` and the target, per image.

    Args:
        generator: The generator.
        z: Noise, [B, C, h, w].
        prompts: Encoding of B prompts.
        target: "latents" [B, C, h, w]; with a pixel loss "images" [B, 3, H, W] in [0, 1], with a
            feature loss "features" [B, F].
        options: Weights.

    Returns:
        [B] float32, differentiable.
    """
    made = generator.predict(z, prompts)
    mse = ops.latent_mse(made.output, made.x, target["latents"], made.sigma)
    loss = options.latent_loss_weight * mse
    if not options.decodes:
        return loss
    raw = generator.decode_raw(made.latents)
    if options.pixel_l1_weight:
        loss = loss + options.pixel_l1_weight * ops.pixel_l1(raw, target["images"])
    if options.features is not None:
        distance = feature_mse(unit_rgb(raw), target["features"], options.features)
        loss = loss + options.feature_weight * distance
    return loss


class MatchingObjective:
    """What an assignment lowers: the distance to the target and the weighted penalties."""

    def __init__(self, generator: Generator, options: AssignOptions) -> None:
        """Bind the generator, whose weights stay fixed, and the weights of the parts."""
        self._generator, self._options = generator, options

    def __call__(self, z: Tensor, problem: Problem) -> Evaluation:
        """Losses of noises ``z`` [B, C, h, w]; the targets are as for ``matching_loss``."""
        args = (self._generator, z, problem.conditioning, problem.target, self._options)
        return Evaluation(penalised(matching_loss(*args), z, problem.eps, self._options))
