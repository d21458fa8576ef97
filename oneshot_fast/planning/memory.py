"""How much memory a step takes at its peak, found without computing or allocating it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    FakeCopyMode,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from oneshot_fast.generators.adapters import add_adapter
from oneshot_fast.jobs.assign.objective import objective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.targets import random_problem
from oneshot_fast.jobs.optimize.objective import reward_losses
from oneshot_fast.training.batch import Batch, SftOptions, sft_losses
from oneshot_fast.training.memory import checkpoint_activations

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator
    from oneshot_fast.rewards import WeightedRewards

    ByReward = tuple[WeightedRewards, str]  # and an example of a prompt

# torchao keeps the moments of smaller tensors, and of those not of whole blocks, as they are
_BLOCK, _SMALL = 256, 4096


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
    """Bytes by part.

    Attributes:
        weights: Of each network, as far as it is on the device.
        trained: Number of trained parameters.
        trained_bytes: Their bytes.
        gradients: Of all trained weights together.
        moments: Of the optimiser.
        average: Copy of the trained weights that --use_ema keeps.
        activations: Kept by the forward pass for the backward pass.
        step: Most that a step holds at once besides weights, moments and average.
    """

    weights: dict[str, int]
    trained: int
    trained_bytes: int
    gradients: int
    moments: int
    average: int
    activations: int
    step: int

    @property
    def peak(self) -> int:
        """Everything at once."""
        return sum(self.weights.values()) + self.moments + self.average + self.step


def training_memory(
    generator: Generator,
    options: SftOptions,
    resolution: int,
    offloads: bool = False,
    by_reward: ByReward | None = None,
) -> StepMemory:
    """Memory of a training step, from a run of its forward and backward pass on fake tensors.

    What an allocator wastes and what libraries of the device take for themselves is not in it.

    Args:
        generator: The generator; neither it nor its weights are changed.
        options: How it is trained.
        resolution: Image side in pixels.
        offloads: Whether what only encodes is off the device.
        by_reward: What a training on rewards raises.
    """
    with fake_copy(generator) as fake:
        trained = _prepare(fake.denoiser, options)
        batch = training_batch(fake, options, resolution, by_reward)
        losses, networks = sft_losses, fake.networks
        if by_reward is not None:
            rewards = fake_rewards(*by_reward, fake)
            losses, networks = partial(reward_losses, rewards), networks | rewards.by_name
        in_backward = options.optimizer_in_backward
        if in_backward:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        known = tensors_of(networks)
        parts = list(batch.split(options.gradient_accumulation_steps))
        kept = 0
        with LiveMemory(known) as memory:
            # from the second part on, all gradients are there already
            for part, pairs, others in parts[:2]:
                match, keep = losses(fake, part, options)
                kept = max(kept, memory.live - _gradient_bytes(trained))
                (match * pairs + keep * others).backward()
                del match, keep
        weights = weights_by_part(networks)
        if offloads:
            for name, gone in fake.encoders(options.decodes or by_reward is not None).items():
                weights[name] -= sum(_bytes(module.parameters()) for module in gone)
        moments = sum(_moment_bytes(parameter, options) for parameter in trained)
        foreach = generator.device.type == "cuda" and options.optimizer == "adamw"
        # torch's AdamW takes the roots of all second moments at once on a GPU
        updating = 0 if in_backward else _bytes(trained) * (2 if foreach else 1)
        return StepMemory(
            weights,
            sum(p.numel() for p in trained),
            _bytes(trained),
            max(p.nbytes for p in trained) if in_backward else _bytes(trained),
            moments,
            4 * sum(p.numel() for p in trained) if options.use_ema else 0,
            kept,
            max(memory.peak, updating),
        )


def assignment_memory(
    generator: Generator, options: AssignOptions, resolution: int, batch_size: int
) -> StepMemory:
    """The same for a step of an assignment, in which no weight is trained."""
    with fake_copy(generator) as fake:
        problem = random_problem(fake, options, resolution, batch_size)
        known = tensors_of(fake.networks)
        z = torch.zeros_like(problem.eps, requires_grad=True)
        with LiveMemory(known) as memory:
            loss = objective(fake, options, z, problem).sum()
            kept = memory.live
            loss.backward()
        weights = weights_by_part(fake.networks)
        return StepMemory(weights, 0, 0, 0, 0, 0, kept, memory.peak)


@contextmanager
def fake_copy(generator: Generator) -> Iterator[Generator]:
    """Yield a copy of ``generator`` whose tensors have shapes but no values."""
    found = detect_fake_mode(list(generator.denoiser.parameters()))
    mode = found or FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        fake = copy.deepcopy(generator)
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
        found[name] = _bytes(own)
    return found


def _prepare(unet: nn.Module, options: SftOptions) -> list[nn.Parameter]:
    """Make ``unet`` as the training makes it; returns what is trained."""
    dtype, rank = getattr(torch, options.weights_dtype), options.lora_rank
    unet.requires_grad_(not rank)
    if rank:
        with unset_fake_temporarily():
            add_adapter(unet, rank, options.lora_alpha)
    # Module.to swaps tensors, which fake ones do not allow; peft's adapter is real until here
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            trained = parameter.requires_grad
            kind = torch.float32 if rank and trained else dtype
            value = torch.zeros(parameter.shape, dtype=kind, device=parameter.device)
            module.register_parameter(name, nn.Parameter(value, requires_grad=trained))
    checkpoint_activations(unet, options)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def training_batch(
    generator: Generator,
    options: SftOptions,
    resolution: int,
    by_reward: ByReward | None = None,
) -> Batch:
    """A batch of zeros, of the training's sizes."""
    n, m = options.batch_size, 0
    if options.preserves:
        m = options.preserve_batch_size or n
    noise = torch.zeros(n + m, *generator.noise_shape(resolution, resolution))
    latents = torch.zeros(n + m, *generator.latent_shape(resolution, resolution))
    images = torch.zeros(n, 3, resolution, resolution) if options.pixel_l1_weight else None
    texts = [by_reward[1]] * n if by_reward else ()
    return Batch(noise, generator.blank_prompts(n + m), latents, images, n, texts)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _gradient_bytes(parameters: Sequence[Tensor]) -> int:
    return sum(p.grad.nbytes for p in parameters if p.grad is not None)


def _moment_bytes(parameter: Tensor, options: SftOptions) -> int:
    """Bytes of both moments of ``parameter``."""
    n = parameter.numel()
    if options.optimizer == "adamw8bit" and n >= _SMALL and n % _BLOCK == 0:
        return 2 * (n + 4 * n // _BLOCK)
    return 2 * parameter.nbytes
