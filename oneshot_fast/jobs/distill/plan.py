"""What a distillation will need: student, fake and teacher, and what the three share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from oneshot_fast.data.sizes import Resolution, size_of
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.jobs.distill.options import DistillOptions
from oneshot_fast.jobs.training_plan import (
    Fake,
    Kind,
    blank_rows,
    memory_beside,
    training_plan,
)  # fmt: skip
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
    offload: bool = False,
) -> StepMemory:
    """Memory of a distillation: the larger of a student's and a fake's step, and all that stays.

    With an adapter there is one base network: the fake adds an adapter and its moments. Else the
    fake and the teacher are networks of their own, which ``offload`` keeps on the CPU while idle.
    """
    kind = _kind(losses, resolution, options, STUDENT)
    fake = _fake(generator, options, losses, resolution, offload)
    return memory_beside(generator, options, kind, fake, offloads)


def distill_plan(
    generator: FewStepGenerator,
    options: DistillOptions,
    losses: Losses,
    *,
    resolution: Resolution,
    samples: int,
    offload_encoders: bool | None = None,
    offload: bool = False,
) -> Plan:
    """Parameters, memory by part, disk and time, with all steps of the fake."""
    plan = training_plan(
        generator,
        options,
        _kind(losses, resolution, options, STUDENT),
        resolution=resolution,
        samples=samples,
        offload_encoders=offload_encoders,
        fake=_fake(generator, options, losses, resolution, offload),
    )
    network = size_text(bytes_of(generator.denoiser.parameters()))
    base = f"one base network of {network} for all roles" if options.lora_rank else "three networks"
    counted = f"time: {options.ttur} steps of the fake to one of the student; not "
    counted += "what moving idle networks takes, nor " if offload else ""
    return Plan(
        [*plan.lines, f"roles: {base}", f"{counted}what the first of several steps take"],
        plan.seconds,
    )


def _fake(
    generator: FewStepGenerator,
    options: DistillOptions,
    losses: Losses,
    resolution: Resolution,
    offload: bool,
) -> Fake:
    teacher = 0 if options.lora_rank else bytes_of(generator.denoiser.parameters())
    kind = _kind(losses, resolution, options, FAKE)
    return Fake(kind, options.of_fake, options.ttur, teacher, offload)


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
