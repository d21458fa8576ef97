"""What a noise optimisation will need: memory by part, from tensors without data, and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oneshot_fast.planning.batch_size import largest_fit
from oneshot_fast.planning.memory import (
    LiveMemory,
    fake_copy,
    fake_rewards,
    tensors_of,
    weights_by_part,
)
from oneshot_fast.planning.timing import shortest
from oneshot_fast.runtime.units import size_text

if TYPE_CHECKING:
    from oneshot_fast.jobs.optimize.search import RewardSearch, Sample
    from oneshot_fast.rewards import ImageEncoder


@dataclass(frozen=True)
class SearchMemory:
    """Bytes by part.

    Attributes:
        weights: Of each network of the pipeline, and of each reward.
        state: Noises, moments and best images.
        activations: What UNet, decoder and each reward keep for the backward pass.
        step: Most that a step holds at once beside weights and state.
    """

    weights: dict[str, int]
    state: int
    activations: dict[str, int]
    step: int

    @property
    def peak(self) -> int:
        """Everything at once."""
        return sum(self.weights.values()) + self.state + self.step


def search_memory(search: RewardSearch, sample: Sample, batch_size: int) -> SearchMemory:
    """Memory of a step, from its forward and backward pass on fake tensors.

    What an allocator wastes and what libraries of the device take for themselves is not in it.

    Args:
        search: Generator, rewards and options; they are not changed.
        sample: An example.
        batch_size: Images at once.
    """
    side, prompts = search.side, [sample.prompt] * batch_size
    differentiates = search.options.gradient_steps > 0
    with fake_copy(search.generator) as generator:
        rewards = fake_rewards(search.rewards, sample.prompt, generator)
        networks = generator.networks | rewards.by_name
        z = torch.zeros(batch_size, *generator.noise_shape(side, side))
        encoding = generator.blank_prompts(batch_size)
        z.requires_grad_(differentiates)
        activations: dict[str, int] = {}
        embeddings: dict[ImageEncoder, Tensor] = {}
        with LiveMemory(tensors_of(networks)) as memory, torch.set_grad_enabled(differentiates):
            latents = generator.latents(z, encoding)
            activations["unet"] = memory.live
            images = generator.images(latents)
            activations["decoder"] = memory.live - activations["unet"]
            total = torch.zeros(batch_size)
            for name, reward in rewards.by_name.items():
                before = memory.live
                score = rewards.score(reward, images, prompts, embeddings)
                total = total + rewards.weights[name] * score
                activations[f"reward {name}"] = memory.live - before
            if differentiates:
                total.sum().backward()
        pictures = 2 * 3 * batch_size * side**2  # best images and those of the first step, uint8
        return SearchMemory(
            weights_by_part(networks),
            8 * z.nbytes + pictures,
            activations,
            memory.peak,
        )


def optimize_plan(search: RewardSearch, samples: Sequence[Sample], batch_size: int) -> list[str]:
    """Lines on memory by part and on time, the latter from a few timed steps.

    Args:
        search: Generator, rewards and options.
        samples: What would be made.
        batch_size: Images at once.
    """
    count = min(batch_size, len(samples))
    memory = search_memory(search, samples[0], count)
    lines = [f"memory, weights of {k}: {size_text(v)}" for k, v in memory.weights.items()]
    lines.append(f"memory, noises, moments, best images: {size_text(memory.state)}")
    lines += [f"memory, activations of {k}: {size_text(v)}" for k, v in memory.activations.items()]
    lines.append(f"memory, most that a step holds at once: {size_text(memory.step)}")
    lines.append(f"memory, peak for {count} images at once: {size_text(memory.peak)}")
    seconds = _seconds(search, samples[:count])
    options = search.options
    evaluations = options.gradient_steps + 1 if options.gradient_steps else 0
    forwards = options.draws if options.draws > 1 or not evaluations else 0
    # a candidate needs no backward pass, which costs about twice a forward one
    whole = seconds * (evaluations + forwards / (3 if evaluations else 1)) * len(samples) / count
    lines.append(f"time: {seconds:.3f} s per step of {count} images")
    lines.append(f"in all, for {len(samples)} images: {whole / 3600:.2f} h")
    return lines


def _seconds(search: RewardSearch, samples: Sequence[Sample]) -> float:
    """Of an evaluation of ``samples``, with its backward pass if the method has one."""
    problem, objective = search.problem(samples), search.objective(samples)
    if search.options.gradient_steps:
        searching = search.start(problem, objective)
        return shortest(lambda: searching.advance().cpu())
    with torch.no_grad():
        return shortest(lambda: objective(problem.eps, problem).cpu())


def largest_batch(search: RewardSearch, sample: Sample) -> int:
    """Largest power of two of images that fits on the GPU."""

    def use(size: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.compiler.set_stance("force_eager"):
            _seconds(search, [sample] * size)
        return torch.cuda.max_memory_allocated() - before

    def free() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    return largest_fit(use, free)
