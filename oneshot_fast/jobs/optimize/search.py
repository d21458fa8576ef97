"""The noises of prompts that score best by rewards, a batch at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oneshot_fast.errors import UserError, require
from oneshot_fast.jobs.optimize.objective import Objective
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.noise.rotation import angles_between
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.search.gradient import Problem, Search

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator
    from oneshot_fast.rewards import WeightedRewards


@dataclass(frozen=True)
class Sample:
    """One image to make: its name, place in the run, prompt and the seed of its base noise."""

    id: str
    index: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Optimized:
    """What was found for one sample; tensors are on the CPU.

    Attributes:
        sample: The sample.
        seed: Of the noise the search started at, which may have been chosen.
        z: Best noise, [C, h, w] float32, N(0, 1) units.
        q: Its rotation, if the method has one.
        losses: Of every step; without gradient steps, of every candidate.
        scores: Every reward's score at those, by name, without its weight.
        first: Every reward's score of the base noise, and their weighted sum as "total".
        best_step: Where the loss was lowest.
        angle: Degrees between ``z`` and the noise of ``seed``.
        images: [3, H, W] uint8 by name: initial, best and step-NNN.
    """

    sample: Sample
    seed: int
    z: Tensor
    q: Tensor | None
    losses: list[float]
    scores: dict[str, list[float]]
    first: dict[str, float]
    best_step: int
    angle: float
    images: dict[str, Tensor]

    @property
    def best(self) -> dict[str, float]:
        """Scores of the best noise, and their weighted sum."""
        return {name: curve[self.best_step] for name, curve in self.scores.items()}

    @property
    def is_finite(self) -> bool:
        """Whether no score was NaN or infinite."""
        return all(map(math.isfinite, [*self.losses, *self.first.values()]))


class RewardSearch:
    """Finds the noises of many samples, a batch at a time."""

    def __init__(
        self,
        generator: Generator,
        rewards: WeightedRewards,
        options: OptimizeOptions,
        *,
        resolution: int | None = None,
        save_steps: Sequence[int] = (),
        on_evaluations: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Bind what all samples share.

        Args:
            generator: Its weights stay fixed.
            rewards: Score images; differentiable unless the method is best_of_n.
            options: How a noise is searched.
            resolution: Image side in pixels; by default the generator's own.
            save_steps: Gradient steps whose images are kept.
            on_evaluations: Called with how many evaluations were done.

        Raises:
            UserError: If an option makes no sense, or the method needs gradients and a reward has
                none.
        """
        options.check()
        require(
            rewards.differentiable or options.mover is None,
            "a reward here has no gradient; use --method best_of_n (em: --assign_method best_of_n)",
        )
        self.generator, self.rewards, self.options = generator, rewards, options
        self.side = resolution or generator.image_size
        self.save_steps = tuple(save_steps)
        self.on_evaluations = on_evaluations

    def solve(self, samples: Sequence[Sample]) -> list[Optimized]:
        """The best noise of every sample; smaller batches where memory runs out.

        Raises:
            UserError: If not even one sample fits into memory.
        """
        try:
            return self._solve(samples)
        except torch.OutOfMemoryError:
            if len(samples) == 1:
                raise UserError(
                    "out of memory with a single image; use --checkpointing full, "
                    "--decoder_tiling, --decoder_id or a smaller --resolution"
                ) from None
        if self.generator.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = (len(samples) + 1) // 2
        return [*self.solve(samples[:middle]), *self.solve(samples[middle:])]

    def _solve(self, samples: Sequence[Sample]) -> list[Optimized]:
        problem = self.problem(samples)
        seeds = [sample.seed for sample in samples]
        first = None
        if self.options.draws > 1:
            first, chosen = self._draw(samples, problem)
            seeds = [self._seed(s, k) for s, k in zip(samples, chosen, strict=True)]
            problem = dataclasses.replace(problem, eps=self._noises(seeds))
        if not self.options.gradient_steps:
            if first is None:
                first, _ = self._draw(samples, problem)
            return self._found(samples, seeds, problem.eps, problem.eps, None, first, first)
        objective = self.objective(samples)
        search = self.start(problem, objective)
        for step in range(self.options.gradient_steps + 1):
            search.advance(is_last=step == self.options.gradient_steps)
            self.on_evaluations(len(samples))
        result = search.result()
        return self._found(
            samples, seeds, problem.eps, result.z, result.q, first or objective, objective
        )

    def problem(self, samples: Sequence[Sample]) -> Problem:
        """Base noises and prompts of ``samples``; there is no target, so the noises stand there."""
        eps = self._noises([sample.seed for sample in samples])
        prompts = self.generator.encode_prompts([sample.prompt for sample in samples])
        return Problem(eps, prompts, latents=eps)

    def objective(self, samples: Sequence[Sample]) -> Objective:
        """The loss of ``samples``."""
        prompts = [sample.prompt for sample in samples]
        return Objective(self.generator, self.rewards, self.options, prompts, self.save_steps)

    def start(self, problem: Problem, objective: Objective) -> Search:
        """The search by gradients."""
        return Search(problem, self.options, objective)

    @torch.no_grad()
    def _draw(self, samples: Sequence[Sample], problem: Problem) -> tuple[Objective, list[int]]:
        """All candidates of all samples, and which is best."""
        prompts = [sample.prompt for sample in samples]
        objective = Objective(self.generator, self.rewards, self.options, prompts)
        for k in range(self.options.draws):
            eps = self._noises([self._seed(sample, k) for sample in samples])
            objective(eps, dataclasses.replace(problem, eps=eps))
            self.on_evaluations(len(samples))
        return objective, objective.losses.nan_to_num(math.inf).argmin(0).tolist()

    def _seed(self, sample: Sample, k: int) -> int:
        """Of candidate ``k``; the first is the base noise."""
        return derived_seed(sample.seed, "candidate", k) if k else sample.seed

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of a noise, [C, h, w]."""
        return self.generator.noise_shape(self.side, self.side)

    def _noises(self, seeds: Sequence[int]) -> Tensor:
        return gaussian(seeds, self.noise_shape).to(self.generator.device)

    def _found(
        self,
        samples: Sequence[Sample],
        seeds: Sequence[int],
        eps: Tensor,
        z: Tensor,
        q: Tensor | None,
        first: Objective,
        last: Objective,
    ) -> list[Optimized]:
        """Results on the CPU; waits for the device."""
        losses, scores = last.losses.T.tolist(), _curves(last.scores())
        initial = _curves({name: curve[:1] for name, curve in first.scores().items()})
        angles = angles_between(eps.double(), z.double()).tolist()
        best_step = last.losses.nan_to_num(math.inf).argmin(0).tolist()
        kept = {f"step-{k:03d}": x for k, x in last.images.items() if k in self.save_steps}
        assert last.best_images is not None
        images = {"initial": first.images[0], "best": last.best_images, **kept}
        z, images = z.cpu(), {name: batch.cpu() for name, batch in images.items()}
        q = None if q is None else q.cpu()
        return [
            Optimized(
                sample,
                seeds[k],
                z[k],
                None if q is None else q[k],
                losses[k],
                {name: rows[k] for name, rows in scores.items()},
                {name: rows[k][0] for name, rows in initial.items()},
                best_step[k],
                angles[k],
                {name: batch[k] for name, batch in images.items()},
            )
            for k, sample in enumerate(samples)
        ]


def _curves(scores: dict[str, Tensor]) -> dict[str, list[list[float]]]:
    return {name: values.T.tolist() for name, values in scores.items()}
