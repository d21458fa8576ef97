"""Distribution matching distillation of few-step generators: AC-DMD and DMD.

A student's sample x_s at noise level s (x = A x0 + S e) is noised further, to level t:

    x_t = a x_s + R n,   a = A_t / A_s,   R^2 = S_t^2 - a^2 S_s^2,   n in N(0, 1)

    fake:     a network learns the student's samples: e* = (S_t / R) n, which is E[e | x_t] in the
              mean (Tweedie); L = mean (R / S_t e - n)^2, or for a flow as it was published
              mean min(1 / R^2, 10) R^2 (v - v*)^2
              + gamma mean (h' - h)(h'' - h), consistency: h = x0(x_t), h' and h'' those after two
              stochastic steps from t to a lower level
    student:  x_T, x_F = a stochastic step t -> s by the teacher (guided) and by the fake, with the
              same fresh noise; g = (x_F - x_T) / max(mean |x_s - x_T|, 1e-3) is the gradient at x_s

AC-DMD (RTDMD, arXiv 2605.26108) matches at the level where the student's last evaluated step ends;
DMD (Yin et al. 2024, arXiv 2405.14867, without its GAN) always the clean sample, s = 0. With one
step both are the same. The floor of 1e-3 is ours: equal tensors would give 0 / 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.levels import Level, Levels
from oneshot_fast.generators.schedulers import Eta
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.roles import Roles

Objective = Literal["ac_dmd", "dmd"]
Space = Literal["noise", "flow"]
# of timesteps: least above the sample's, and between which they lie, where the sample's allows
_GAP, _LEAST, _MOST = 10, 20, 980
_NEAREST = 200  # of a consistency step
_FLOOR = 1e-3


def renoised(x: Tensor, noise: Tensor, before: Level, after: Level) -> tuple[Tensor, Tensor]:
    """Samples x [B, C, h, w] at a level, noised to a higher one; and R, [B, 1, 1, 1]."""
    a = after.signal / before.signal
    added = (after.noise**2 - a**2 * before.noise**2).clamp(min=1e-12).sqrt()
    return a * x + added * noise, added


def fake_loss(e: Tensor, noise: Tensor, after: Level, added: Tensor, space: Space) -> Tensor:
    """What the fake lowers, a scalar; ``e`` [B, C, h, w] is its estimate in the noised samples."""
    if space == "noise":
        return (added / after.noise * e - noise).square().mean()
    apart = (e - after.noise / added * noise) / after.signal  # v - v*, as both share x_t
    return ((1 / added**2).clamp(max=10) * (added * apart).square()).mean()


def shares(eta: Eta, before: Level, after: Level) -> tuple[Tensor | float, Tensor | float]:
    """How much of a step's noise is kept and how much is fresh: cos and sin of eta pi / 2."""
    if eta == "ancestral":
        fresh = 1 - (after.noise / after.signal / (before.noise / before.signal)).square()
        return (1 - fresh).sqrt(), fresh.sqrt()
    assert isinstance(eta, int | float)
    return math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)


def stochastic_step(
    x0: Tensor, e: Tensor, z: Tensor, eta: Eta, before: Level, after: Level
) -> Tensor:
    """Samples at level ``after`` of estimates at ``before``, with fresh noise z [B, C, h, w]."""
    kept, fresh = shares(eta, before, after)
    return after.signal * x0 + after.noise * (kept * e + fresh * z)


def matching_loss(x: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    """Half the mean square of g, whose gradient at x [B, C, h, w] is g per element."""
    size = (x.detach() - teacher).abs().flatten(1).mean(1).clamp(min=_FLOOR).view(-1, 1, 1, 1)
    return (x - (x.detach() - (fake - teacher) / size)).square().mean() / 2


def consistency_loss(h: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    """Unbiased |E h' - h|^2 of two draws of h', which may be negative; of one draw its square."""
    return ((first - h) * ((first if second is None else second) - h)).mean()


@dataclass(frozen=True)
class Draws:
    """Everything random in a batch's losses, from seeds alone.

    Attributes:
        seeds: One for each row.
        steps: How many steps the student takes.
    """

    seeds: Sequence[int]
    steps: int

    def extra(self, shape: Sequence[int], noises: Sequence[str]) -> dict[str, object]:
        """For ``Rows.extra``: noises [B, *shape] by name, and numbers in [0, 1) [B, 2]."""
        names, rows, uniforms = [*noises], [], []
        for seed in self.seeds:
            draw = torch.Generator().manual_seed(seed)
            uniforms.append(torch.rand(2, generator=draw))
            rows.append(torch.randn(len(names), *shape, generator=draw))
        drawn = torch.stack(rows)
        found: dict[str, object] = {name: drawn[:, k] for k, name in enumerate(names)}
        return found | {"uniform": torch.stack(uniforms), "steps": [self.steps] * len(self.seeds)}


FAKE_NOISES, STUDENT_NOISES = ("renoise", "first", "second"), ("renoise", "transition")


class _Dmd:
    """What both losses share.

    Attributes:
        eta: Of stochastic steps.
    """

    def __init__(self, roles: Roles, levels: Levels, objective: Objective, eta: Eta) -> None:
        """Of a student in ``roles``, at its model's ``levels``."""
        self.roles, self.levels, self.objective, self.eta = roles, levels, objective, eta

    def sample(self, student: FewStepGenerator, rows: Rows) -> tuple[Tensor, Level, float]:
        """Samples, differentiable through the last evaluation, their level and its timestep."""
        end = len(self.levels.timesteps) - 1
        if "sample" in rows.extra:  # clean ones that are there already
            x = rows.extra["sample"]
            return x, self.levels.of_step(end, len(x), x), self.levels.timesteps[end]
        x, told, count = rows.noise, rows.conditioning, rows.extra["steps"][0]
        with torch.no_grad():
            for k in range(count - 1):
                x = student.next_sample(k, x, told)
        if self.objective == "dmd":
            x, place = student.estimate(count - 1, x, told), end
        else:
            x, place = student.next_sample(count - 1, x, told), count
        return x, self.levels.of_step(place, len(x), x), self.levels.timesteps[place]

    def times(self, uniform: Tensor, above: float) -> Tensor:
        """Timesteps [B] of numbers in [0, 1) [B]: above that of the samples."""
        low, last = min(above + _GAP, self.levels.last), self.levels.last
        found = (low + uniform * (last - low)).clamp(_LEAST, _MOST)
        found = found.clamp(min(above + 1, last), last)
        return found if self.levels.is_flow else found.ceil()


class FakeLoss(_Dmd):
    """What the fake lowers on the student's samples, which come without gradient."""

    def __init__(
        self, roles: Roles, levels: Levels, objective: Objective, eta: Eta, space: Space,
        consistency: float,
    ) -> None:  # fmt: skip
        """See ``_Dmd``; and how the error is weighed, and the weight of consistency."""
        super().__init__(roles, levels, objective, eta)
        self.space, self.consistency = space, consistency

    @property
    def parts(self) -> tuple[str, ...]:
        """See ``Loss``."""
        return ("fake", "consistency") if self.consistency else ("fake",)

    def __call__(self, model: FewStepGenerator, batch: Batch) -> dict[str, Tensor]:
        """See ``Loss``; the caller is in the role of the fake until the backward pass is over."""
        (rows,) = batch.values()
        told, extra = rows.conditioning, rows.extra
        with torch.no_grad(), self.roles("student") as student:
            x, before, above = self.sample(student, rows)
        time = self.times(extra["uniform"][:, 0], above)
        after = self.levels.at(time)
        x_t, added = renoised(x, extra["renoise"], before, after)
        x0, e = self.levels.estimates(model, x_t, time, told)
        losses = {"fake": fake_loss(e, extra["renoise"], after, added, self.space)}
        if not self.consistency:
            return losses
        near = (time - (extra["uniform"][:, 1] * _NEAREST).floor() - 1).clamp(min=0)
        below, found = self.levels.at(near), []
        for name in ("first", "second") if self.eta else ("first",):
            with torch.no_grad():
                there = stochastic_step(x0, e, extra[name], self.eta, after, below)
            found.append(self.levels.estimates(model, there, near, told)[0])
        second = found[1] if self.eta else None
        return losses | {"consistency": self.consistency * consistency_loss(x0, found[0], second)}


class StudentLoss(_Dmd):
    """What moves the student's samples from where the fake says to where the teacher says."""

    parts = ("dmd",)

    def __init__(
        self, roles: Roles, levels: Levels, objective: Objective, eta: Eta, guidance: float
    ) -> None:
        """See ``_Dmd``; and the teacher's classifier-free guidance."""
        super().__init__(roles, levels, objective, eta)
        self.guidance = guidance

    def __call__(self, model: FewStepGenerator, batch: Batch) -> dict[str, Tensor]:
        """See ``Loss``."""
        (rows,) = batch.values()
        x, before, above = self.sample(model, rows)
        return {"dmd": self.match(x, before, above, rows)}

    def match(self, x: Tensor, before: Level, above: float, rows: Rows) -> Tensor:
        """The loss of samples x [B, C, h, w] at a level, a scalar."""
        told, extra = rows.conditioning, rows.extra
        with torch.no_grad():
            time = self.times(extra["uniform"][:, 0], above)
            after = self.levels.at(time)
            x_t, _ = renoised(x, extra["renoise"], before, after)
            with self.roles("teacher") as teacher:
                theirs = self.levels.estimates(teacher, x_t, time, told, self.guidance)
            with self.roles("fake") as fake:
                fakes = self.levels.estimates(fake, x_t, time, told)
            x_teacher, x_fake = (
                stochastic_step(*found, extra["transition"], self.eta, after, before)
                for found in (theirs, fakes)
            )
        return matching_loss(x, x_teacher, x_fake)
