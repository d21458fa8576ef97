"""What an assignment will need, from a few timed steps; writes nothing."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oneshot_fast.matching import AssignOptions, objective
from oneshot_fast.search import Problem, Search

if TYPE_CHECKING:
    from oneshot_fast.generator import OneStepGenerator

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_TIMED = 3
_ROW, _PER_LOSS, _PER_PIXEL = 600, 21, 2  # bytes of JSON, twice on disk, and of PNG: about


def assign_plan(
    generator: OneStepGenerator,
    options: AssignOptions,
    *,
    resolution: int,
    batch_size: int,
    samples: int | None,
    num_images: int,
) -> str:
    """Parameters, memory by part, disk and time of an assignment, as lines of text.

    Steps are timed, and activations counted, on random targets of the full batch size, without
    the time for reading data.

    Args:
        generator: The generator.
        options: How a noise is searched.
        resolution: Image side in pixels.
        batch_size: Targets solved at once.
        samples: Targets; None if not known.
        num_images: Targets whose pictures are saved; -1 for all.
    """
    count = batch_size if samples is None else min(batch_size, samples)
    search = _random_search(generator, options, resolution, count)
    lines, memory = [], {}
    for part in _PARTS:
        tensors = [*getattr(generator.pipe, part).parameters()]
        lines.append(f"parameters of {part}: {sum(t.numel() for t in tensors) / 1e6:.1f} million")
        memory[f"weights of {part}"] = sum(tensor.nbytes for tensor in tensors)
    memory["noises, rotations, targets"] = search.bytes
    memory["activations"] = _activations(generator, search)
    lines += [f"memory, {name}: {_size(value)}" for name, value in memory.items()]
    lines.append(f"memory, sum for {count} targets at once: {_size(sum(memory.values()))}")
    if generator.device.type == "cuda":
        lines.append(f"memory, measured peak: {_size(torch.cuda.max_memory_allocated())}")
    lines += _outlook(search, options, resolution, count, samples, num_images)
    return "\n".join(lines)


def _outlook(
    search: Search,
    options: AssignOptions,
    resolution: int,
    count: int,
    samples: int | None,
    num_images: int,
) -> list[str]:
    """Lines on disk and time."""
    each = search.shard_bytes // count + 2 * (_ROW + _PER_LOSS * (options.steps + 1))
    pictures = 3 * _PER_PIXEL * resolution**2
    seconds = _step_seconds(search)
    per_target = seconds * (options.steps + 1) / count
    lines = [
        f"disk: {_size(each)} per target, {_size(pictures)} more with pictures",
        f"time: {seconds:.3f} s per step, {1 / per_target:.2f} images/s",
    ]
    if samples is not None:
        shown = samples if num_images < 0 else min(num_images, samples)
        disk, hours = each * samples + pictures * shown, per_target * samples / 3600
        note = " at most, as targets stop early" if options.stops_early else ""
        lines.append(f"in all, for {samples} targets: {_size(disk)} on disk, {hours:.2f} h{note}")
    return lines


def _random_search(
    generator: OneStepGenerator, options: AssignOptions, resolution: int, count: int
) -> Search:
    eps = torch.randn(count, *generator.latent_shape(resolution, resolution))
    eps = eps.to(generator.device)
    images = None
    if options.pixel_l1_weight:
        images = torch.rand(count, 3, resolution, resolution).to(generator.device)
    problem = Problem(eps, generator.encode_prompts([""] * count), eps.clone(), images)
    return Search(problem, options, functools.partial(objective, generator, options))


def _step_seconds(search: Search) -> float:
    """Shortest of a few steps, each to its end on the device."""
    found = []
    for _ in range(_TIMED):
        started = time.perf_counter()
        search.advance().cpu()
        found.append(time.perf_counter() - started)
    return min(found)


def _activations(generator: OneStepGenerator, search: Search) -> int:
    """Bytes that one step keeps for its backward pass, weights not counted."""
    modules = [getattr(generator.pipe, part) for part in _PARTS]
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        search.advance()
    return sum(size for place, size in kept.items() if place not in weights)


def _size(value: int) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.3f} MB"
