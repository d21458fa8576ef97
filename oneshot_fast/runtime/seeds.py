"""Seeds and base noise that depend on the run's seed and a sample's name, and on nothing else."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def derived_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for the thing called ``names`` in the run with ``seed``."""
    return _hashed(seed, names)


def _hashed(seed: int, names: Iterable[object]) -> int:
    digest = hashlib.sha256(str(seed).encode())
    for name in names:
        digest.update(f"/{name}".encode())
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def record_seed(name: str) -> int:
    """Seed of what a sampler draws after the first noise, for the record with this id.

    In all runs the same, so that a training draws what the assignment drew.
    """
    return derived_seed(0, "record", name)


def content_id(*values: object) -> str:
    """Sixteen hex digits that change with any of ``values``, for a run's settings."""
    return content_id_of(values)


def content_id_of(values: Iterable[object]) -> str:
    """The same, of values that come one by one."""
    return f"{_hashed(0, values):016x}"


def gaussian(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """One N(0, 1) sample per seed, [len(seeds), *shape] float32.

    Drawn on the CPU, so that it is the same for every device, batch size and order.
    """
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows) if rows else torch.empty(0, *shape)
