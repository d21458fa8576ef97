"""Penalties on noises: their size for Gaussian ones, their gradients, and what a rotation keeps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from assign_samples import batch_of
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.generators.sdxl import OneStepGenerator
from oneshot_fast.jobs.assign.objective import AssignOptions, assign_batch
from oneshot_fast.noise.prior import covariance_penalty, moment_penalty, norm_penalty

PENALTIES = {norm_penalty: 0.5, moment_penalty: 1.0, covariance_penalty: 1.0}


def noises(B: int, *shape: int) -> Tensor:
    source = torch.Generator().manual_seed(3)
    return torch.randn(B, *shape, generator=source, dtype=torch.float64)


def penalty_id(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(("penalty", "mean"), PENALTIES.items(), ids=penalty_id)
def test_a_gaussian_noise_has_the_documented_penalty(penalty, mean) -> None:  # type: ignore[no-untyped-def]
    z = noises(3000, 4, 8, 8)
    assert penalty(z).mean().item() == pytest.approx(mean, rel=0.08)
    assert penalty(1.3 * z).mean() > 2 * mean
    assert penalty(z[:0]).shape == (0,)
    single = penalty(z[:5].float())
    torch.testing.assert_close(single.double(), penalty(z[:5]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("penalty", PENALTIES, ids=penalty_id)
def test_gradients(penalty) -> None:  # type: ignore[no-untyped-def]
    assert torch.autograd.gradcheck(penalty, noises(2, 4, 4, 2).requires_grad_())


def test_the_norm_penalty_is_the_log_density_of_the_norm() -> None:
    z = noises(4, 4, 16, 16) * torch.tensor([0.5, 0.9, 1.0, 1.5]).view(-1, 1, 1, 1)
    d = z[0].numel()
    r = z.flatten(1).norm(dim=1)
    formula = 0.5 * r**2 - (d - 1) * r.log()
    least = 0.5 * (d - 1) - (d - 1) * math.log(math.sqrt(d - 1))
    torch.testing.assert_close(norm_penalty(z), formula - least)


def test_a_rotation_keeps_the_norm_only() -> None:
    z = noises(3, 4, 8, 8)
    q = ops.skew_exp(noises(3, 16, 16))
    turned = ops.patch_rotate(z, q, 2)
    torch.testing.assert_close(norm_penalty(turned), norm_penalty(z))
    for penalty in (moment_penalty, covariance_penalty):
        assert ((penalty(turned) - penalty(z)).abs() > 0.01).all()


def test_weights_act_in_the_search(tiny: OneStepGenerator, small_data: Path) -> None:
    eps, prompts, latents, _ = batch_of(tiny, small_data)

    def found(**weights: float) -> Tensor:
        options = AssignOptions("rotation", steps=6, lr=0.15, **weights)  # type: ignore[arg-type]
        return assign_batch(tiny, eps, prompts, latents, None, options).z

    plain = found()
    torch.testing.assert_close(found(prior_weight=1.0), plain, rtol=0, atol=1e-3)
    for name, penalty in (("moment", moment_penalty), ("covariance", covariance_penalty)):
        held = found(**{f"{name}_weight": 30.0})
        assert penalty(held).mean() < 0.9 * penalty(plain).mean()
