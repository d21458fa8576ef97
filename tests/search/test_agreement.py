"""Correlations of ranks against scipy, and TTSnap's measures against its own numbers."""

import numpy as np
import pytest
import scipy.stats

from oneshot_fast.search.agreement import kendall, kept_best, spearman

# predictions, and rewards, of TTSnap's measures
PREDICTED = [
    1.764052391052246, 0.40015721321105957, 0.978738009929657, 2.2408931255340576,
    1.8675580024719238, -0.9772778749465942, 0.9500884413719177, -0.15135720372200012,
]  # fmt: skip
TRUE = [
    1.6608335971832275, 0.810755729675293, 1.1227816343307495, 3.69516658782959,
    2.6285958290100098, -0.8556028604507446, 1.393951654434204, 0.1823171228170395,
]  # fmt: skip


def test_ranks_correlate_as_scipy_says():
    draw = np.random.default_rng(0)
    early, final = draw.integers(0, 6, (2, 5, 20)).astype(float)  # with ties
    early[4] = 1.0
    for found, expected in (
        (spearman(early, final), scipy.stats.spearmanr),
        (kendall(early, final), scipy.stats.kendalltau),
    ):
        for k in range(4):
            assert found[k] == pytest.approx(expected(early[k], final[k]).statistic, abs=1e-12)
        assert found[4] == 0


def test_measures_of_a_reward_are_ttsnaps():
    early, final = np.array([PREDICTED]), np.array([TRUE])
    assert kendall(early, final)[0] == pytest.approx(0.9285714285714285, abs=1e-15)
    for share in np.arange(1, 20) / 20:
        assert [value[0] for value in kept_best(early, final, share)] == [1, 0]


def test_the_gap_is_what_pruning_loses():
    early, final = np.array([[3.0, 3.0, 1.0, 0.0]]), np.array([[0.0, 2.0, 5.0, 1.0]])
    assert [value[0] for value in kept_best(early, final, 0.1)] == [0, 5]  # one, the first
    assert [value[0] for value in kept_best(early, final, 0.5)] == [0, 3]
    assert [value[0] for value in kept_best(early, final, 0.75)] == [1, 0]
