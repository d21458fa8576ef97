"""CPS as schedulers of diffusers, against values made by its authors' code."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from family_samples import tiny_pipeline
from torch import Tensor

from oneshot_fast.generators.schedulers import CPSEulerScheduler, CPSScheduler

NAMES = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# one row of values that were computed by the functions of github.com/Harahan/RTDMD (Apache-2.0);
# what goes in are multiples of 1/64
X = [-1.53125, -0.75, -0.65625, -1.609375]
V = [-1.046875, 0.921875, -1.296875, -1.109375]
Z = [-0.078125, 0.359375, -0.78125, 0.078125]
CASES = {  # sigma, the next one, eta
    (1.0, 0.9, 0.9): [-0.33347058, 0.04667464, -0.72279996, -0.20713872],
    (0.9, 0.75, 0.9): [-0.39707574, -0.20588738, -0.54320008, -0.29669914],
    (0.75, 0.5, 0.9): [-0.55186945, -0.58386415, -0.30430219, -0.49766424],
    (0.75, 0.5, 0.5): [-1.03457844, -0.77732688, -0.46465850, -1.02810633],
    (0.75, 0.5, 1.0): [-0.412109375, -0.541015625, -0.232421875, -0.349609375],
    (0.5, 0.0, 0.9): [-1.0078125, -1.2109375, -0.0078125, -1.0546875],
    (0.75, 0.5, 0.0): [-1.26953125, -0.98046875, -0.33203125, -1.33203125],
}
EULER = {**NAMES, "timestep_spacing": "trailing"}


def column(values: list[float]) -> Tensor:
    return torch.tensor(values)[None, :, None, None]


def given_noise(patch: pytest.MonkeyPatch, noise: Tensor) -> None:
    for kind in (CPSScheduler, EulerAncestralDiscreteScheduler):
        patch.setattr(sys.modules[kind.__module__], "randn_tensor", lambda *_, **__: noise)


@pytest.mark.parametrize(("sigma", "after", "eta"), CASES)
def test_a_step_of_the_authors_code(
    monkeypatch: pytest.MonkeyPatch, sigma: float, after: float, eta: float
) -> None:
    given_noise(monkeypatch, column(Z))
    x, v, expected = column(X), column(V), column(CASES[sigma, after, eta])
    flow = CPSScheduler(eta=eta)
    flow.set_timesteps(sigmas=[sigma, after] if after else [sigma])
    assert flow.timesteps[0] == 1000 * sigma and flow.sigmas[-1] == 0
    found, x0 = flow.step(v, flow.timesteps[0], x, return_dict=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(x0, x - sigma * v)
    if sigma == 1:  # infinite in the other form
        return
    # the same in sigma space: x_flow = x / (1 + sigma), and the network gives the noise
    levels = [s / (1 - s) for s in (sigma, after)]
    euler = CPSEulerScheduler(eta=eta, **EULER)
    euler.set_timesteps(sigmas=levels if after else levels[:1])
    noise = x + (1 - sigma) * v
    other = euler.step(noise, euler.timesteps[0], x / (1 - sigma)).prev_sample
    torch.testing.assert_close(other * (1 - after), expected, rtol=0, atol=2e-6)


def test_ancestral_is_that_of_diffusers_and_zero_is_euler(monkeypatch: pytest.MonkeyPatch) -> None:
    given_noise(monkeypatch, column(Z))
    for kind, eta in ((EulerAncestralDiscreteScheduler, "ancestral"), (EulerDiscreteScheduler, 0)):
        theirs, ours = kind(**EULER), CPSEulerScheduler(eta=eta, **EULER)
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(4)
        x = y = 14.6 * column(X)
        for t in theirs.timesteps:
            theirs.scale_model_input(x, t), ours.scale_model_input(y, t)
            x, y = (s.step(column(V), t, z).prev_sample for s, z in ((theirs, x), (ours, y)))
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    flow, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), CPSScheduler(shift=3.0, eta=0)
    for scheduler in (flow, ours):
        scheduler.set_timesteps(4)
    for k, t in enumerate(flow.timesteps):
        a, b = (s.step(column(V), t, column(X)).prev_sample for s in (flow, ours))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert flow.sigmas[k] == ours.sigmas[k]


def test_a_pipeline_takes_it() -> None:
    pipe, made = tiny_pipeline("StableDiffusion3Pipeline"), list[Tensor]()
    pipe.set_progress_bar_config(disable=True)
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), CPSScheduler(shift=3.0, eta=0)):
        pipe.scheduler = scheduler
        draw = torch.Generator().manual_seed(1)
        how = {"num_inference_steps": 4, "guidance_scale": 2.0, "generator": draw}
        made.append(pipe("a", height=16, width=16, output_type="latent", **how).images)
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-5)
    assert made[0].std() > 0.1


def test_sdxl_turbos_etas() -> None:
    """Of its 2 and 4 steps, as the authors' formulas give them."""
    for count, expected in ((2, [0.9296]), (4, [0.8198, 0.7414, 0.7172])):
        ours = CPSEulerScheduler(eta="ancestral", **EULER)
        ours.set_timesteps(count)
        index = torch.arange(count - 1)
        found = ours._eta(index, ours.sigmas[index], ours.sigmas[index + 1])
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=6e-5)


def test_one_generator_or_one_index_per_sample() -> None:
    scheduler = CPSScheduler(eta=0.9)
    scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.75, 0.5])
    x, v = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)

    def draws() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    times = scheduler.timesteps[[0, 2]]
    both = scheduler.step(v, times, x, generator=draws()).prev_sample
    for row in range(2):
        scheduler.set_begin_index(2 * row)
        scheduler._step_index = None
        one = slice(row, row + 1)
        alone = scheduler.step(v[one], times[row], x[one], generator=draws()[row : row + 1])
        torch.testing.assert_close(both[one], alone.prev_sample)


def test_eta_is_kept_and_checked(tmp_path: Path) -> None:
    for kind, eta in ((CPSScheduler, 0.7), (CPSEulerScheduler, "ancestral"),
                      (CPSEulerScheduler, [0.2, 0.0])):  # fmt: skip
        kind(eta=eta, num_train_timesteps=500).save_pretrained(tmp_path)
        config = kind.from_pretrained(tmp_path).config
        assert config.eta == eta and config.num_train_timesteps == 500
    other = CPSEulerScheduler.from_config(EulerDiscreteScheduler(**EULER).config, eta=0.5)
    assert (other.config.eta, other.config.timestep_spacing) == (0.5, "trailing")
    for eta in (1.5, -0.1, "all", [0.5, 2.0]):
        with pytest.raises(ValueError, match="give numbers from 0 to 1"):
            CPSScheduler(eta=eta)
    for sigmas in ([0.5, 0.9], [1.2, 0.5], [0.5, 0.0], [0.9, 0.9], [0.9, -0.1], [math.nan], []):
        with pytest.raises(ValueError, match="give falling ones"):
            CPSScheduler().set_timesteps(sigmas=sigmas)
        if sigmas not in ([1.2, 0.5], [0.5, 0.0]):  # which sigma space has
            with pytest.raises(ValueError, match="give falling ones"):
                CPSEulerScheduler().set_timesteps(sigmas=sigmas)
    short = CPSScheduler(eta=[0.5, 0.5])
    short.set_timesteps(3)
    with pytest.raises(ValueError, match="2 numbers for 3 steps"):
        short.step(column(V), short.timesteps[0], column(X))
