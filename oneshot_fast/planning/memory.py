"""How much memory a step takes at its peak, found without computing or allocating it."""

import copy
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from oneshot_fast.generators.base import Generator
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.units import count_text, size_text

ON_CPU = 16  # fixed: a CPU has no device memory to fill, and results stay bitwise the same
_LIMIT = 256


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still in use.

    Attributes:
        live: Bytes in use now.
        peak: The most that ``live`` was.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        """Start at 0; storages of ``known`` tensors are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = None
        weakref.finalize(storage, self._free, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class StepMemory:
    """Bytes by part, each by its name.

    Attributes:
        weights: Of each network, as far as it is on the device.
        kept: From step to step, such as noises or an optimiser's moments.
        held: Of what a step holds, such as gradients and activations; not all at the same time.
        step: Most that a step holds at once beside ``weights`` and ``kept``.
        trained: Number of trained parameters.
        trained_bytes: Their bytes.
        idle: What is not on the device, or not all of the time.
    """

    weights: dict[str, int]
    kept: dict[str, int]
    held: dict[str, int]
    step: int
    trained: int = 0
    trained_bytes: int = 0
    idle: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Everything at once."""
        return sum(self.weights.values()) + sum(self.kept.values()) + self.step

    def lines(self, batch: str) -> list[str]:
        """For a person; ``batch`` says of what a step is, such as "4 pairs"."""
        parts = {f"weights of {part}": size for part, size in self.weights.items()}
        parts |= self.kept | self.held
        parts["most that a step holds at once"] = self.step
        parts[f"peak of a step of {batch}"] = self.peak
        parts |= {f"on the CPU while idle, {part}": size for part, size in self.idle.items()}
        return [f"memory, {name}: {size_text(size)}" for name, size in parts.items()]


@contextmanager
def fake_copy(generator: Generator) -> Iterator[Generator]:
    """Yield a copy of ``generator`` whose tensors have shapes but no values."""
    found = detect_fake_mode(list(generator.denoiser.parameters()))
    mode = found or FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    if found is None:  # each at once; the copying mode clones parameters as well
        tensors = tensors_of(generator.networks)
        memo |= {id(t): mode.from_tensor(t, static_shapes=True) for t in tensors}
    with FakeCopyMode(mode):
        fake = copy.deepcopy(generator, memo)
    with mode, torch.device(generator.device):
        yield fake


def fake_rewards(rewards: WeightedRewards, prompt: str, fake: Generator) -> WeightedRewards:
    """A copy of ``rewards`` without values, which knows ``prompt``, for one of ``fake_copy``."""
    for reward in rewards.by_name.values():
        rewards.features(reward, [prompt])  # kept, so not run on fake tensors
    mode = detect_fake_mode(list(fake.denoiser.parameters()))
    assert mode is not None
    with FakeCopyMode(mode):
        return copy.deepcopy(rewards)


def tensors_of(networks: Mapping[str, nn.Module]) -> list[Tensor]:
    """All parameters and buffers."""
    return [t for n in networks.values() for t in (*n.parameters(), *n.buffers())]


def weights_by_part(networks: Mapping[str, nn.Module]) -> dict[str, int]:
    """Bytes of each network; what two share counts for the first."""
    found: dict[str, int] = {}
    counted: set[nn.Parameter] = set()
    for name, network in networks.items():
        own = set(network.parameters()) - counted
        counted |= own
        found[name] = bytes_of(own)
    return found


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of all ``tensors``."""
    return sum(tensor.nbytes for tensor in tensors)


def parameter_lines(networks: Mapping[str, nn.Module]) -> list[str]:
    """How many parameters each network has, for a person."""
    counts = {k: sum(p.numel() for p in network.parameters()) for k, network in networks.items()}
    return [f"parameters of {name}: {count_text(count)}" for name, count in counts.items()]


def peak_lines(device: torch.device) -> list[str]:
    """What a GPU has measured, for a person; nothing for a CPU."""
    if device.type != "cuda":
        return []
    return [f"memory, measured peak: {size_text(torch.cuda.max_memory_allocated(device))}"]


def fitting_batch_size(device: torch.device, use: Callable[[int], object]) -> int:
    """Largest power of two up to 256 that fits on a GPU; 16 on the CPU.

    ``use`` does one step of a batch of a size on ``device``.
    """
    if device.type != "cuda":
        return ON_CPU

    def free() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]

    def needed(size: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        # compiled code needs less, and its compilation would take minutes per size
        with torch.compiler.set_stance("force_eager"):
            use(size)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    best = largest_fit(needed, free)
    print(f"batch size {best}: the largest power of two that fits", file=sys.stderr)
    return best


def largest_fit(use: Callable[[int], int], free: Callable[[], int]) -> int:
    """Largest power of two up to 256 that ``use`` can do; 1 if it can do none.

    It does the work of a batch of a size and returns how many bytes it needed, or raises
    torch.OutOfMemoryError; ``free`` tells the bytes that are free between two uses.
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
