"""Pruned Best-of-N: which of many noises live through the steps of a generator, and at what cost.

Rules on arrays, as in TTSnap (arXiv 2511.22242), with its costs and its winners' numbers corrected.
P prompts, N candidates of each in a pool, n of them used, S steps, R rewards, T draws.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from oneshot_fast.errors import require

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CostRule = Literal["counts", "ratio", "original"]
_WORK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Cost:
    """What one candidate costs, in any unit.

    Attributes:
        evaluation: One evaluation of the denoiser, both halves of guidance together.
        verification: Decoding what a step predicts, and all of its scores.
        steps: S.
        rule: "counts" counts candidates; "ratio" takes the product of the ratios instead;
            "original" is "ratio" with one evaluation too few, to compare with published numbers.
    """

    evaluation: float
    verification: float
    steps: int
    rule: CostRule = "counts"


@dataclass(frozen=True)
class Schedule:
    """After which steps, from 0, which shares of the candidates are kept; empty: Best-of-N."""

    after: tuple[int, ...] = ()
    keep: tuple[float, ...] = ()

    def check(self, steps: int) -> None:
        """Raise UserError unless it is a schedule of ``steps`` steps."""
        after, keep = self.after, self.keep
        require(
            len(after) == len(keep),
            f"after names {len(after)} steps, keep {len(keep)} ratios; give one ratio per step",
        )
        rising = all(a < b for a, b in itertools.pairwise(after))
        require(rising, f"after is {list(after)}; give steps that increase")
        for step in after:
            require(
                0 <= step <= steps - 2,
                f"after has step {step}; with {steps} steps give 0 to {steps - 2}: the last one "
                "selects",
            )
        for ratio in keep:
            require(0 < ratio <= 1, f"keep has {ratio}; give ratios above 0 and at most 1")

    def counts(self, n: int) -> list[int]:
        """How many of ``n`` candidates begin, and live on after every prune: K + 1 numbers."""
        alive = [n]
        for ratio in self.keep:
            alive.append(max(1, round(alive[-1] * ratio)))
        return alive

    def evaluations(self, n: int, steps: int) -> tuple[int, int]:
        """Evaluations and verifications that ``n`` candidates of a prompt take."""
        ends = (*self.after, steps - 1)
        alive = self.counts(n)
        lengths = [end - start for start, end in zip((-1, *ends), ends, strict=False)]
        return sum(m * k for m, k in zip(alive, lengths, strict=True)), sum(alive)

    def cost(self, n: int, cost: Cost) -> float:
        """What ``n`` candidates of a prompt cost."""
        if cost.rule == "counts":
            steps, scores = self.evaluations(n, cost.steps)
            return steps * cost.evaluation + scores * cost.verification
        ends = (*self.after, cost.steps - 1)
        start = 0 if cost.rule == "original" and self.after else -1
        total, share = 0.0, 1.0
        for begin, end, ratio in zip((start, *ends), ends, (*self.keep, 1.0), strict=False):
            total += share * ((end - begin) * cost.evaluation + cost.verification)
            share *= ratio
        return n * total

    def affordable(self, budget: float, cost: Cost) -> int:
        """The largest number of candidates within ``budget`` per prompt.

        Raises:
            UserError: If not even one is.
        """
        return affordable(lambda n: self.cost(n, cost), budget)


def affordable(cost: Callable[[int], float], budget: float) -> int:
    """The largest number whose cost, which must not fall, is within the budget.

    Raises:
        UserError: If not even 1 is, or more are than can be counted.
    """
    limit, least = budget * (1 + 1e-12), cost(1)
    require(
        least <= limit, f"a budget of {budget:g} is below one candidate; give at least {least:g}"
    )
    require(
        budget < least * 2**53, f"a budget of {budget:g} pays more than can be counted; give less"
    )
    low, high = 1, 2
    while cost(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low


def survivors(values: Floats, count: int) -> Ints:
    """Positions [..., count], rising, of the largest ``values`` [..., M]; of equal ones the first.

    Values that are not finite come last.
    """
    known = np.where(np.isfinite(values), values, -np.inf)
    return np.sort((-known).argsort(-1, kind="stable")[..., :count], -1)


class Draws:
    """Subsets of the candidates: the same ones for every schedule and, growing, for every size."""

    def __init__(
        self, prompts: int, pool: int, count: int, seed: int, shared_mask: bool = False
    ) -> None:
        """T = ``count`` permutations of ``pool`` candidates, whose beginnings are the subsets.

        Args:
            prompts: P.
            pool: N.
            count: T.
            seed: Of the permutations.
            shared_mask: One subset for all prompts, as TTSnap draws; else each has its own.
        """
        self.count, self._prompts, self._pool, self._seed = count, prompts, pool, seed
        self._rows = 1 if shared_mask else prompts
        is_small = 4 * count * self._rows * pool <= _WORK_BYTES
        self._kept = np.stack([*self._orders()]) if is_small else None

    def _orders(self) -> Iterator[NDArray[np.int32]]:
        """Permutations, one by one: a larger count has the draws of a smaller one."""
        draw = np.random.default_rng(self._seed)
        for _ in range(self.count):
            yield draw.random((self._rows, self._pool)).argsort(-1).astype(np.int32)

    def parts(self, n: int, width: int = 1) -> Iterator[Ints]:
        """Subsets [t, P, n] of candidates, each rising, in parts that need little memory.

        Args:
            n: Candidates of a subset.
            width: Values that are worked on per candidate.
        """
        require(1 <= n <= self._pool, f"{n} candidates, but the pool has {self._pool}")
        each = max(1, _WORK_BYTES // (8 * self._prompts * n * (width + 3)))
        orders = iter(self._orders() if self._kept is None else self._kept)
        while some := [order[:, :n] for order in itertools.islice(orders, each)]:
            order = np.sort(some, -1).astype(np.int64)
            yield np.broadcast_to(order, (len(order), self._prompts, n))


def winners(
    chosen: Ints, prune: Floats, final: Floats, alive: Sequence[int], weights: Floats | None = None
) -> Ints:
    """Pool numbers of the candidates that win.

    With one reward the largest values stay, and of equal ones the lower number. With several, each
    ranks the survivors (number of smaller values, and of equal ones with a lower number), and the
    largest sums of ranks stay, and of equal ones the lower number.

    Args:
        chosen: [T, P, n], rising.
        prune: [K, P, N, R], the rewards at every prune.
        final: [P, N, R], those at the end.
        alive: How many begin, and live on after each of K prunes.
        weights: [R], of the ranks.

    Returns:
        [T, P] int64.
    """
    survivors = chosen
    for values, count in zip(prune, alive[1:], strict=True):
        if count < survivors.shape[-1]:
            order = _order(survivors, values, weights)
            bar = np.partition(order, -count, -1)[..., -count, None]
            survivors = survivors[order >= bar].reshape(*survivors.shape[:2], count)
    best = _order(survivors, final, weights).argmax(-1)
    return np.take_along_axis(survivors, best[..., None], -1)[..., 0]


def _order(survivors: Ints, values: Floats, weights: Floats | None) -> NDArray[np.int32]:
    """A number per survivor, [T, P, m], no two alike, that is the larger the better it is."""
    rows = np.arange(len(values))[:, None]
    if values.shape[-1] == 1:  # the same for every subset
        return _places(-values[..., 0])[rows, survivors]
    ranks = values[rows, survivors].argsort(-2, kind="stable").argsort(-2)
    return _places(-(ranks @ (np.ones(ranks.shape[-1]) if weights is None else weights)))


def _places(values: Floats) -> NDArray[np.int32]:
    """Minus the place of each value in rising order, of equal ones the first comes first."""
    return -values.argsort(-1, kind="stable").argsort(-1).astype(np.int32)


def best_of_n(final: Floats, n: int) -> tuple[Floats, Floats]:
    """Exact mean and variance of the best of ``n`` out of N values without replacement.

    E = sum_k x_(k) C(k-1, n-1) / C(N, n) over the sorted values, by log-gamma.

    Args:
        final: [P, N].
        n: At most N.

    Returns:
        [P] each.
    """
    N = final.shape[-1]
    require(1 <= n <= N, f"{n} candidates, but the pool has {N}")
    shares = np.zeros(N)
    for k in range(n, N + 1):
        shares[k - 1] = math.exp(_log_choose(k - 1, n - 1) - _log_choose(N, n))
    ordered = np.sort(final, -1)
    mean = ordered @ shares
    return mean, np.maximum(ordered**2 @ shares - mean**2, 0.0)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
