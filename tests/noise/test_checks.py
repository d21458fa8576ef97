"""Ranges of statistics of Gaussian noise."""

import math

import torch

from oneshot_fast.noise.checks import QUANTILE, eigenvalue_band


def test_the_quantile_is_that_of_the_stated_level() -> None:
    assert math.isclose(QUANTILE, 3.2905, abs_tol=1e-4)


def test_eigenvalue_band_agrees_with_covariances_of_drawn_vectors() -> None:
    m, dims, draws = 200, 12, 600
    mean, deviation, width = eigenvalue_band(m, dims)
    vectors = torch.randn(
        draws, m, dims, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    drawn = torch.linalg.eigvalsh(vectors.mT @ vectors / m).flip(-1)
    error = (mean - drawn.mean(0)) / deviation * math.sqrt(1 / (1 / draws + 1 / 400))
    assert error.abs().max() < 0.25 * math.sqrt(400)  # a quarter of one deviation
    torch.testing.assert_close(deviation, drawn.std(0), rtol=0.15, atol=0)
    outside = ((drawn - mean).abs() > width * deviation).any(1).double().mean()
    assert outside < 0.01


def test_eigenvalue_band_with_fewer_vectors_than_dimensions() -> None:
    mean, deviation, _ = eigenvalue_band(5, 16)
    assert mean[5:].abs().max() < 1e-12 and deviation[5:].max() < 1e-12
    assert math.isclose(mean.sum().item(), 16, rel_tol=0.1)
