"""How many targets the device takes at once."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from oneshot_fast.jobs.assign.objective import objective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.targets import random_problem
from oneshot_fast.search.gradient import Search

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator

ON_CPU = 16  # fixed: a CPU has no device memory to fill, and results stay bitwise the same
_LIMIT = 256


def automatic_batch_size(generator: Generator, options: AssignOptions, resolution: int) -> int:
    """Largest power of two up to 256 that fits on the GPU; 16 on the CPU.

    Args:
        generator: The generator.
        options: How a noise is searched; a pixel loss takes more memory.
        resolution: Image side in pixels.
    """
    if generator.device.type != "cuda":
        return ON_CPU
    best = largest_fit(lambda size: _try(generator, options, resolution, size), _free_memory)
    print(f"batch size {best}: the largest power of two that fits", file=sys.stderr)
    return best


def largest_fit(use: Callable[[int], int], free: Callable[[], int]) -> int:
    """Largest power of two up to 256 that ``use`` can do; 1 if it can do none.

    Args:
        use: Does the work of a batch of a size and returns how many bytes it needed; raises
            torch.OutOfMemoryError.
        free: Bytes that are free between two uses.
    """
    size, needed = 1, 0
    try:
        needed = use(size)
        # needs grow in proportion at most; a tenth is left for what the caching allocator wastes
        while size < _LIMIT and 2.0 * needed < 0.9 * free():
            needed = use(2 * size)
            size *= 2
    except torch.OutOfMemoryError:
        pass
    return size


def _free_memory() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _try(generator: Generator, options: AssignOptions, resolution: int, size: int) -> int:
    """Evaluate and differentiate once with ``size`` targets; bytes needed beside the weights."""
    device = generator.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    problem = random_problem(generator, options, resolution, size)
    once = dataclasses.replace(options, steps=1)
    # compiled code needs less, and its compilation would take minutes per size
    with torch.compiler.set_stance("force_eager"):
        Search(problem, once, functools.partial(objective, generator, once)).advance()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
