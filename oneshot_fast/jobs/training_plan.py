"""What any training will need, from a few timed passes; writes nothing."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.hooks import RemovableHandle

from oneshot_fast.data.sizes import Resolution, size_of
from oneshot_fast.generators.adapters import add_adapter
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.lora_files import Adapter
from oneshot_fast.planning import memory
from oneshot_fast.planning.timing import Plan, shortest
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.units import count_text, duration, size_text
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.losses.base import Loss, shared_losses, total
from oneshot_fast.training.memory import checkpoint_activations
from oneshot_fast.training.options import TrainOptions

# torchao keeps the moments of smaller tensors, and of those not of whole blocks, as they are
_BLOCK, _SMALL = 256, 4096
_AVERAGE, _MOMENTS = "average of the weights", "optimiser's moments"
_FAKE_MOMENTS = "moments of the fake"


@dataclass(frozen=True)
class Kind:
    """What is trained on, of any training.

    Attributes:
        loss: What a generator, and a copy of ``rewards``, are trained by.
        batch: A batch of zeros, of the training's sizes, on torch's default device.
        decodes: Whether the decoder is needed.
        unit: What a batch has ``TrainOptions.batch_size`` of, such as "pairs".
        rewards: That the loss evaluates; None: it has none.
        prompt: An example of a prompt.
    """

    loss: Callable[[Generator, WeightedRewards | None], Loss]
    batch: Callable[[Generator], Batch]
    decodes: bool
    unit: str = "images"
    rewards: WeightedRewards | None = None
    prompt: str = ""


@dataclass(frozen=True)
class Fake:
    """A network, or an adapter, that is trained beside the student for a matching term.

    Attributes:
        kind: What it is trained on.
        options: How it is trained.
        times: Steps of it to one of the student.
        teacher: Bytes of the teacher's networks, where these are not the student's.
        offload: Whether both, and all moments, are off the device while they are idle.
    """

    kind: Kind
    options: TrainOptions
    times: float
    teacher: int
    offload: bool = False

    @property
    def part(self) -> str:
        """What its weights are called."""
        return "the fake's adapter" if self.options.lora_rank else "the fake"


def training_plan(
    generator: Generator,
    options: TrainOptions,
    kind: Kind,
    *,
    resolution: Resolution,
    samples: int,
    offload_encoders: bool | None = None,
    fake: Fake | None = None,
    rollout: Callable[[], object] | None = None,
    updates: int = 1,
) -> Plan:
    """Parameters, memory by part, disk and time of a training on ``samples`` of its units.

    Memory is found on tensors without data, time from forward and backward passes on random data
    that keep no gradient: the weights stay as they are. A ``rollout`` makes what so many
    ``updates`` learn from: its time is counted, its memory is not.
    """
    on_gpu = generator.device.type != "cpu"
    offloads = on_gpu if offload_encoders is None else offload_encoders
    needed = memory_beside(generator, options, kind, fake, offloads)
    lines = [
        *memory.parameter_lines(generator.networks),
        f"trained parameters: {count_text(needed.trained)}",
        *needed.lines(f"{options.batch_size} {kind.unit}"),
    ]
    of = {} if rollout is None else {"images and rewards": shortest(rollout) / updates}
    if fake is not None:
        of["the fake"] = fake.times * _training_seconds(generator, fake.options, fake.kind)
    seconds = _training_seconds(generator, options, kind) + sum(of.values())
    lines += memory.peak_lines(generator.device)
    steps = options.steps(math.ceil(samples / options.batch_size))
    pipeline = sum(memory.bytes_of(network.parameters()) for network in generator.networks.values())
    if options.save_single_file and generator.layout:
        written = (generator.networks.get(name) for name in generator.layout.prefixes)
        pipeline += sum(memory.bytes_of(network.parameters()) for network in written if network)
    checkpoints = 2 * needed.trained_bytes + pipeline if options.lora_rank else 2 * pipeline
    best = needed.kept[_AVERAGE] or needed.trained_bytes
    known = needed.weights | needed.kept | needed.idle
    saved = [_MOMENTS, _AVERAGE, *([] if fake is None else [fake.part, _FAKE_MOMENTS])]
    state = needed.trained_bytes + best + sum(known[name] for name in saved)
    latent = 4 * math.prod(generator.latent_shape(*size_of(resolution)))
    pool = latent * options.preserve_pool_size if options.preserves else 0
    size = f"{options.batch_size} {kind.unit}"
    parts = "".join(f", {duration(part)} of it for {name}" for name, part in of.items())
    lines += [
        f"disk: {size_text(checkpoints)} for the checkpoints, {size_text(state)} for the training "
        f"state (twice that while it is replaced), {size_text(pool)} for the preserve pool",
        f"time: {duration(seconds)} per step of {size}{parts}, optimiser not counted",
        f"in all, for {samples} {kind.unit} and {steps} steps: {duration(seconds * steps)}",
    ]
    return Plan(lines, seconds * steps)


def memory_beside(
    generator: Generator, options: TrainOptions, kind: Kind, fake: Fake | None, offloads: bool
) -> memory.StepMemory:
    """As ``memory_of``: the larger of a student's and a fake's step, and all that is there then."""
    student = memory_of(generator, options, kind, offloads)
    if fake is None:
        return student
    found = memory_of(generator, fake.options, fake.kind, offloads)
    own = {fake.part: found.trained_bytes}
    teacher = {"the teacher": fake.teacher} if fake.teacher else {}
    moments = {_FAKE_MOMENTS: found.kept[_MOMENTS]}
    always = own | teacher, student.kept | moments
    turns, idle = [(student, *always), (found, *always)], dict[str, int]()
    if fake.offload:
        either = {"the fake or the teacher": max(*own.values(), fake.teacher)}
        others = {k: v for k, v in student.kept.items() if k != _MOMENTS}
        turns = [(student, either, student.kept), (found, own, others | moments)]
        idle = own | teacher | moments | {_MOMENTS: student.kept[_MOMENTS]}
    needs = (
        dataclasses.replace(
            student,
            weights=student.weights | networks,
            kept=kept,
            held=turn.held,
            step=turn.step,
            idle=idle,
        )
        for turn, networks, kept in turns
    )
    return max(needs, key=lambda need: need.peak)


def memory_of(
    generator: Generator, options: TrainOptions, kind: Kind, offloads: bool = False
) -> memory.StepMemory:
    """Memory of a training step, from a run of its forward and backward pass on fake tensors.

    What an allocator wastes and what libraries of the device take for themselves is not in it. With
    ``offloads`` what only encodes is off the device.
    """
    start = None if options.lora_from is None else generator.read_adapter(options.lora_from)
    with memory.fake_copy(generator) as fake:
        trained = _prepare(fake.denoiser, options, start)
        batch = kind.batch(fake)
        rewards = kind.rewards and memory.fake_rewards(kind.rewards, kind.prompt, fake)
        networks = fake.networks | ({} if rewards is None else rewards.by_name)
        loss = kind.loss(fake, rewards)
        kept, held = _passes(fake, options, trained, batch, loss, memory.tensors_of(networks))
        weights = memory.weights_by_part(networks)
        if offloads:
            for name, gone in fake.encoders(kind.decodes).items():
                weights[name] -= sum(memory.bytes_of(module.parameters()) for module in gone)
    count, size = sum(p.numel() for p in trained), memory.bytes_of(trained)
    foreach = generator.device.type == "cuda" and options.optimizer == "adamw"
    # torch's AdamW takes the roots of all second moments at once on a GPU
    updating = 0 if options.optimizer_in_backward else size * (2 if foreach else 1)
    gradients = max(p.nbytes for p in trained) if options.optimizer_in_backward else size
    return memory.StepMemory(
        weights,
        {
            _MOMENTS: sum(_moment_bytes(p, options) for p in trained),
            _AVERAGE: 4 * count if options.use_ema else 0,
        },
        {"gradients": gradients, "activations": kept},
        max(held, updating),
        count,
        size,
    )


def _passes(
    generator: Generator,
    options: TrainOptions,
    trained: Sequence[nn.Parameter],
    batch: Batch,
    loss: Loss,
    known: Sequence[Tensor],
) -> tuple[int, int]:
    """Bytes that forward passes keep, and the most that forward and backward passes hold."""
    if options.optimizer_in_backward:
        _drop_gradients(trained)
    parts = batch.split(options.gradient_accumulation_steps)
    kept = 0
    with memory.LiveMemory(known) as live:
        # from the second part on, all gradients are there already
        for part in parts[:2]:
            value = total(shared_losses(loss, generator, part))
            gradients = memory.bytes_of(p.grad for p in trained if p.grad is not None)
            kept = max(kept, live.live - gradients)
            value.backward()
            del value
    return kept, live.peak


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> list[RemovableHandle]:
    """Free each gradient as soon as it is there."""
    return [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in parameters
        if p.requires_grad
    ]


def _prepare(
    denoiser: nn.Module, options: TrainOptions, start: Adapter | None = None
) -> list[nn.Parameter]:
    """Make ``denoiser`` as the training makes it; returns what is trained."""
    dtype, rank = getattr(torch, options.weights_dtype), options.lora_rank
    denoiser.requires_grad_(not rank)
    if rank:
        with unset_fake_temporarily():
            adapter = None if start is None else dataclasses.replace(start, weights={})
            add_adapter(denoiser, rank, options.lora_alpha, start=adapter)
    # Module.to swaps tensors, which fake ones do not allow; peft's adapter is real until here
    for place, module in denoiser.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            trained = parameter.requires_grad
            kind = torch.float32 if ".lora_" in place else dtype
            value = torch.zeros(parameter.shape, dtype=kind, device=parameter.device)
            module.register_parameter(name, nn.Parameter(value, requires_grad=trained))
    checkpoint_activations(denoiser, options)
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def blank_rows(generator: Generator, resolution: Resolution, count: int, **extra: Any) -> Rows:
    """Rows of zeros, with latents of zeros besides what else is given."""
    noise = torch.zeros(count, *generator.noise_shape(*size_of(resolution)))
    latents = torch.zeros(count, *generator.latent_shape(*size_of(resolution)))
    return Rows(noise, generator.blank_prompts(count), {"latents": latents, **extra})


def _training_seconds(generator: Generator, options: TrainOptions, kind: Kind) -> float:
    """Shortest of a few forward and backward passes of a whole batch."""
    denoiser, rank = generator.denoiser, options.lora_rank
    loss = kind.loss(generator, kind.rewards)
    with torch.device(generator.device):
        batch = kind.batch(generator)
    for rows in batch.values():
        for value in (rows.noise, *rows.extra.values()):
            if isinstance(value, Tensor) and value.ndim >= rows.noise.ndim:  # latents
                value.requires_grad_(bool(rank))
    denoiser.requires_grad_(not rank)
    hooks = _drop_gradients(denoiser.parameters())
    checkpoint_activations(denoiser, options)

    def run() -> None:
        for part in batch.split(options.gradient_accumulation_steps):
            value = total(shared_losses(loss, generator, part))
            value.backward()
        value.detach().cpu()

    try:
        return shortest(run)
    finally:
        for hook in hooks:
            hook.remove()
        denoiser.disable_gradient_checkpointing()
        denoiser.requires_grad_(False)


def _moment_bytes(parameter: Tensor, options: TrainOptions) -> int:
    """Bytes of both moments of ``parameter``."""
    n = parameter.numel()
    if options.optimizer == "adamw8bit" and n >= _SMALL and n % _BLOCK == 0:
        return 2 * (n + 4 * n // _BLOCK)
    return 2 * parameter.nbytes
