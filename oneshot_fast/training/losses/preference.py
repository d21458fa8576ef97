"""What objectives on preferences share: a loss over groups of images of one prompt.

A row of a batch is a group: noises [N, C, h, w] of one prompt, and in ``extra`` what was drawn and
scored around them. Policy and base generator are evaluated on the same, the base without gradient.
Log-probabilities are float32 sums over the D elements of a latent, in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.few_step import FewStepGenerator, Transition
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.losses.preserve import Preserve
from oneshot_fast.training.reference import Reference

Extra = Mapping[str, Any]
Found = tuple[Tensor, dict[str, Tensor]]  # a loss [G], and what else is told of each group, [G]
SAMPLED = ("sampled", "sampled max", "ties", "moved")  # measures of every objective


class Objective(Protocol):
    """What is lowered on G groups.

    Attributes:
        measures: Names of what it tells besides.
    """

    @property
    def measures(self) -> tuple[str, ...]: ...

    def __call__(self, policy: Tensor, base: Tensor, extra: Extra) -> Found:
        """Loss and measures of each group; a mean over groups is that of the batch.

        Args:
            policy: What a ``Policy`` says of the generator that is trained, [G, K, ...].
            base: The same of the base generator, without gradient.
            extra: Of the groups, [G, ...] by name.
        """


class Policy(Protocol):
    """How a generator is looked at."""

    def distance(self, apart: Tensor, extra: Extra) -> Tensor:
        """That of clean latents from the base's, [G, N, ...] -> [G], to be weighed."""

    def __call__(self, generator: Generator, rows: Rows) -> tuple[Tensor, Tensor]:
        """What an objective compares, [G, K, ...], and clean latents [G, N, ..., C, h, w].

        By the distance of the latter from the base's is told how far a training went.
        """


class CleanLatents:
    """For objectives on what is made: the clean latents [G, N, C, h, w] themselves."""

    def distance(self, apart: Tensor, extra: Extra) -> Tensor:
        """Mean square."""
        return apart.square().flatten(1).mean(1)

    def __call__(self, generator: Generator, rows: Rows) -> tuple[Tensor, Tensor]:
        """See ``Policy``."""
        groups, count = rows.noise.shape[:2]
        told = rows.conditioning.select(torch.arange(groups).repeat_interleave(count))
        x0 = generator.latents(rows.noise.flatten(0, 1), told).unflatten(0, (groups, count))
        return x0, x0


class NoisedPairs(CleanLatents):
    """For given images at a step of several: what it tells of their latents, noised.

    ``extra`` has the samples "noised" [G, N, C, h, w] that step "step" begins with, a list of the
    same number G times, and "root" [G], which the clean latents that objectives see are times: 1
    over the level of noise makes of their distance that of the noise, or of a flow's velocity.
    """

    def __call__(self, generator: Generator, rows: Rows) -> tuple[Tensor, Tensor]:
        """See ``Policy``."""
        assert isinstance(generator, FewStepGenerator)
        x, k = rows.extra["noised"], rows.extra["step"][0]
        groups, count = x.shape[:2]
        told = rows.conditioning.select(torch.arange(groups).repeat_interleave(count))
        x0 = generator.estimate(k, x.flatten(0, 1), told).unflatten(0, (groups, count))
        return rows.extra["root"].view(-1, 1, 1, 1, 1) * x0, x0


@dataclass(frozen=True)
class Actions:
    """For one step, which has no likelihood: that of actions a = x0 + std z, [G, K, 1].

    ``extra`` has "actions" [G, K, C, h, w], K / N of them around each of the N clean latents.

    Attributes:
        std: In deviations of the latents.
        pool: z is one number for each block of so many latent pixels a side and channel, so that
            the likelihood is that of the means of blocks.
    """

    std: float
    pool: int = 1

    def distance(self, apart: Tensor, extra: Extra) -> Tensor:
        """The KL divergence of the actions, in nats: |x0 - base|^2 / (2 std^2)."""
        return self.blocks(apart).square().flatten(2).sum(2).mean(1) / (2 * self.std**2)

    def __call__(self, generator: Generator, rows: Rows) -> tuple[Tensor, Tensor]:
        """See ``Policy``."""
        x0, _ = CleanLatents()(generator, rows)
        actions = rows.extra["actions"]
        means = x0.repeat_interleave(actions.shape[1] // x0.shape[1], 1)
        found = log_prob(self.blocks(actions), self.blocks(means), self.std)
        return found[:, :, None], x0

    def blocks(self, x: Tensor) -> Tensor:
        """Their means, [G, N, C, h, w] -> [G, N, C, ceil(h / pool), ceil(w / pool)]."""
        if self.pool == 1:
            return x
        found = F.avg_pool2d(x.flatten(0, 1), self.pool, ceil_mode=True)
        return found.unflatten(0, x.shape[:2])


class Steps:
    """For several steps: the log-probability of each one that draws noise, [G, K, S].

    ``extra`` has "samples" [G, K, T + 1, C, h, w], all of a sampler's from the first noise on, and
    "scales" [G, S]: what the squared distance of a step's clean latents is times in its KL. The
    last step draws nothing, so that S is T - 1.
    """

    def distance(self, apart: Tensor, extra: Extra) -> Tensor:
        """The KL divergence of what is drawn, in nats, summed over steps."""
        squares = apart.square().flatten(3).sum(3).mean(1)  # [G, S]
        return (squares * extra["scales"]).sum(1)

    def __call__(self, generator: Generator, rows: Rows) -> tuple[Tensor, Tensor]:
        """See ``Policy``; the clean latents are the steps' estimates, [G, K, S, C, h, w]."""
        assert isinstance(generator, FewStepGenerator)
        samples = rows.extra["samples"]
        groups, count = samples.shape[:2]
        told = rows.conditioning.select(torch.arange(groups).repeat_interleave(count))
        found, clean = [], []
        for k, step in enumerate(generator.steps(samples.shape[3:])):
            if not step.noise:
                continue
            x, after = (samples[:, :, j].flatten(0, 1) for j in (k, k + 1))
            made = generator.transition(k, x, told)
            output = (made.mean - step.keep * x) / step.change
            found.append(made.log_probability(after).unflatten(0, (groups, count)))
            estimate = step.skip * x - step.sigma * output
            clean.append(estimate.unflatten(0, (groups, count)))
        return torch.stack(found, 2), torch.stack(clean, 2)


def kl_scales(generator: FewStepGenerator, shape: Sequence[int]) -> Tensor:
    """Of the steps that draw noise, [S]: (change / sigma)^2 / (2 std^2), see ``Steps``."""
    steps = [step for step in generator.steps(shape) if step.noise]
    return torch.tensor([(s.change / s.sigma / s.noise) ** 2 / 2 for s in steps])


class PreferenceLoss:
    """An objective on the group "preference", and the preserve losses."""

    parts = ("preference", "preserve")

    def __init__(
        self,
        objective: Objective,
        policy: Policy,
        kl_weight: float,
        preserve: Preserve,
        sampled: bool = True,
    ) -> None:
        """Lower both; ``reference`` has to be set before the first call.

        Args:
            objective: On preferences.
            policy: What it compares.
            kl_weight: Of the policy's distance to the base, which is added to it.
            preserve: On the group "preserve".
            sampled: Whether ``extra`` has the "rewards" [G, K] of drawn images, and "ties" [G].
        """
        self.objective, self.policy = objective, policy
        self.kl_weight, self.preserve = kl_weight, preserve
        self.reference: Reference | None = None
        self.sampled = sampled
        self.measures = (*objective.measures, *(SAMPLED if sampled else SAMPLED[-1:]))

    def __call__(self, model: Generator, batch: Batch) -> dict[str, Tensor]:
        """See ``Loss``."""
        found: dict[str, Tensor] = {}
        if "preference" in batch:
            rows = batch["preference"]
            loss, measures = self._preference(model, rows)
            found |= {"preference": loss.mean(), **{k: v.mean() for k, v in measures.items()}}
        if "preserve" in batch:
            rows = batch["preserve"]
            made = model.predict(rows.noise, rows.conditioning)
            found["preserve"] = self.preserve(model, made, rows)
        return found

    def _preference(self, model: Generator, rows: Rows) -> Found:
        assert self.reference is not None
        with torch.no_grad(), self.reference.generator() as generator:
            base, start = self.policy(generator, rows)
        policy, x0 = self.policy(model, rows)
        loss, measures = self.objective(policy, base, rows.extra)
        apart = x0 - start
        if self.kl_weight:
            loss = loss + self.kl_weight * self.policy.distance(apart, rows.extra)
        measures = measures | {"moved": apart.detach().square().flatten(1).mean(1).sqrt()}
        if self.sampled:
            mean, largest = mean_and_max(rows.extra["rewards"])
            measures |= {"sampled": mean, "sampled max": largest, "ties": rows.extra["ties"]}
        return loss, measures


def log_prob(action: Tensor, mean: Tensor, std: float) -> Tensor:
    """Logarithm of N(action; mean, std^2) in nats, without constants, as ``Transition`` has it.

    Args:
        action: [..., C, h, w], taken as given; the result is [...].
        mean: Of the same shape.
        std: Above 0.

    Raises:
        ValueError: If ``std`` is not positive: a deterministic step has no likelihood.
    """
    if not std > 0:
        raise ValueError(f"std is {std}: a step without noise has no likelihood")
    of = Transition(mean.flatten(0, -4), std)
    return of.log_probability(action.detach().flatten(0, -4)).view(action.shape[:-3])


def preferences(rewards: Tensor) -> Tensor:
    """Of pairs [..., 2]: +1 where the first is better, -1 where the second is, 0 for ties.

    A reward that is not finite makes a tie.
    """
    first, second = rewards.unbind(-1)
    return (first - second).sign().nan_to_num(0.0) * rewards.isfinite().all(-1)


def advantages(rewards: Tensor, largest: float = 10.0) -> Tensor:
    """(r - mean) / (std + 1e-6) within each group [..., K], clamped; 0 where r is not finite."""
    good = rewards.isfinite()
    count = good.sum(-1, keepdim=True).clamp(min=1)
    known = rewards.where(good, torch.zeros_like(rewards))
    centred = (known - known.sum(-1, keepdim=True) / count) * good
    std = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    return (centred / (std + 1e-6)).clamp(-largest, largest)


def mean_and_max(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Of the finite rewards of each group [G, K], [G] each; 0 of none."""
    good = rewards.isfinite()
    total = rewards.where(good, torch.zeros_like(rewards)).sum(1)
    largest = rewards.where(good, torch.full_like(rewards, -torch.inf)).amax(1)
    count = good.sum(1)
    return total / count.clamp(min=1), largest.where(count > 0, torch.zeros_like(largest))
