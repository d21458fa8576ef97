"""What a training on preferences will need; writes nothing."""

from typing import Any

import torch

from oneshot_fast.data.sizes import Resolution, size_of
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.jobs.prefer.options import PreferOptions
from oneshot_fast.jobs.training_plan import Kind, blank_rows, training_plan
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.losses.base import Loss
from oneshot_fast.training.reference import Reference


def prefer_plan(
    generator: Generator,
    options: PreferOptions,
    *,
    resolution: Resolution,
    samples: int,
    offload_encoders: bool | None = None,
    pairs: bool = False,
) -> Plan:
    """As ``training_plan``, of a training on ``samples`` groups, or given ``pairs``, an epoch.

    The base generator's passes are in time and memory; drawing and scoring images, which need no
    gradient, and features are not.
    """
    size = options.drawn(generator.latent_shape(*size_of(resolution)))
    several = isinstance(generator, FewStepGenerator)

    def loss(model: Generator, _: WeightedRewards | None) -> Loss:
        found = options.pair_loss(several) if pairs else options.loss(size, several=several)
        # in a plan the adapter is there or not, and a second denoiser's weights are counted apart
        found.reference = Reference(model, adapts=True)
        return found

    unit = "pairs" if pairs else "groups"
    plan = training_plan(
        generator,
        options,
        Kind(loss, lambda model: _batch(model, options, resolution, pairs), True, unit),
        resolution=resolution,
        samples=samples,
        offload_encoders=offload_encoders,
    )
    base = "the base generator: the same weights with the adapter off, nothing more"
    if not options.lora_rank:
        count = sum(p.nbytes for p in generator.denoiser.parameters())
        base = f"the base generator: a second denoiser of {count / 1e6:.1f} MB, not counted above"
    drawn = f"not counted: drawing and scoring images, {options.group} in each group"
    return Plan([*plan.lines, base, *([] if pairs else [drawn])], plan.seconds)


def _batch(
    generator: Generator, options: PreferOptions, resolution: Resolution, pairs: bool
) -> Batch:
    count, group, noises = options.batch_size, options.group, options.noises
    if pairs:
        group, noises = 2, 2 if options.pair_noise == "assigned" else 1
    noise = torch.zeros(count, noises, *generator.noise_shape(*size_of(resolution)))
    latents = torch.zeros(count, group, *generator.latent_shape(*size_of(resolution)))
    extra: dict[str, Any] = {"rewards": torch.zeros(count, group), "ties": torch.zeros(count)}
    extra |= {"candidates": latents, "old": latents[:, : options.noises], "actions": latents}
    if isinstance(generator, FewStepGenerator):
        steps = generator.steps(latents.shape[2:])
        extra["samples"] = latents[:, :, None].expand(-1, -1, len(steps) + 1, -1, -1, -1)
        extra["scales"] = torch.ones(count, sum(step.noise > 0 for step in steps))
    if pairs:
        last = len(steps) - 1 if isinstance(generator, FewStepGenerator) else 0
        extra = {"targets": latents, "weight": torch.ones(count), "noised": latents}
        extra |= {"step": [last] * count, "root": torch.ones(count)}
    elif options.drawing == "pairs":
        extra |= {"preference": torch.zeros(count, group // 2), "pairs": torch.ones(count)}
    elif options.drawing == "actions":
        del extra["old"]
    batch = Batch(preference=Rows(noise, generator.blank_prompts(count), extra))
    if options.preserves:
        held = options.preserve_batch_size or count
        batch["preserve"] = blank_rows(generator, resolution, held)
    return batch
