"""How much memory a step takes at its peak, found without computing or allocating it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from oneshot_fast.generator import PromptEncoding
from oneshot_fast.matching import AssignOptions, objective
from oneshot_fast.search import Problem
from oneshot_fast.training import Batch, SftOptions, sft_losses

if TYPE_CHECKING:
    from oneshot_fast.generator import OneStepGenerator

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
        weights: Of each part of the pipeline.
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


PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def training_memory(
    generator: OneStepGenerator, options: SftOptions, resolution: int
) -> StepMemory:
    """Memory of a training step, from a run of its forward and backward pass on fake tensors.

    What an allocator wastes and what libraries of the device take for themselves is not in it.

    Args:
        generator: The generator; neither it nor its weights are changed.
        options: How it is trained.
        resolution: Image side in pixels.
    """
    with _fake(generator) as fake:
        trained = _prepare(fake.pipe.unet, options)
        batch = training_batch(fake, options, resolution)
        in_backward = bool(getattr(options, "optimizer_in_backward", False))
        if in_backward:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        modules = [getattr(fake.pipe, part) for part in PARTS]
        known = [p for module in modules for p in (*module.parameters(), *module.buffers())]
        parts = list(batch.split(options.gradient_accumulation_steps))
        kept = 0
        with LiveMemory(known) as memory:
            # from the second part on, all gradients are there already
            for part, pairs, others in parts[:2]:
                match, keep = sft_losses(fake, part, options)
                kept = max(kept, memory.live - _gradient_bytes(trained))
                (match * pairs + keep * others).backward()
                del match, keep
        weights = {part: _bytes(m.parameters()) for part, m in zip(PARTS, modules, strict=True)}
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
    generator: OneStepGenerator, options: AssignOptions, resolution: int, batch_size: int
) -> StepMemory:
    """The same for a step of an assignment, in which no weight is trained."""
    with _fake(generator) as fake:
        shape = (batch_size, *fake.latent_shape(resolution, resolution))
        images = None
        if options.pixel_l1_weight:
            images = torch.zeros(batch_size, 3, resolution, resolution)
        problem = Problem(
            torch.zeros(shape), _prompts(fake, batch_size), torch.zeros(shape), images
        )
        modules = [getattr(fake.pipe, part) for part in PARTS]
        known = [p for module in modules for p in (*module.parameters(), *module.buffers())]
        z = torch.zeros(shape, requires_grad=True)
        with LiveMemory(known) as memory:
            loss = objective(fake, options, z, problem).sum()
            kept = memory.live
            loss.backward()
        weights = {part: _bytes(m.parameters()) for part, m in zip(PARTS, modules, strict=True)}
        return StepMemory(weights, 0, 0, 0, 0, 0, kept, memory.peak)


@contextmanager
def _fake(generator: OneStepGenerator) -> Iterator[OneStepGenerator]:
    """Yield a copy of ``generator`` whose tensors have shapes but no values."""
    found = detect_fake_mode(list(generator.pipe.unet.parameters()))
    mode = found or FakeTensorMode(allow_non_fake_inputs=True)
    plain = copy.copy(generator)
    plain._compiled_unet = None
    plain._conditions, plain._prompts = {}, type(plain._prompts)()
    plain.pipe = copy.copy(generator.pipe)
    for part in PARTS:
        setattr(plain.pipe, part, None)
    with FakeCopyMode(mode):
        modules = copy.deepcopy([*(getattr(generator.pipe, p) for p in PARTS), generator.decoder])
    for part, module in zip(PARTS, modules, strict=False):
        setattr(plain.pipe, part, module)
    plain.decoder = modules[-1]
    with mode, torch.device(generator.device):
        yield plain


def _prepare(unet: nn.Module, options: SftOptions) -> list[nn.Parameter]:
    """Make ``unet`` as the training makes it; returns what is trained."""
    dtype, rank = getattr(torch, options.weights_dtype), getattr(options, "lora_rank", 0)
    for module in unet.modules():  # Module.to swaps tensors, which fake ones do not allow
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(parameter.detach().to(dtype)))
    unet.requires_grad_(not rank)
    if rank:
        from peft import LoraConfig

        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))  # type: ignore[operator]
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()  # type: ignore[operator]
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def training_batch(generator: OneStepGenerator, options: SftOptions, resolution: int) -> Batch:
    """A batch of zeros, of the training's sizes."""
    n, m = options.batch_size, 0
    if options.preserves:
        m = options.preserve_batch_size or n
    noise = torch.zeros(n + m, *generator.latent_shape(resolution, resolution))
    images = torch.zeros(n, 3, resolution, resolution) if options.pixel_l1_weight else None
    return Batch(noise, _prompts(generator, n + m), torch.zeros_like(noise), images, n)


def _prompts(generator: OneStepGenerator, count: int) -> PromptEncoding:
    pipe = generator.pipe
    width, pooled = pipe.unet.config.cross_attention_dim, pipe.text_encoder_2.config.projection_dim
    return PromptEncoding(torch.zeros(count, 77, width), torch.zeros(count, pooled))


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
