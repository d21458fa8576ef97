"""AC-DMD's losses: against the authors' numbers, in both parametrisations, and on a Gaussian."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_samples
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from oneshot_fast.generators.levels import Level
from oneshot_fast.training.losses.dmd import (
    consistency_loss,
    fake_loss,
    matching_loss,
    renoised,
    shares,
    stochastic_step,
)

VECTORS = json.loads((Path(family_samples.__file__).parent / "rtdmd_vectors.json").read_text())
NEAR = {"rtol": 1e-6, "atol": 1e-6}


def of(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


X, V, NOISE = (of(VECTORS["cps_step"][name]) for name in ("x", "v", "noise"))


def flow(s: float | Tensor) -> Level:
    noise = torch.as_tensor(s, dtype=torch.float64).view(-1, 1, 1, 1)
    return Level(1 - noise, noise)


def sigma_space(s: float | Tensor) -> Level:
    noise = flow(s).noise
    return Level(torch.ones_like(noise), noise / (1 - noise))


def estimates(x: Tensor, v: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    return x - level.noise * v, x + level.signal * v


@pytest.mark.parametrize("case", VECTORS["ac_dmd_target"]["cases"])
def test_the_fakes_target_of_the_authors_code(case: dict[str, Any]) -> None:
    before, after = flow(case["s"]), flow(case["t"])
    x_t, added = renoised(X, NOISE, before, after)
    # theirs takes R in float32 as a small difference, of levels that are near
    torch.testing.assert_close(x_t, of(case["x_t"]), rtol=0, atol=3e-6 if added[0] < 0.5 else 1e-6)
    torch.testing.assert_close(added.flatten(), of(case["S"])[:1], rtol=1e-5, atol=0)
    v = (after.noise / added * NOISE - x_t) / after.signal
    scale = v.abs().max()
    torch.testing.assert_close(v / scale, of(case["target"]) / scale, rtol=0, atol=2e-5)
    _, e = estimates(x_t, V, after)
    loss = fake_loss(e, NOISE, after, added, "flow")
    assert loss.item() == pytest.approx(case["fake_loss_of_v"], rel=2e-5)  # theirs: float32
    # by its formula, in float64
    weight = (1 / added**2).clamp(max=10)
    again = (weight * (added * V - added * v).square()).mean()
    assert loss.item() == pytest.approx(again.item(), rel=1e-12)
    # in sigma space the same samples, x / (1 - s), have the same target, and bounded errors
    x_sigma, more = renoised(
        X / before.signal, NOISE, sigma_space(case["s"]), sigma_space(case["t"])
    )
    torch.testing.assert_close(x_sigma * after.signal, x_t, rtol=1e-12, atol=1e-12)
    bounded = fake_loss(e, NOISE, sigma_space(case["t"]), more, "noise")
    torch.testing.assert_close(bounded, fake_loss(e, NOISE, after, added, "noise"))
    assert bounded < 20


def test_the_students_gradient_of_the_authors_code() -> None:
    case = VECTORS["generator_dm"]
    x = of(case["x_s"]).requires_grad_()
    loss = matching_loss(x, of(case["x_teacher"]), of(case["x_fake"]))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    torch.testing.assert_close(x.grad, of(case["grad_x_s"]), **NEAR)
    # where theirs divides by 0 there is a floor
    assert VECTORS["generator_dm_zero_normaliser"]["loss"] > 1e70
    fake = of(case["x_fake"])
    floored = matching_loss(x, x.detach(), fake).item()
    assert floored == pytest.approx(((fake - x) / 1e-3).square().mean().item() / 2)


def test_the_whole_chain_of_the_authors_code() -> None:
    case = VECTORS["generator_dm_from_velocities"]
    for space in (flow, sigma_space):
        before, after = space(case["s"]), space(case["t"])
        scale = 1 if space is flow else flow(case["s"]).signal
        x = X / scale
        x_t, _ = renoised(x, NOISE, before, after)
        in_flow = x_t * (1 if space is flow else flow(case["t"]).signal)
        found = {}
        for name in ("teacher", "fake"):
            x0, e = estimates(in_flow, of(case[f"v_{name}"]), flow(case["t"]))
            z = of(case["transition_noise"])
            found[name] = stochastic_step(x0, e, z, case["eta"], after, before) * scale
            key = "x_T" if name == "teacher" else "x_F"
            torch.testing.assert_close(found[name], of(case[key]), **NEAR)
    x = X.clone().requires_grad_()
    loss = matching_loss(x, found["teacher"], found["fake"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=2e-6)
    torch.testing.assert_close(x.grad, of(case["grad_x_s"]), **NEAR)


def test_consistency_of_the_authors_code() -> None:
    found, eta = VECTORS["consistency"], VECTORS["consistency"]["eta"]
    for case in found["cases"]:
        if not case["stopgrad_transitions"]:
            continue
        a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.375, -0.25))
        time = of(case["timestep"])
        near = time - of(case["delta"])

        def clean(x: Tensor, t: Tensor, a: Tensor = a, b: Tensor = b) -> tuple[Tensor, Tensor]:
            v = a * x + b * (t / 1000).view(-1, 1, 1, 1)
            return estimates(x, v, flow(t / 1000))

        x0, e = clean(X, time)
        drawn = []
        for name in ("noise_1", "noise_2"):
            if case[name] is None:
                continue
            levels = flow(time / 1000), flow(near / 1000)
            with torch.no_grad():
                there = stochastic_step(x0, e, of(case[name]), eta, *levels)
            drawn.append(clean(there, near)[0])
        loss = consistency_loss(x0, drawn[0], drawn[1] if case["two_sample"] else None)
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
        assert a.grad.item() == pytest.approx(case["d_a"], rel=1e-5)
        assert b.grad.item() == pytest.approx(case["d_b"], rel=2e-4)  # a small difference


def test_the_average_warms_up_as_the_authors_does() -> None:
    case, value = VECTORS["ema"], 1.0  # theirs follows every 8th step, ours every one
    average = EMAModel([], case["decay"])
    for step, (found, _) in case["ema_after_step"].items():
        if (int(step) + 1) % case["interval"] == 0:
            now = case["start"][0] + case["add_per_step"] * (int(step) + 1)
            kept = average.get_decay(int(step) + 1)
            value = kept * value + (1 - kept) * now
        assert found == pytest.approx(value, rel=1e-6)


def test_two_draws_estimate_the_square_of_the_mean() -> None:
    draws = 1 + 0.5 * torch.randn(2, 100_000, 1, 1, 1, dtype=torch.float64)
    h = torch.full_like(draws[0], 0.7)
    each = (draws[0] - h) * (draws[1] - h)
    error = each.std() / len(each) ** 0.5
    assert abs(consistency_loss(h, *draws) - 0.3**2) < 3 * error
    assert consistency_loss(h, draws[0], None) > 0.3**2 + 50 * error


@pytest.mark.parametrize("space", [flow, sigma_space])
@pytest.mark.parametrize("s", [0.0, 0.5, 0.9])
def test_the_best_fake_of_a_gaussian_is_its_score(space: Any, s: float) -> None:
    mean, tau, t, count = 0.4, 0.6, 0.95, 400_000
    before, after = space(s), space(t)
    x0, e, n = torch.randn(3, count, 1, 1, 1, dtype=torch.float64)
    x_s = before.signal * (mean + tau * x0) + before.noise * e
    x_t, added = renoised(x_s, n, before, after)
    # least squares of R / S_t e(x_t) = n over e linear in x_t; its mean error is what is lowered
    y, x = (after.noise / added * n).flatten(), x_t.flatten()
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var()
    variance = (after.signal * tau) ** 2 + after.noise**2
    expected = (after.noise / variance).item()  # of E[e | x_t] = S_t (x_t - A_t m) / variance
    assert slope.item() == pytest.approx(expected, rel=0.01)
    offset = y.mean() - slope * x.mean()
    size = (after.noise * after.signal * mean / variance).item()
    assert offset.item() == pytest.approx(-size, abs=0.01)


def test_ancestral_steps_keep_what_diffusers_keeps() -> None:
    before, after = sigma_space(0.9), sigma_space(0.5)
    kept, fresh = shares("ancestral", before, after)
    up = after.noise * (1 - (after.noise / before.noise) ** 2).sqrt()
    torch.testing.assert_close(after.noise * fresh, up)
    torch.testing.assert_close((after.noise * kept) ** 2 + up**2, after.noise**2)
