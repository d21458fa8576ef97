"""FK steering's weights and resampling, and who is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest

from oneshot_fast.search.particles import Particles, drawn, shares, systematic

VECTORS = json.loads(Path(__file__).with_name("fk_vectors.json").read_text())
POTENTIALS = ("diff", "max", "add", "rt")


@pytest.mark.parametrize("run", [*VECTORS["runs"]])
def test_weights_are_those_of_the_formulas(run: str):
    kind, scale = run.split("_")
    found = Particles(1, 4, kind, float(scale))  # type: ignore[arg-type]
    last = len(VECTORS["rewards_per_step"]) - 1
    for step, rewards in enumerate(VECTORS["rewards_per_step"]):
        expected = VECTORS["runs"][run][step]
        factor = found.weigh(np.array([rewards]), step == last)
        np.testing.assert_allclose(factor[0], expected["log_G"], rtol=1e-12, atol=1e-12)
        weights = shares(found.log_weights)[0]
        np.testing.assert_allclose(weights, expected["weights"], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.ess()[0], expected["ess"], rtol=1e-12)
        if step < last:
            found.resample(np.array([[3, 3, 1, 0]]), np.array([True]))


def toy(kind: str, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray, Particles]:
    """Two states that flip now and then, steered to the second: the ends, and who is drawn."""
    runs, count, scale = 6000, 6, 1.5
    draw = np.random.default_rng(0)
    state = (draw.random((runs, count)) < 0.3).astype(int)
    particles = Particles(runs, count, kind, scale)  # type: ignore[arg-type]
    for reward in ((-0.2, 0.4), (0.1, 0.6), (0.0, 1.0)):
        flips = draw.random((runs, count)) < 0.2
        state = np.where(flips, 1 - state, state)
        is_last = reward == (0.0, 1.0)
        particles.weigh(np.array(reward)[state] + shift, is_last)
        if not is_last:
            few = particles.ess() < 0.7 * count
            ancestors = systematic(particles.log_weights, draw.random(runs))
            particles.resample(ancestors, few)
            state = np.where(few[:, None], np.take_along_axis(state, ancestors, 1), state)
    particles.finish()
    picked = drawn(particles.log_weights, draw.random(runs))
    return state, picked, particles


@pytest.mark.parametrize("kind", POTENTIALS)
def test_steered_states_are_tilted_by_the_reward(kind: str):
    state, picked, particles = toy(kind)
    second = 0.3
    for _ in range(3):
        second = 0.8 * second + 0.2 * (1 - second)
    mass = second * np.exp(1.5)
    z = np.exp(particles.log_z)
    error = z.std() / len(z) ** 0.5
    assert abs(z.mean() - (mass + 1 - second)) < 4 * error
    target = mass / (mass + 1 - second)
    chosen = np.take_along_axis(state, picked[:, None], 1)[:, 0]
    for values in ((shares(particles.log_weights) * state).sum(1), chosen):
        residual = z * (values - target) / z.mean()
        assert abs(residual.mean()) < 4 * residual.std() / len(z) ** 0.5


@pytest.mark.parametrize("kind", POTENTIALS)
def test_a_constant_added_to_the_reward_changes_nothing(kind: str):
    one, other = toy(kind), toy(kind, -30.0)
    assert (one[0] == other[0]).all() and (one[1] == other[1]).all()
    np.testing.assert_allclose(one[2].log_z, other[2].log_z + 1.5 * 30, rtol=0, atol=1e-9)


def test_resampling_is_systematic_and_no_reward_is_too_large():
    weights = np.array([[0.5, 0.25, 0.25, 0.0]])
    with np.errstate(divide="ignore"):
        for u in (0.0, 0.3, 0.999):
            assert systematic(np.log(weights), np.array([u])).tolist() == [[0, 0, 1, 2]]
    particles = Particles(1, 3, "rt", 1e6)
    particles.weigh(np.array([[1.0, 2.0, np.nan]]))
    assert shares(particles.log_weights).tolist() == [[0, 1, 0]]
    assert particles.ess() == 1
    assert systematic(particles.log_weights, np.array([0.9])).tolist() == [[1, 1, 1]]


def test_particles_without_finite_rewards_have_no_weight():
    particles = Particles(1, 2, "diff", 1.0)
    particles.weigh(np.array([[-np.inf, np.nan]]))
    assert particles.ess() == 0
    particles.weigh(np.array([[1.0, 2.0]]), is_last=True)
    assert shares(particles.log_weights).tolist() == [[0, 0]]
