"""What a distillation will need: student, fake and teacher, and what the three share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from oneshot_fast.data.sizes import Resolution, size_of
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.jobs.distill.options import DistillOptions
from oneshot_fast.jobs.training_plan import Kind, blank_rows, memory_of, training_plan
from oneshot_fast.planning.memory import StepMemory, bytes_of
from oneshot_fast.planning.timing import Plan
from oneshot_fast.runtime.units import size_text
from oneshot_fast.training.batch import Batch
from oneshot_fast.training.checkpoints import STUDENT
from oneshot_fast.training.losses.base import Loss
from oneshot_fast.training.losses.dmd import FAKE_NOISES, STUDENT_NOISES
from oneshot_fast.training.roles import FAKE, Roles

Losses = Callable[[Roles, FewStepGenerator, Sequence[int]], Mapping[str, Loss]]


def distill_memory(
    generator: FewStepGenerator,
    options: DistillOptions,
    losses: Losses,
    resolution: Resolution,
    offloads: bool = False,
) -> StepMemory:
    """Memory of a distillation: the larger of a student's and a fake's step, and all that stays.

    With an adapter there is one base network: the fake adds an adapter and its moments. Else the
    fake and the teacher are networks of their own.
    """
    found = {
        name: memory_of(generator, options, _kind(losses, resolution, options, name), offloads)
        for name in (STUDENT, FAKE)
    }
    one = max(found.values(), key=lambda need: need.step)
    network = bytes_of(generator.denoiser.parameters())
    more = (
        {"the fake's adapter": one.trained_bytes}
        if options.lora_rank
        else {"the fake": one.trained_bytes, "the teacher": network}
    )
    moments = one.kept["optimiser's moments"]
    return replace(
        one, weights=one.weights | more, kept=one.kept | {"moments of the fake": moments}
    )


def distill_plan(
    generator: FewStepGenerator,
    options: DistillOptions,
    losses: Losses,
    *,
    resolution: Resolution,
    samples: int,
    offload_encoders: bool | None = None,
) -> Plan:
    """Parameters, memory by part, disk and time; the time is that of the student's step alone.

    A step of the fake costs about as much, and there are ``ttur`` of them to one of the student.
    """
    kind = _kind(losses, resolution, options, STUDENT)
    plan = training_plan(
        generator,
        options,
        kind,
        resolution=resolution,
        samples=samples,
        offload_encoders=offload_encoders,
    )
    offloads = generator.device.type != "cpu" if offload_encoders is None else offload_encoders
    needed = distill_memory(generator, options, losses, resolution, offloads)
    lines = [line for line in plan.lines if not line.startswith("memory, ")]
    unit, times = f"{options.batch_size} images", 1 + options.ttur
    network = size_text(bytes_of(generator.denoiser.parameters()))
    base = f"one base network of {network} for all roles" if options.lora_rank else "three networks"
    lines += [
        *needed.lines(unit),
        f"roles: {base}",
        f"with {options.ttur} steps of the fake to one of the student, about as long each, the "
        f"time is about {times} times that above, and what the first of several steps take",
    ]
    return Plan(lines, times * plan.seconds)


def _kind(losses: Losses, resolution: Resolution, options: DistillOptions, name: str) -> Kind:
    def loss(generator: Any, _: object) -> Loss:
        shape = generator.latent_shape(*size_of(resolution))
        return losses(Roles.of_one(generator), generator, shape)[name]

    def batch(generator: Any) -> Batch:
        rows = blank_rows(generator, resolution, options.batch_size)
        noises = {key: torch.zeros_like(rows.noise) for key in (*FAKE_NOISES, *STUDENT_NOISES)}
        count = options.batch_size  # of one step, as earlier ones keep nothing
        extra = {**noises, "uniform": torch.full((count, 2), 0.5), "steps": [1] * count}
        return Batch(dmd=replace(rows, extra=extra))

    return Kind(loss=loss, batch=batch, decodes=True)
