"""The noises of prompts that score best by rewards, a batch at a time."""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oneshot_fast.data.sizes import Resolution, size_of
from oneshot_fast.errors import require
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.noise.rotation import angles_between
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.seeds import gaussian, record_seed
from oneshot_fast.search.candidates import best_of_n, drawing
from oneshot_fast.search.gradient import Search
from oneshot_fast.search.movers.registry import check_fits
from oneshot_fast.search.options import SearchOptions
from oneshot_fast.search.problem import Evaluation, Problem, penalised
from oneshot_fast.search.samples import Sample
from oneshot_fast.search.solver import Solved, Solver, in_order


@dataclass(frozen=True)
class Optimized:
    """What was found for one sample; tensors are on the CPU.

    Attributes:
        sample: The sample.
        seed: Of the noise the gradients started at, which may have been chosen.
        first: What was found first: of the candidates, or by gradients.
        last: What was found last: by gradients, or of the candidates.
        angle: Degrees between the best noise and that of ``seed``.
        images: [3, H, W] uint8 by name: initial, best and step-NNN.
    """

    sample: Sample
    seed: int
    first: Solved[Sample]
    last: Solved[Sample]
    angle: float
    images: dict[str, Tensor]

    @property
    def index(self) -> int:
        return self.sample.index

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.last.tensors

    @property
    def initial(self) -> dict[str, float]:
        """Every reward's score of the base noise, and their weighted sum as "total"."""
        return {name: curve[0] for name, curve in self.first.scores.items()}

    @property
    def best(self) -> dict[str, float]:
        """Scores of the best noise, and their weighted sum."""
        return {name: curve[self.last.best_step] for name, curve in self.last.scores.items()}

    @property
    def is_finite(self) -> bool:
        """Whether no score was NaN or infinite."""
        return self.last.is_finite and all(map(math.isfinite, self.initial.values()))


class RewardSearch:
    """Finds the noises of many samples, a batch at a time."""

    def __init__(
        self,
        generator: Generator,
        rewards: WeightedRewards,
        options: OptimizeOptions,
        *,
        resolution: Resolution | None = None,
        save_steps: Sequence[int] = (),
    ) -> None:
        """Bind what all samples share; images of the gradient steps ``save_steps`` are kept.

        Raises:
            UserError: If an option makes no sense or does not fit the latent, or the method needs
                gradients and a reward has none.
        """
        options.check()
        require(
            rewards.differentiable or options.mover is None,
            "a reward here has no gradient; use --method best_of_n (em: --assign_method best_of_n)",
        )
        self.generator, self.rewards, self.options = generator, rewards, options
        self.size = size_of(resolution or generator.image_size)
        check_fits(options, self.noise_shape)
        self.save_steps = tuple(save_steps)
        self.on_evaluations: Callable[[int], object] = lambda count: None
        self._draws = self._solver(self._draw, drawing(options.draws))
        self._moves = self._solver(self._move, options)

    def _solver(
        self, start: Callable[[Sequence[Sample]], Search], options: SearchOptions
    ) -> Solver[Sample]:
        return Solver(
            start,
            options,
            sys.maxsize,  # a batch is what ``solve`` is given
            fixed_size=self.generator.is_compiled,
            of="image",
            advice="use --checkpointing full, --decoder_tiling, --decoder_id or a smaller "
            "--resolution",
            on_evaluations=lambda count: self.on_evaluations(count),
        )

    def solve(self, samples: Sequence[Sample]) -> list[Optimized]:
        """The best noise of every sample; smaller batches where memory runs out.

        Raises:
            UserError: If not even one sample fits into memory.
        """
        first: list[Solved[Sample]] = []
        starts = [*samples]
        if self.options.choice:
            first = in_order(self._draws.solve([samples]))
            starts = [
                dataclasses.replace(one.item, seed=one.item.seed_of(one.best_step)) for one in first
            ]
        last = in_order(self._moves.solve([starts])) if self.options.mover else first
        return [
            self._optimized(sample, start.seed, one, other)
            for sample, start, one, other in zip(samples, starts, first or last, last, strict=True)
        ]

    def start(self, samples: Sequence[Sample]) -> Search:
        """The search for ``samples``: by gradients, or among candidates where there are none."""
        return (self._move if self.options.mover else self._draw)(samples)

    def _draw(self, samples: Sequence[Sample]) -> Search:
        """The candidates of ``samples``; the first ones are the base noises."""

        def draw(k: int) -> Tensor:
            return self._noises([sample.seed_of(k) for sample in samples])

        return best_of_n(
            self._problem(samples), self._evaluate, draw, self.options.draws, images_at=[0]
        )

    def _move(self, samples: Sequence[Sample]) -> Search:
        problem, images_at = self._problem(samples), {0, *self.save_steps}
        return Search(problem, self.options, self._evaluate, images_at=[*images_at])

    def _evaluate(self, z: Tensor, problem: Problem) -> Evaluation:
        """Minus the rewards and the penalties of noises [B, C, h, w]; scores, in all as "total"."""
        images = self.generator.images(self.generator.latents(z, problem.conditioning))
        scores = self.rewards.scores(images, list(problem.prompts))
        total = self.rewards.total(scores)
        loss = penalised(-total, z, problem.eps, self.options)
        pixels = (images.detach() * 255).round().to(torch.uint8)
        return Evaluation(loss, {**scores, "total": total}, pixels)

    def _problem(self, samples: Sequence[Sample]) -> Problem:
        prompts = [sample.prompt for sample in samples]
        eps = self._noises([sample.seed for sample in samples])
        later = [record_seed(sample.id) for sample in samples]
        return Problem(eps, self.generator.told(prompts, later), prompts)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of a noise, [C, h, w]."""
        return self.generator.noise_shape(*self.size)

    def _noises(self, seeds: Sequence[int]) -> Tensor:
        return gaussian(seeds, self.noise_shape).to(self.generator.device)

    def _optimized(
        self, sample: Sample, seed: int, first: Solved[Sample], last: Solved[Sample]
    ) -> Optimized:
        noises = gaussian([seed], self.noise_shape).double(), last.z[None].double()
        kept = {f"step-{k:03d}": last.images[k] for k in self.save_steps if k in last.images}
        assert last.best_image is not None
        images = {"initial": first.images[0], "best": last.best_image, **kept}
        return Optimized(sample, seed, first, last, angles_between(*noises).item(), images)
