"""Seeds and base noise that depend on the run's seed and a sample's name, and on nothing else."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derived_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for the thing called ``names`` in the run with ``seed``."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def record_seed(name: str) -> int:
    """Seed of what a sampler draws after the first noise, for the record with this id.

    In all runs the same, so that a training draws what the assignment drew.
    """
    return derived_seed(0, "record", name)


def content_id(*values: object) -> str:
    """Sixteen hex digits that change with any of ``values``, for a run's settings."""
    return f"{derived_seed(0, *values):016x}"


def gaussian(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """One N(0, 1) sample per seed, [len(seeds), *shape] float32.

    Drawn on the CPU, so that it is the same for every device, batch size and order.
    """
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows) if rows else torch.empty(0, *shape)
