"""Who goes on: the rules of pruning and steering over the steps of a wave of images.

W images, M rows of each that are alive. A rule is of one wave; ``METHODS`` makes them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oneshot_fast.jobs.scale.options import ScaleOptions
from oneshot_fast.runtime.seeds import derived_seed
from oneshot_fast.search.particles import Particles, drawn, shares, systematic
from oneshot_fast.search.pruning import Floats, Ints, survivors


@dataclass(frozen=True)
class Counts:
    """What an image takes: evaluations, and verifications on the way and in the last step."""

    evaluations: int
    early: int
    last: int

    def cost(self, evaluation: float, early: float, last: float) -> float:
        """By what each costs."""
        return self.evaluations * evaluation + self.early * early + self.last * last


class Rule(ABC):
    """Pruning or steering of one wave.

    Attributes:
        n: Candidates, particles or lines.
        steps: S.
        keeps_seeds: Whether a row goes on with the seed of its ancestor, not of its place.
    """

    keeps_seeds = True

    def __init__(
        self, options: ScaleOptions, n: int, steps: int, seeds: Sequence[int] = (0,)
    ) -> None:
        """Bind a wave of images with these base ``seeds``, of ``n`` candidates each."""
        self.options, self.n, self.steps, self._seeds = options, n, steps, seeds

    @property
    def scored(self) -> tuple[int, ...]:
        """Steps whose estimates are scored; the last one always is."""
        return (*self.options.pruning.after, self.steps - 1)

    def branches(self, step: int) -> int:
        """Rows that each row becomes before it is evaluated in ``step``."""
        return 1

    @abstractmethod
    def counts(self) -> Counts:
        """What an image takes."""

    @abstractmethod
    def choose(self, step: int, scores: Floats) -> Ints:
        """Rows that go on, [W, m] positions, by the scores [W, M] of a step.

        After the last step it is the winner, m = 1.
        """

    def said(self, image: int) -> dict[str, Any]:
        """What is told of an image besides."""
        return {}

    def _uniforms(self, *names: object) -> Floats:
        return np.array(
            [np.random.default_rng(derived_seed(seed, *names)).random() for seed in self._seeds]
        )


class Prune(Rule):
    """The best shares of the candidates go on; without a prune, Best-of-N."""

    def counts(self) -> Counts:
        plan = self.options.pruning
        evaluations, scores = plan.evaluations(self.n, self.steps)
        last = plan.counts(self.n)[-1]
        return Counts(evaluations, scores - last, last)

    def choose(self, step: int, scores: Floats) -> Ints:
        if step == self.steps - 1:
            return survivors(scores, 1)
        plan = self.options.pruning
        return survivors(scores, plan.counts(self.n)[plan.after.index(step) + 1])


class Steer(Rule):
    """FK steering: particles are copied by their weights, each place keeps its own later noise."""

    keeps_seeds = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Like any rule; all weights begin equal."""
        super().__init__(*args, **kwargs)
        of = self.options
        self._weights = Particles(len(self._seeds), self.n, of.potential, of.inverse_temperature)
        self._copied: list[np.ndarray] = []

    def counts(self) -> Counts:
        return Counts(self.n * self.steps, self.n * len(self.options.after), self.n)

    def choose(self, step: int, scores: Floats) -> Ints:
        weights, is_last = self._weights, step == self.steps - 1
        weights.weigh(scores, is_last)
        if is_last:
            weights.finish()
            if self.options.select == "best":
                return survivors(scores, 1)
            return drawn(weights.log_weights, self._uniforms("select"))[:, None]
        few = weights.ess() < self.options.resample_below * self.n
        few &= np.isfinite(weights.log_weights).any(-1)
        ancestors = systematic(weights.log_weights, self._uniforms("resample", step))
        rows = np.where(few[:, None], ancestors, np.arange(self.n))
        weights.resample(ancestors, few)
        self._copied.append(few)
        return rows

    def said(self, image: int) -> dict[str, Any]:
        return {
            "log_z": float(self._weights.log_z[image]),
            "weights": shares(self._weights.log_weights)[image].tolist(),
            "resampled": [bool(few[image]) for few in self._copied],
        }


class Branch(Rule):
    """SVDD: each line draws several next samples, and goes on with one by its estimate's reward."""

    @property
    def scored(self) -> tuple[int, ...]:
        branched = {0, *(step + 1 for step in self.options.after)}
        return tuple(sorted({*branched, self.steps - 1}))

    def branches(self, step: int) -> int:
        return self.options.branches if step == 0 or step - 1 in self.options.after else 1

    def counts(self) -> Counts:
        rows = [self.n * self.branches(step) for step in range(self.steps)]
        return Counts(sum(rows), sum(rows[step] for step in self.scored[:-1]), rows[-1])

    def choose(self, step: int, scores: Floats) -> Ints:
        if step == self.steps - 1:
            return survivors(scores, 1)
        of_line = scores.reshape(len(scores), self.n, -1)
        known = np.where(np.isfinite(of_line), of_line, -np.inf)
        alpha = self.options.temperature
        if alpha == 0:
            picked = known.argmax(-1)
        else:
            uniforms = np.stack([self._uniforms("pick", step, j) for j in range(self.n)], 1)
            picked = drawn(known / alpha, uniforms)
        return np.arange(self.n) * of_line.shape[-1] + picked


METHODS: dict[str, type[Rule]] = {
    "prune": Prune, "best_of_n": Prune, "fk": Steer, "svdd": Branch,
}  # fmt: skip
