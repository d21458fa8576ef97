"""Rules of pruned Best-of-N against plain loops, and its costs against numbers computed by hand."""

import itertools

import numpy as np
import pytest

from oneshot_fast.errors import UserError
from oneshot_fast.search import pruning
from oneshot_fast.search.pruning import Cost, Draws, Schedule, best_of_n, winners

# FLUX at 512 pixels in tera multiply-adds, as TTSnap counts
COST = Cost(9.9, 1.2, 20)
PUBLISHED = Schedule((2, 6, 11), (0.4, 0.4, 0.5))


def naive(chosen, prune, final, alive):
    """One prompt at a time; of equal ones the lower number wins."""

    def order(ids, values):
        if values.shape[1] == 1:
            score = {i: values[i, 0] for i in ids}
        else:
            score = dict.fromkeys(ids, 0)
            for r in range(values.shape[1]):
                for i in ids:
                    score[i] += sum((values[j, r], j) < (values[i, r], i) for j in ids if j != i)
        return sorted(ids, key=lambda i: (-score[i], i))

    ids = list(chosen)
    for values, count in zip(prune, alive[1:], strict=True):
        ids = sorted(order(ids, values)[:count])
    return order(ids, final)[0]


@pytest.mark.parametrize("rewards", [1, 3])
def test_winners_are_those_of_plain_loops(rewards: int):
    draw = np.random.default_rng(rewards)
    prune = draw.integers(0, 4, (2, 5, 12, rewards)).astype(float)  # many ties
    final = draw.integers(0, 4, (5, 12, rewards)).astype(float)
    alive = [9, 5, 2]
    (chosen,) = Draws(5, 12, 7, seed=3).parts(9)
    found = winners(chosen, prune, final, alive)
    for t, p in itertools.product(range(7), range(5)):
        assert found[t, p] == naive(chosen[t, p], prune[:, p], final[p], alive)


def test_best_of_n_is_the_mean_over_all_subsets():
    final = np.random.default_rng(0).normal(size=(3, 7))
    for n in (1, 3, 7):
        best = [
            final[:, subset].max(1) for subset in map(list, itertools.combinations(range(7), n))
        ]
        mean, variance = best_of_n(final, n)
        np.testing.assert_allclose(mean, np.mean(best, 0), atol=1e-12)
        np.testing.assert_allclose(variance, np.var(best, 0), atol=1e-12)


def test_every_candidate_pays_for_the_step_it_is_dropped_at():
    assert [PUBLISHED.cost(n, COST) for n in (7, 16, 33, 38, 77)] == pytest.approx(
        [469.8, 921.0, 1964.4, 2331.6, 4734.9]
    )
    assert [PUBLISHED.affordable(b, COST) for b in (400, 1000, 2000, 4000)] == [6, 16, 33, 65]
    assert Schedule().cost(1, COST) == pytest.approx(199.2)
    ratio, original = (Cost(9.9, 1.2, 20, rule) for rule in ("ratio", "original"))
    assert PUBLISHED.cost(1, ratio) == pytest.approx(61.764)
    assert PUBLISHED.cost(1, original) == pytest.approx(51.864)
    assert Schedule().cost(1, original) == pytest.approx(199.2)
    assert PUBLISHED.evaluations(38, 20) == (38 * 3 + 15 * 4 + 6 * 5 + 3 * 8, 38 + 15 + 6 + 3)


def test_subsets_grow_and_repeat(monkeypatch):
    draws = Draws(4, 10, 6, seed=1)
    small, large = (np.concatenate([*draws.parts(n)]) for n in (3, 8))
    assert small.shape == (6, 4, 3) and (np.diff(large) > 0).all()
    for a, b in zip(small.reshape(-1, 3), large.reshape(-1, 8), strict=True):
        assert {*a} <= {*b}
    assert not (small[:, 0] == small[:, 1]).all()
    shared = np.concatenate([*Draws(4, 10, 6, seed=1, shared_mask=True).parts(3)])
    assert (shared == shared[:, :1]).all()
    more = np.concatenate([*Draws(4, 10, 9, seed=1).parts(3)])
    assert (more[:6] == small).all()
    monkeypatch.setattr(pruning, "_WORK_BYTES", 1)  # not kept, one by one
    parts = [*Draws(4, 10, 6, seed=1).parts(3)]
    assert len(parts) == 6 and (np.concatenate(parts) == small).all()


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (Schedule((2, 2), (0.5, 0.5)), "increase"),
        (Schedule((19,), (0.5,)), "give 0 to 18"),
        (Schedule((2,), (0.0,)), "above 0"),
        (Schedule((2,), (0.5, 0.5)), "one ratio per step"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(schedule: Schedule, said: str):
    with pytest.raises(UserError, match=said):
        schedule.check(20)


def test_a_budget_below_one_candidate_names_the_least():
    with pytest.raises(UserError, match=r"give at least 199\.2"):
        Schedule().affordable(100, COST)
