"""What a noise optimisation will need: memory by part, from tensors without data, and time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from oneshot_fast.jobs.optimize.search import RewardSearch
from oneshot_fast.planning import memory
from oneshot_fast.planning.timing import Plan, shortest
from oneshot_fast.rewards import ImageEncoder
from oneshot_fast.runtime.units import duration
from oneshot_fast.search.samples import Sample


def search_memory(search: RewardSearch, sample: Sample, batch_size: int) -> memory.StepMemory:
    """Memory of a step of ``batch_size`` images, from its passes on fake tensors.

    What an allocator wastes and what libraries of the device take for themselves is not in it.
    """
    size, prompts = search.size, [sample.prompt] * batch_size
    differentiates = search.options.gradient_steps > 0
    with memory.fake_copy(search.generator) as generator:
        rewards = memory.fake_rewards(search.rewards, sample.prompt, generator)
        networks = generator.networks | rewards.by_name
        z = torch.zeros(batch_size, *generator.noise_shape(*size))
        encoding = generator.blank_prompts(batch_size)
        z.requires_grad_(differentiates)
        activations: dict[str, int] = {}
        embeddings: dict[ImageEncoder, Tensor] = {}
        with (
            memory.LiveMemory(memory.tensors_of(networks)) as live,
            torch.set_grad_enabled(differentiates),
        ):
            latents = generator.latents(z, encoding)
            denoised = activations[next(iter(networks))] = live.live
            images = generator.images(latents)
            activations["decoder"] = live.live - denoised
            total = torch.zeros(batch_size)
            for name, reward in rewards.by_name.items():
                before = live.live
                score = rewards.score(reward, images, prompts, embeddings)
                total = total + rewards.weights[name] * score
                activations[f"reward {name}"] = live.live - before
            if differentiates:
                total.sum().backward()
        pictures = (
            2 * 3 * batch_size * math.prod(size)
        )  # best images and those of the first step, uint8
        return memory.StepMemory(
            memory.weights_by_part(networks),
            {"noises, moments, best images": 8 * z.nbytes + pictures},
            {f"activations of {part}": size for part, size in activations.items()},
            live.peak,
        )


def optimize_plan(search: RewardSearch, samples: Sequence[Sample], batch_size: int) -> Plan:
    """Memory by part and time, the latter from a few timed steps."""
    count = min(batch_size, len(samples))
    lines = search_memory(search, samples[0], count).lines(f"{count} images")
    seconds = _seconds(search, samples[:count])
    lines += memory.peak_lines(search.generator.device)
    options = search.options
    evaluations = options.gradient_steps + 1 if options.gradient_steps else 0
    forwards = options.draws if options.choice else 0
    # a candidate needs no backward pass, which costs about twice a forward one
    whole = seconds * (evaluations + forwards / (3 if evaluations else 1)) * len(samples) / count
    lines.append(f"time: {duration(seconds)} per step of {count} images")
    lines.append(f"in all, for {len(samples)} images: {duration(whole)}")
    return Plan(lines, whole)


def _seconds(search: RewardSearch, samples: Sequence[Sample]) -> float:
    """Of an evaluation of ``samples``, with its backward pass if the method has one."""
    searching = search.start(samples)
    return shortest(lambda: searching.advance().cpu())


def fitting_batch_size(search: RewardSearch, sample: Sample) -> int:
    """Largest power of two of images that fits on the GPU; 16 on the CPU."""
    return memory.fitting_batch_size(
        search.generator.device, lambda size: _seconds(search, [sample] * size)
    )
