"""What a reinforcement will need: the generator, and for a matching term a fake and a teacher."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from oneshot_fast.data.sizes import Resolution, size_of
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.jobs.reinforce.options import ReinforceOptions
from oneshot_fast.jobs.training_plan import Fake, Kind, blank_rows, training_plan
from oneshot_fast.planning.memory import bytes_of
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.checkpoints import STUDENT
from oneshot_fast.training.losses.base import Loss
from oneshot_fast.training.losses.dmd import FAKE_NOISES, STUDENT_NOISES
from oneshot_fast.training.roles import FAKE, Roles

Losses = Callable[
    [Roles | None, FewStepGenerator, Sequence[int], WeightedRewards], Mapping[str, Loss]
]


def reinforce_plan(
    generator: FewStepGenerator,
    options: ReinforceOptions,
    losses: Losses,
    *,
    resolution: Resolution,
    samples: int,
    rewards: WeightedRewards,
    prompt: str,
    learns: Sequence[int],
    teacher: FewStepGenerator | None,
    adapts: bool,
    rollout: Callable[[], object],
    offload_encoders: bool | None = None,
    offload: bool = False,
) -> Plan:
    """As ``training_plan``, of a training on ``samples`` images an epoch.

    ``learns`` has as many noisy steps as learn from a rollout; ``prompt`` is an example. Of a
    generator that ``adapts`` the teacher is its base.
    """

    def loss(model: Any, found: WeightedRewards | None, name: str) -> Loss:
        roles = Roles.of_one(model) if adapts or teacher else None
        shape = model.latent_shape(*size_of(resolution))
        return losses(roles, model, shape, found or rewards)[name]

    def batch(model: Any) -> Batch:
        count = options.batch_size
        rows = blank_rows(model, resolution, count)
        latents = rows.extra["latents"]
        stacked = latents[:, None].repeat(1, max(len(learns), 1), 1, 1, 1)
        extra: dict[str, Any] = {
            "steps": [[*learns]] * count,
            "before": stacked,
            "after": stacked.clone(),
            "old": torch.zeros(stacked.shape[:2]),
            "last": latents,
            "advantage": torch.zeros(count),
            "texts": [prompt] * count,
        }
        found = Batch(rollout=Rows(rows.noise, rows.conditioning, extra | _draws(latents)))
        if options.preserves:
            held = options.preserve_batch_size or count
            found["preserve"] = blank_rows(model, resolution, held)
        return found

    def fake_batch(model: Any) -> Batch:
        rows = blank_rows(model, resolution, options.batch_size)
        latents = rows.extra["latents"]
        extra = {"sample": latents, **_draws(latents)}
        return Batch(dmd=Rows(rows.noise, rows.conditioning, extra))

    fake = None
    if adapts or teacher:
        kind = Kind(lambda model, found: loss(model, found, FAKE), fake_batch, True)
        # all else is the generator's
        network = 0 if teacher is None else bytes_of(teacher.denoiser.parameters())
        fake = Fake(kind, options.of_fake(adapts), 1 / options.inner_updates, network, offload)
    plan = training_plan(
        generator,
        options,
        Kind(lambda model, found: loss(model, found, STUDENT), batch, True, "images", rewards,
             prompt),
        resolution=resolution,
        samples=samples,
        offload_encoders=offload_encoders,
        fake=fake,
        rollout=rollout,
        updates=options.inner_updates,
    )  # fmt: skip
    return Plan([*plan.lines, "memory not counted: making and scoring images"], plan.seconds)


def _draws(latents: torch.Tensor) -> dict[str, Any]:
    """What the matching term's losses draw, for rows like these."""
    names, count = {*FAKE_NOISES, *STUDENT_NOISES}, len(latents)
    noises = {name: torch.zeros_like(latents) for name in names}
    return {**noises, "uniform": torch.full((count, 2), 0.5)}
