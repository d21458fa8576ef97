"""The prior on a noise's norm: its size for Gaussian ones, its gradient, what a rotation keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.noise.prior import norm_penalty


def noises(B: int, *shape: int) -> Tensor:
    source = torch.Generator().manual_seed(3)
    return torch.randn(B, *shape, generator=source, dtype=torch.float64)


def test_a_gaussian_noise_has_the_documented_penalty() -> None:
    z = noises(3000, 4, 8, 8)
    assert norm_penalty(z).mean().item() == pytest.approx(0.5, rel=0.08)
    assert norm_penalty(1.3 * z).mean() > 2 * 0.5
    assert norm_penalty(z[:0]).shape == (0,)
    single = norm_penalty(z[:5].float())
    torch.testing.assert_close(single.double(), norm_penalty(z[:5]), rtol=1e-3, atol=1e-4)


def test_gradients() -> None:
    assert torch.autograd.gradcheck(norm_penalty, noises(2, 4, 4, 2).requires_grad_())


def test_the_norm_penalty_is_the_log_density_of_the_norm() -> None:
    z = noises(4, 4, 16, 16) * torch.tensor([0.5, 0.9, 1.0, 1.5]).view(-1, 1, 1, 1)
    d = z[0].numel()
    r = z.flatten(1).norm(dim=1)
    formula = 0.5 * r**2 - (d - 1) * r.log()
    least = 0.5 * (d - 1) - (d - 1) * math.log(math.sqrt(d - 1))
    torch.testing.assert_close(norm_penalty(z), formula - least)


def test_a_rotation_keeps_it() -> None:
    z = noises(3, 4, 8, 8)
    turned = ops.patch_rotate(z, ops.skew_exp(noises(3, 16, 16)), 2)
    torch.testing.assert_close(norm_penalty(turned), norm_penalty(z))
