"""What a training on pairs, or on rewards, will need; writes nothing."""

from typing import Any

import torch

from oneshot_fast.data.sizes import Resolution, size_of
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.training_plan import Kind, blank_rows, memory_of, training_plan
from oneshot_fast.planning.memory import StepMemory
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.training.batch import Batch

ByReward = tuple[WeightedRewards, str]  # and an example of a prompt


def sft_plan(
    generator: Generator,
    options: SftOptions,
    *,
    resolution: Resolution,
    samples: int,
    offload_encoders: bool | None = None,
    by_reward: ByReward | None = None,
) -> Plan:
    """As ``training_plan``, of a training on ``samples`` pairs or images."""
    return training_plan(
        generator,
        options,
        _kind(options, resolution, by_reward),
        resolution=resolution,
        samples=samples,
        offload_encoders=offload_encoders,
    )


def training_memory(
    generator: Generator,
    options: SftOptions,
    resolution: Resolution,
    offloads: bool = False,
    by_reward: ByReward | None = None,
) -> StepMemory:
    """As ``memory_of``."""
    return memory_of(generator, options, _kind(options, resolution, by_reward), offloads)


def training_batch(
    generator: Generator,
    options: SftOptions,
    resolution: Resolution,
    by_reward: ByReward | None = None,
) -> Batch:
    """A batch of zeros, of the training's sizes."""
    n, extra = options.batch_size, dict[str, Any]()
    if options.pixel_l1_weight:
        extra["images"] = torch.zeros(n, 3, *size_of(resolution))
    if by_reward is not None:
        extra["texts"] = [by_reward[1]] * n
    batch = Batch(matching=blank_rows(generator, resolution, n, **extra))
    if options.preserves:
        count = options.preserve_batch_size or n
        batch["preserve"] = blank_rows(generator, resolution, count)
    return batch


def _kind(options: SftOptions, resolution: Resolution, by_reward: ByReward | None) -> Kind:
    rewards, prompt = by_reward or (None, "")
    return Kind(
        lambda _, found: options.loss(found),
        lambda generator: training_batch(generator, options, resolution, by_reward),
        options.decodes or rewards is not None,
        "pairs" if rewards is None else "images",
        rewards,
        prompt,
    )
