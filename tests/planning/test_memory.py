"""Memory in use while something runs, and the largest batch that fits."""

from __future__ import annotations

import torch

from oneshot_fast.planning.memory import LiveMemory, largest_fit


def test_live_memory_counts_each_storage_once_while_it_lives() -> None:
    known = torch.zeros(100)
    with LiveMemory([known]) as memory:
        known.view(10, 10).add_(1)
        assert memory.live == 0
        a = torch.ones(1000)
        b = a[:10].view(5, 2)
        assert memory.live == 4000
        del a
        assert memory.live == 4000
        del b
        assert memory.live == 0
        torch.ones(500).double()
    assert (memory.live, memory.peak) == (0, 6000)


def test_the_largest_batch_that_fits() -> None:
    def use(size: int, room: int = 1000) -> int:
        if 40 * size > room:
            raise torch.OutOfMemoryError("out of memory")
        return 40 * size

    assert largest_fit(use, lambda: 10**9) == 16
    assert largest_fit(use, lambda: 800) == 16
    assert largest_fit(use, lambda: 100) == 2
    assert largest_fit(lambda size: size, lambda: 10**9) == 256
    assert largest_fit(lambda size: use(1000), lambda: 10**9) == 1
