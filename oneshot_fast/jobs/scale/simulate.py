"""What pruning would give on a pool of rewards, beside Best-of-N, and the schedule that pays.

Every statistic is over prompts: a mean's 95 % interval is a percentile bootstrap over them, and
differences between arms are paired over them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.integrate

from oneshot_fast.errors import require
from oneshot_fast.jobs.scale.pools import Pool
from oneshot_fast.runtime.files import read_json
from oneshot_fast.search.agreement import kendall, spearman
from oneshot_fast.search.pruning import Cost, Draws, Floats, Schedule, best_of_n, winners

_RESAMPLES, _MOST_DRAWS = 2000, 4096
_RATIOS = tuple(k / 10 for k in range(1, 9))
PUBLISHED = Schedule((2, 6, 11), (0.4, 0.4, 0.5))
_HALVING = ((2, 150), (8, 30), (32, 8), (64, 8))  # draws, and how many schedules stay


@dataclass(frozen=True)
class Arm:
    """One way to spend a budget.

    Attributes:
        schedule: When it prunes; empty: Best-of-N.
        noise_aware: Whether the noise-aware reward prunes, where the pool has it.
    """

    schedule: Schedule = Schedule()
    noise_aware: bool = False


@dataclass(frozen=True)
class Outcome:
    """What an arm gives.

    Attributes:
        n: Candidates per prompt.
        cost: Of a prompt.
        values: [P, R], every reward's mean at the winner.
        error: Standard error of the mean of the first reward by the number of draws.
    """

    n: int
    cost: float
    values: Floats
    error: float


def simulate(pool: Pool, arm: Arm, n: int, cost: Cost, draws: Draws) -> Outcome:
    """Run an arm with ``n`` candidates on subsets of the pool.

    Best-of-N of one reward is exact and takes no draws.

    Raises:
        UserError: If the pool is too small or has no values at a step.
    """
    P, _, R = pool.final.shape
    spent = arm.schedule.cost(n, cost)
    if not arm.schedule.after and R == 1:
        return Outcome(n, spent, best_of_n(pool.final[..., 0], n)[0][:, None], 0.0)
    prune = pool.prune(arm.schedule.after, arm.noise_aware)
    alive, sums, means = arm.schedule.counts(n), np.zeros((P, R)), []
    for chosen in draws.parts(n, R):
        won = pool.final[np.arange(P), winners(chosen, prune, pool.final, alive)]
        sums += won.sum(0)
        means += won[..., 0].mean(1).tolist()
    error = float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else 0.0
    return Outcome(n, spent, sums / draws.count, error)


def interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of ``values`` [P], 2,000 resamples."""
    draw = np.random.default_rng(seed)
    means = values[draw.integers(len(values), size=(_RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def curve(
    pool: Pool,
    arms: dict[str, Arm],
    budgets: Sequence[float],
    cost: Cost,
    *,
    draws: int = 64,
    seed: int = 0,
    shared_mask: bool = False,
) -> list[dict[str, Any]]:
    """A row per arm and budget: mean, interval, candidates, cost, difference to Best-of-N.

    Draws are doubled, up to 4,096, until their error is below a tenth of the interval.

    Args:
        pool: Rewards.
        arms: By name; "best_of_n" is added.
        budgets: Per prompt.
        cost: Of a candidate.
        draws: Subsets of the pool to begin with.
        seed: Of the draws.
        shared_mask: One subset for all prompts, as TTSnap draws; else each has its own.

    Raises:
        UserError: If a budget is below one candidate.
    """
    rows = []
    P, N, _ = pool.final.shape
    subsets = cache(lambda count: Draws(P, N, count, seed, shared_mask))

    for budget in budgets:
        best: Floats | None = None
        for name, arm in ({"best_of_n": Arm()} | arms).items():
            wanted = arm.schedule.affordable(budget, cost)
            n = min(wanted, N)
            count = draws
            while True:
                found = simulate(pool, arm, n, cost, subsets(count))
                low, high = interval(found.values[:, 0])
                if found.error <= (high - low) / 10 or 2 * count > _MOST_DRAWS:
                    break
                count *= 2
            row = {
                "arm": name, "budget": budget, "n": n, "pool_too_small": wanted > n,
                "cost": found.cost, "mean": float(found.values[:, 0].mean()), "low": low,
                "high": high, "draw_error": found.error,
                "rewards": dict(zip(pool.rewards, found.values.mean(0).tolist(), strict=True)),
            }  # fmt: skip
            if best is None:
                best = found.values[:, 0]
            else:
                row["gain"] = gain_of(found.values[:, 0] - best)
            rows.append(row)
    return rows


def measured(
    pool: Pool, folders: Sequence[Path], cost: Cost, *, draws: int = 1024, seed: int = 0
) -> list[dict[str, Any]]:
    """What finished runs of `scale run` gave, beside what the pool says of their schedules.

    Args:
        pool: Rewards, of the same model and reward.
        folders: Of the runs.
        cost: Of a candidate.
        draws: Subsets of the pool.
        seed: Of the draws.

    Raises:
        UserError: If a folder has no finished run that the pool can tell of.
    """
    P, N, _ = pool.final.shape
    subsets, rows = Draws(P, N, draws, seed), []
    for folder in folders:
        path = folder / "metrics_summary.json"
        require(path.is_file(), f"{folder} has no finished `scale run`: no {path.name}")
        summary = read_json(path)
        run, name = summary["settings"], pool.rewards[0]
        require(
            run["method"] in ("prune", "best_of_n"),
            f"{folder} is steered by {run['method']}, which no pool can tell; leave it out",
        )
        require(
            len(pool.rewards) == 1 and name in summary["rewards"],
            f"{folder} was judged by {', '.join(summary['rewards'])}, not by the pool's "
            f"{', '.join(pool.rewards)}",
        )
        require(
            run["num_inference_steps"] == pool.num_steps,
            f"{folder} has {run['num_inference_steps']} steps, the pool {pool.num_steps}",
        )
        aware = bool(run["prune_rewards"])
        require(
            not aware or pool.noise_aware is not None,
            f"{folder} was pruned by another reward, and the pool has no noise-aware one",
        )
        pruned = Arm(Schedule(tuple(run["after"]), tuple(run["keep"])), aware)
        arms = [("pruned" if run["after"] else "best_of_n", pruned, summary)]
        if "compare" in summary:
            arms.append(("best_of_n", Arm(), summary["compare"]))
        for arm, how, found in arms:
            n = found["candidates"]
            require(n <= N, f"{folder} has {n} candidates, the pool only {N}")
            told = simulate(pool, how, n, cost, subsets).values[:, 0]
            low, high = interval(told)
            rows.append({
                "run": str(folder), "arm": arm, "n": n, "simulated": float(told.mean()),
                "simulated_low": low, "simulated_high": high,
                "measured": found["rewards"][name], "low": found["low"], "high": found["high"],
            })  # fmt: skip
    return rows


def areas(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """How much more each arm gains than Best-of-N over the budgets of ``curve``'s rows, in %.

    Areas by Simpson's rule between an arm's means and the first mean of Best-of-N; None where
    Best-of-N has no area above it.
    """
    found = dict[str, float]()
    first = rows[0]["mean"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = sorted((row["budget"], row["mean"] - first) for row in rows if row["arm"] == arm)
        x, y = np.array(own).T
        found[arm] = float(scipy.integrate.simpson(y, x=x))
    base = found.pop("best_of_n")
    return {arm: 100 * (area - base) / base if base > 0 else None for arm, area in found.items()}


def agreement(pool: Pool) -> list[dict[str, Any]]:
    """How early rewards rank the candidates as the final ones do: a row per step and reward.

    Means of Spearman's and Kendall's (tau-b) correlations within prompts.
    """
    kinds = [("base", pool.base, pool.steps)]
    if pool.noise_aware is not None:
        kinds.append(("noise-aware", pool.noise_aware, pool.noise_aware_steps))
    return [
        {
            "reward": name,
            "kind": kind,
            "step": step,
            "spearman": float(spearman(values[:, :, k, r], pool.final[..., r]).mean()),
            "kendall": float(kendall(values[:, :, k, r], pool.final[..., r]).mean()),
        }
        for kind, values, steps in kinds
        for r, name in enumerate(pool.rewards)
        for k, step in enumerate(steps)
        if step < pool.num_steps - 1
    ]


def gain_of(differences: Floats) -> dict[str, float]:
    """Mean of paired differences [P] and its interval."""
    low, high = interval(differences)
    return {"mean": float(differences.mean()), "low": low, "high": high}


@dataclass(frozen=True)
class Found:
    """The result of a search for a schedule.

    Attributes:
        schedule: The one recommended; empty where Best-of-N is better.
        searched: The best one that prunes, as searched.
        held_out: Gains over Best-of-N of the same budget on prompts it was not found on, by name.
        n: Candidates of each.
        search_prompts: How many prompts it was found on.
        held_out_prompts: How many judged it.
        pool_too_small: Whether a budget would have paid more candidates than the pool has.
    """

    schedule: Schedule
    searched: Schedule
    held_out: dict[str, dict[str, float]]
    n: dict[str, int]
    search_prompts: int
    held_out_prompts: int
    pool_too_small: bool


def search_schedule(
    pool: Pool,
    budget: float,
    cost: Cost,
    *,
    noise_aware: bool = False,
    max_prunes: int = 3,
    tries: int = 1500,
    holdout: float = 0.5,
    seed: int = 0,
) -> Found:
    """Find the schedule that pays most for a budget, and judge it on prompts it has not seen.

    Random schedules, the published one and Best-of-N are halved successively on the search prompts;
    of those whose paired difference to the best is within one standard error the one with the
    fewest prunes is taken. If the lower end of its held-out gain is not above 0, Best-of-N is
    recommended.

    Args:
        pool: Rewards.
        budget: Per prompt, in the unit of ``cost``.
        cost: Of a candidate.
        noise_aware: Whether the noise-aware reward prunes, where the pool has it.
        max_prunes: Most prunes of a schedule.
        tries: Random schedules.
        holdout: Share of the prompts that judge.
        seed: Of the split, the schedules and the draws.

    Raises:
        UserError: If there are too few prompts, or the budget is below one candidate.
    """
    P, N, _ = pool.final.shape
    order = np.random.default_rng(seed).permutation(P)
    split = P - round(P * holdout)
    require(min(split, P - split) >= 2, f"{P} prompts are too few to keep a part of them aside")
    here, apart = pool.of_prompts(order[:split]), pool.of_prompts(order[split:])

    def candidates(schedule: Schedule) -> int:
        return min(N, schedule.affordable(budget, cost))

    def values(where: Pool, schedule: Schedule, draws: Draws) -> Floats:
        arm = Arm(schedule, noise_aware)
        return _standardised(simulate(where, arm, candidates(schedule), cost, draws).values, where)

    left = _schedules(pool, cost.steps, max_prunes, tries, seed, noise_aware)
    scores: dict[Schedule, Floats] = {}
    for count, kept in _HALVING:
        draws = Draws(split, N, count, seed + 1)
        scores = {schedule: values(here, schedule, draws) for schedule in left}
        left = sorted(left, key=lambda schedule: -scores[schedule].mean())[:kept]
        left += [] if Schedule() in left else [Schedule()]
    chosen = _simplest(scores, left)
    pruning = [schedule for schedule in left if schedule.after]
    judged = {"searched": chosen if chosen.after else pruning[0]} if pruning else {}
    if _fits(PUBLISHED, pool, cost.steps, noise_aware):
        judged["published"] = PUBLISHED
    draws = Draws(P - split, N, 256, seed + 1)
    plain = values(apart, Schedule(), draws)
    held_out = {
        name: gain_of(values(apart, schedule, draws) - plain) for name, schedule in judged.items()
    }
    pays = bool(chosen.after) and held_out["searched"]["low"] > 0
    return Found(
        chosen if pays else Schedule(),
        judged.get("searched", Schedule()),
        held_out,
        {name: candidates(s) for name, s in {"best_of_n": Schedule(), **judged}.items()},
        split,
        P - split,
        any(s.affordable(budget, cost) > N for s in (Schedule(), *judged.values())),
    )


def _simplest(scores: Mapping[Schedule, Floats], left: Sequence[Schedule]) -> Schedule:
    """The one with the fewest prunes of those within one standard error of the best."""
    best = max(left, key=lambda schedule: scores[schedule].mean())

    def is_close(schedule: Schedule) -> bool:
        lost = scores[best] - scores[schedule]
        return bool(lost.mean() <= lost.std(ddof=1) / len(lost) ** 0.5)

    return min(filter(is_close, left), key=lambda s: (len(s.after), -scores[s].mean()))


def _standardised(values: Floats, pool: Pool) -> Floats:
    """[P]: the reward, or the mean of several in units of their deviation within prompts."""
    if len(pool.rewards) == 1:
        return values[:, 0]
    return (values / pool.final.std(1).mean(0)).mean(1)


def _schedules(
    pool: Pool, steps: int, max_prunes: int, tries: int, seed: int, noise_aware: bool
) -> list[Schedule]:
    draw = np.random.default_rng(seed)
    known = {*pool.steps, *(pool.noise_aware_steps if noise_aware else ())}
    usable = [step for step in range(steps - 1) if step in known]
    require(bool(usable), "the pool has values of the last step only; nothing can be pruned")
    found = {Schedule(): None}
    if _fits(PUBLISHED, pool, steps, noise_aware):
        found[PUBLISHED] = None
    for _ in range(tries):
        count = int(draw.integers(1, min(max_prunes, len(usable)) + 1))
        after = sorted(draw.choice(usable, count, replace=False).tolist())
        found[Schedule(tuple(after), tuple(draw.choice(_RATIOS, count).tolist()))] = None
    return [*found]


def _fits(schedule: Schedule, pool: Pool, steps: int, noise_aware: bool) -> bool:
    known = {*pool.steps, *(pool.noise_aware_steps if noise_aware else ())}
    return {*schedule.after} <= known and all(step <= steps - 2 for step in schedule.after)
