"""What an assignment or a training will need, from a few timed steps; writes nothing."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from oneshot_fast.jobs.assign.objective import objective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.targets import random_problem
from oneshot_fast.jobs.optimize.objective import reward_losses
from oneshot_fast.planning.memory import StepMemory, training_batch, training_memory
from oneshot_fast.runtime.units import count_text, duration, size_text
from oneshot_fast.search.gradient import Search
from oneshot_fast.training.batch import SftOptions, sft_losses
from oneshot_fast.training.memory import checkpoint_activations
from oneshot_fast.training.offloading import offloads_by_default

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator
    from oneshot_fast.planning.memory import ByReward

_TIMED = 3
_ROW, _PER_LOSS, _PER_PIXEL = 600, 21, 2  # bytes of JSON, twice on disk, and of PNG: about


@dataclass(frozen=True)
class Plan:
    """What a command will need.

    Attributes:
        lines: For a person.
        seconds: For all of it; None where the number of samples is not known.
    """

    lines: list[str]
    seconds: float | None

    def __str__(self) -> str:
        """The lines, as printed."""
        return "\n".join(self.lines)


def assign_plan(
    generator: Generator,
    options: AssignOptions,
    *,
    resolution: int,
    batch_size: int,
    samples: int | None,
    num_images: int,
) -> Plan:
    """Parameters, memory by part, disk and time of an assignment.

    Steps are timed, and activations counted, on random targets of the full batch size, without
    the time for reading data.

    Args:
        generator: The generator.
        options: How a noise is searched.
        resolution: Image side in pixels.
        batch_size: TargetImages solved at once.
        samples: Targets; None if not known.
        num_images: TargetImages whose pictures are saved; -1 for all.
    """
    count = batch_size if samples is None else min(batch_size, samples)
    problem = random_problem(generator, options, resolution, count)
    search = Search(problem, options, functools.partial(objective, generator, options))
    lines, memory = [], {}
    for part, network in generator.networks.items():
        tensors = [*network.parameters()]
        lines.append(f"parameters of {part}: {count_text(sum(t.numel() for t in tensors))}")
        memory[f"weights of {part}"] = sum(tensor.nbytes for tensor in tensors)
    memory["noises, rotations, targets"] = search.bytes
    memory["activations"] = _activations(generator, search)
    lines += [f"memory, {name}: {size_text(value)}" for name, value in memory.items()]
    lines.append(f"memory, sum for {count} targets at once: {size_text(sum(memory.values()))}")
    if generator.device.type == "cuda":
        lines.append(f"memory, measured peak: {size_text(_device_peak())}")
    per_target = shortest(lambda: search.advance().cpu()) * _step_worths(options) / count
    lines += _outlook(search, options, resolution, count, samples, num_images, per_target)
    return Plan(lines, None if samples is None else per_target * samples)


def sft_plan(
    generator: Generator,
    options: SftOptions,
    *,
    resolution: int,
    samples: int,
    offload_encoders: bool | None = None,
    by_reward: ByReward | None = None,
) -> Plan:
    """Parameters, memory by part, disk and time of a training.

    Memory is found on tensors without data, time from forward and backward passes on random data
    that keep no gradient: the weights stay as they are.

    Args:
        generator: The generator.
        options: How it is trained.
        resolution: Image side in pixels.
        samples: Matched pairs, or images of an epoch.
        offload_encoders: Whether what only encodes is off the device; by default on a GPU.
        by_reward: What a training on rewards raises.
    """
    offloads = offload_encoders
    if offloads is None:
        offloads = offloads_by_default(generator)
    memory = training_memory(generator, options, resolution, offloads, by_reward)
    lines = []
    for part, network in generator.networks.items():
        count = sum(p.numel() for p in network.parameters())
        lines.append(f"parameters of {part}: {count_text(count)}")
    lines.append(f"trained parameters: {count_text(memory.trained)}")
    lines += _memory_lines(memory)
    seconds = _training_seconds(generator, options, resolution, by_reward)
    kind = "images" if by_reward else "pairs"
    if generator.device.type == "cuda":
        lines.append(f"memory, measured without optimiser: {size_text(_device_peak())}")
    per_epoch = math.ceil(samples / options.batch_size)
    steps = per_epoch * options.epochs
    pipeline = sum(_bytes(network) for network in generator.networks.values())
    checkpoints = 2 * memory.trained_bytes + pipeline if options.lora_rank else 2 * pipeline
    best = memory.average or memory.trained_bytes
    state = memory.trained_bytes + memory.moments + memory.average + best
    latent = 4 * math.prod(generator.latent_shape(resolution, resolution))
    pool = latent * options.preserve_pool_size if options.preserves else 0
    lines += [
        f"disk: {size_text(checkpoints)} for the checkpoints, {size_text(state)} for the training "
        f"state (twice that while it is replaced), {size_text(pool)} for the preserve pool",
        f"time: {duration(seconds)} per step of {options.batch_size} {kind}, optimiser not counted",
        f"in all, for {samples} {kind} and {steps} steps: {duration(seconds * steps)}",
    ]
    return Plan(lines, seconds * steps)


def _memory_lines(memory: StepMemory) -> list[str]:
    parts = {f"weights of {part}": size for part, size in memory.weights.items()}
    parts |= {
        "optimiser's moments": memory.moments,
        "average of the weights": memory.average,
        "gradients": memory.gradients,
        "activations": memory.activations,
        "gradients, activations and temporary tensors at once": memory.step,
        "peak of a step": memory.peak,
    }
    return [f"memory, {name}: {size_text(size)}" for name, size in parts.items()]


def _training_seconds(
    generator: Generator,
    options: SftOptions,
    resolution: int,
    by_reward: ByReward | None = None,
) -> float:
    """Shortest of a few forward and backward passes of a whole batch."""
    unet, rank = generator.denoiser, options.lora_rank
    losses = functools.partial(reward_losses, by_reward[0]) if by_reward else sft_losses
    with torch.device(generator.device):
        batch = training_batch(generator, options, resolution, by_reward)
    batch.noise.requires_grad_(bool(rank))
    unet.requires_grad_(not rank)
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in unet.parameters()
        if p.requires_grad
    ]
    checkpoint_activations(unet, options)

    def run() -> None:
        loss = torch.zeros(())
        for part, pairs, others in batch.split(options.gradient_accumulation_steps):
            match, keep = losses(generator, part, options)
            loss = match * pairs + keep * others
            loss.backward()
        loss.detach().cpu()

    try:
        return shortest(run)
    finally:
        for hook in hooks:
            hook.remove()
        unet.disable_gradient_checkpointing()
        unet.requires_grad_(False)


def _device_peak() -> int:
    return torch.cuda.max_memory_allocated()


def _step_worths(options: AssignOptions) -> float:
    """Work per target in gradient steps; a candidate's forward pass is about a third of one."""
    candidates = options.draws if options.choice else 0
    return options.gradient_steps + 1 + candidates / 3


def _outlook(
    search: Search,
    options: AssignOptions,
    resolution: int,
    count: int,
    samples: int | None,
    num_images: int,
    per_target: float,
) -> list[str]:
    """Lines on disk and time."""
    each = search.shard_bytes // count + 2 * (_ROW + _PER_LOSS * (options.gradient_steps + 1))
    pictures = 3 * _PER_PIXEL * resolution**2
    seconds = per_target * count / _step_worths(options)
    lines = [
        f"disk: {size_text(each)} per target, {size_text(pictures)} more with pictures",
        f"time: {duration(seconds)} per step, {1 / per_target:.2f} images/s",
    ]
    if samples is not None:
        shown = samples if num_images < 0 else min(num_images, samples)
        disk, time_needed = each * samples + pictures * shown, duration(per_target * samples)
        note = " at most, as targets stop early" if options.stops_early else ""
        lines.append(
            f"in all, for {samples} targets: {size_text(disk)} on disk, {time_needed}{note}"
        )
    return lines


def shortest(run: Callable[[], object]) -> float:
    """Seconds of the shortest of a few runs, each to its end on the device."""
    found = []
    for _ in range(_TIMED):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


def _activations(generator: Generator, search: Search) -> int:
    """Bytes that one step keeps for its backward pass, weights not counted."""
    networks = generator.networks.values()
    weights = {p.untyped_storage().data_ptr() for network in networks for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        search.advance()
    return sum(size for place, size in kept.items() if place not in weights)


def _bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())
