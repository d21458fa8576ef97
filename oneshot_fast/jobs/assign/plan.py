"""What an assignment will need, from a few timed steps; writes nothing."""

import dataclasses
import math

import torch

from oneshot_fast.data.sizes import Resolution, size_of
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.assign.objective import MatchingObjective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.targets import random_problem
from oneshot_fast.planning import memory
from oneshot_fast.planning.memory import LiveMemory, StepMemory, fake_copy, tensors_of
from oneshot_fast.planning.timing import Plan, shortest
from oneshot_fast.runtime.units import duration, size_text
from oneshot_fast.search.gradient import Search

_ROW, _PER_LOSS, _PER_PIXEL = 600, 21, 2  # bytes of JSON, twice on disk, and of PNG: about


def assign_plan(
    generator: Generator,
    options: AssignOptions,
    *,
    resolution: Resolution,
    batch_size: int,
    samples: int | None,
    num_images: int,
) -> Plan:
    """Parameters, memory by part, disk and time of an assignment.

    Memory is found on tensors without data, time from steps on random targets of the full batch
    size, without the time for reading data. ``samples`` is None if not known, ``num_images`` -1 for
    all.
    """
    count = batch_size if samples is None else min(batch_size, samples)
    needed = assignment_memory(generator, options, resolution, count)
    lines = [*memory.parameter_lines(generator.networks), *needed.lines(f"{count} targets")]
    search = _search(generator, options, resolution, count)
    seconds = shortest(lambda: search.advance().cpu())
    lines += memory.peak_lines(generator.device)
    per_target = seconds * _step_worths(options) / count
    each = search.shard_bytes // count + 2 * (_ROW + _PER_LOSS * (options.gradient_steps + 1))
    pictures = 3 * _PER_PIXEL * math.prod(size_of(resolution))
    lines += [
        f"disk: {size_text(each)} per target, {size_text(pictures)} more with pictures",
        f"time: {duration(seconds)} per step, {1 / per_target:.2f} images/s",
    ]
    if samples is None:
        return Plan(lines, math.nan)
    disk = each * samples + pictures * (samples if num_images < 0 else min(num_images, samples))
    note = " at most, as targets stop early" if options.stops_early else ""
    lines.append(
        f"in all, for {samples} targets: {size_text(disk)} on disk, "
        f"{duration(per_target * samples)}{note}"
    )
    return Plan(lines, per_target * samples)


def assignment_memory(
    generator: Generator, options: AssignOptions, resolution: Resolution, batch_size: int
) -> StepMemory:
    """Memory of a step, from its forward and backward pass on fake tensors.

    What an allocator wastes and what libraries of the device take for themselves is not in it.
    """
    with fake_copy(generator) as fake:
        problem = random_problem(fake, options, resolution, batch_size)
        kept = _search(fake, options, resolution, batch_size).bytes
        z = torch.zeros_like(problem.eps, requires_grad=options.gradient_steps > 0)
        with LiveMemory(tensors_of(fake.networks)) as live:
            loss = MatchingObjective(fake, options)(z, problem).loss.sum()
            activations = live.live
            if options.gradient_steps:
                loss.backward()
        return StepMemory(
            memory.weights_by_part(fake.networks),
            {"noises, rotations, targets": kept},
            {"activations": activations},
            live.peak,
        )


def fitting_batch_size(generator: Generator, options: AssignOptions, resolution: Resolution) -> int:
    """Largest power of two of targets that fits on the GPU; 16 on the CPU."""
    once = dataclasses.replace(options, steps=1)
    return memory.fitting_batch_size(
        generator.device, lambda size: _search(generator, once, resolution, size).advance()
    )


def _search(
    generator: Generator, options: AssignOptions, resolution: Resolution, count: int
) -> Search:
    """A search of random targets."""
    problem = random_problem(generator, options, resolution, count)
    return Search(problem, options, MatchingObjective(generator, options))


def _step_worths(options: AssignOptions) -> float:
    """Work per target in gradient steps; a candidate's forward pass is about a third of one."""
    candidates = options.draws if options.choice else 0
    return options.gradient_steps + 1 + candidates / 3
