"""TTSnap's published pools: the original's numbers, on data that is not in the repository.

OSF_TTSNAP names a folder that has, anywhere below, ttsnap_flux_{imr,pic,hps}.npz and
ttsnap_reference.json: its rewards, and what its code makes of them.
"""

import dataclasses
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oneshot_fast.jobs.scale.pools import Pool, read_pool
from oneshot_fast.jobs.scale.simulate import Arm, simulate
from oneshot_fast.search.pruning import Cost, Draws, Schedule, best_of_n, winners

REWARDS = ("imr", "pic", "hps")
SINGLE, MULTI = Schedule((2, 6, 11), (0.4, 0.4, 0.5)), Schedule((4, 6, 11), (0.4, 0.5, 0.6))
FOLDER = Path(os.environ.get("OSF_TTSNAP", "nowhere"))
FILES = {path.name: path for path in FOLDER.rglob("ttsnap_*")}
NEEDED = {"ttsnap_reference.json", *(f"ttsnap_flux_{name}.npz" for name in REWARDS)}
pytestmark = pytest.mark.skipif(
    not FILES.keys() >= NEEDED, reason="needs TTSnap's pools, in the folder OSF_TTSNAP"
)


@cache
def reference() -> Any:
    return json.loads(FILES["ttsnap_reference.json"].read_text())


@cache
def pool_of(reward: str) -> Pool:
    pool = read_pool(FILES[f"ttsnap_flux_{reward}.npz"])
    return dataclasses.replace(pool, rewards=(reward,)).published_scale()


@cache
def all_rewards() -> Pool:
    pools = [pool_of(reward) for reward in REWARDS]
    base = np.concatenate([pool.base for pool in pools], -1)
    aware = np.concatenate([pool.noise_aware for pool in pools], -1)
    steps = pools[0].noise_aware_steps
    return Pool(base, pools[0].steps, REWARDS, aware, steps)


def won(pool: Pool, schedule: Schedule, n: int, aware: bool, ids: np.ndarray) -> np.ndarray:
    """Winners [P] among the candidates ``ids`` of every prompt."""
    chosen = np.broadcast_to(ids, (1, len(pool.final), n))
    prune = pool.prune(schedule.after, aware)
    return winners(chosen, prune, pool.final, schedule.counts(n))[0]


def arms(pool: Pool, schedule: Schedule, n: int, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Mean rewards [R] of all arms."""
    rows = np.arange(len(pool.final))
    kinds = {"bon": (Schedule(), False), "ttsp": (schedule, False), "ttsnap": (schedule, True)}
    return {
        name: pool.final[rows, won(pool, plan, n, aware, ids)].mean(0)
        for name, (plan, aware) in kinds.items()
    }


@pytest.mark.parametrize("reward", REWARDS)
def test_without_draws_means_and_winners_are_the_originals(reward: str) -> None:
    pool = pool_of(reward)
    for n, expected in reference()["rng_free"][f"flux_{reward}"].items():
        found = arms(pool, SINGLE, int(n), np.arange(int(n)))
        for name, value in expected.items():
            assert found[name][0] == pytest.approx(value, abs=1e-9)
    for n in (38, 200):
        expected = reference()["returned_ids_ttsnap"][f"flux_{reward}_{n}"]
        ids = won(pool, SINGLE, n, True, np.arange(n))
        assert ids[:20].tolist() == expected["right_ids_first_20_prompts"]
        value = pool.final[np.arange(len(ids)), ids].mean()
        assert value == pytest.approx(expected["value_of_right_ids"], abs=1e-9)


def test_several_rewards_go_by_ranks() -> None:
    for n, expected in reference()["multi_rng_free"]["flux"].items():
        found = arms(all_rewards(), MULTI, int(n), np.arange(int(n)))
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[f"{name}_lowest_index_ties"], atol=1e-9)


@pytest.mark.parametrize("reward", REWARDS)
def test_best_of_n_by_its_closed_form(reward: str) -> None:
    final = pool_of(reward).final[..., 0]
    for n, value in reference()["closed_form_bon"][f"flux_{reward}"].items():
        assert best_of_n(final, int(n))[0].mean() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("reward", REWARDS)
def test_seed_0_with_the_originals_costs_and_draws(reward: str) -> None:
    pool, cost = pool_of(reward), Cost(9.9, 1.2, 20, "original")
    for budget, expected in reference()["seed0"][f"flux_{reward}"].items():
        plain, pruned = (s.affordable(float(budget), cost) for s in (Schedule(), SINGLE))
        assert [plain, pruned] == expected["n"]

        def first(n: int) -> np.ndarray:
            return np.sort(np.random.RandomState(0).choice(200, n, replace=False))

        found = arms(pool, SINGLE, pruned, first(pruned))
        found["bon"] = arms(pool, SINGLE, plain, first(plain))["bon"]
        for name in ("bon", "ttsp", "ttsnap"):
            assert found[name][0] == pytest.approx(expected[name], abs=1e-8)


@pytest.mark.parametrize("reward", REWARDS)
def test_means_at_the_corrected_cost(reward: str) -> None:
    pool, cost = pool_of(reward), Cost(9.9, 1.2, 20)
    draws = Draws(200, 200, 200, 0)
    for budget, expected in reference()["flux_corrected_cost_default_schedule"][reward].items():
        n = SINGLE.affordable(float(budget), cost)
        assert n == expected["n"]
        found = simulate(pool, Arm(SINGLE, noise_aware=True), n, cost, draws)
        error = np.hypot(expected["se"], found.error)
        assert abs(found.values.mean() - expected["mean"]) < 4 * error


def test_the_closed_form_is_the_mean_of_many_draws() -> None:
    final, n = pool_of("imr").final[:5, :, 0], 10
    mean, variance = best_of_n(final, n)
    (chosen,) = Draws(5, 200, 20000, 0).parts(n)
    best = np.take_along_axis(final[None], chosen, -1).max(-1)
    assert (abs(best.mean(0) - mean) < 4 * (variance / 20000) ** 0.5).all()
