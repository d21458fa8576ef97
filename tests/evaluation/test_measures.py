"""The measures: Frechet distance, diversity, accuracy."""

import math

import pytest
import scipy.linalg
import torch

from oneshot_fast.evaluation.measures import (
    diversity_error,
    frechet_distance,
    pairwise_diversity,
    prompt_accuracy,
)


def test_frechet_distance_equals_the_formula_with_a_matrix_root():
    a, b = torch.randn(200, 5).double() * 2 + 1, torch.randn(300, 5).double()
    cov_a, cov_b = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = (a.mean(0) - b.mean(0)).square().sum().item()
    expected += (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_known_gaussians():
    """Of diagonal covariances: |shift|^2 + sum (1 - scale)^2."""
    white = torch.randn(2000, 3, dtype=torch.float64)
    white = torch.linalg.qr(white - white.mean(0)).Q * 1999**0.5
    scale, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.0, -1.0]).double()
    expected = shift.square().sum() + (1 - scale).square().sum()
    assert frechet_distance(white, white * scale + shift) == pytest.approx(expected.item())


def test_frechet_distance_of_fewer_samples_than_features():
    a = torch.eye(4, 8)
    assert frechet_distance(a, a + 1) == pytest.approx(8, rel=1e-9)


@pytest.mark.parametrize(
    "shapes", [((3, 4), (3, 5)), ((1, 4), (3, 4)), ((3, 4), (1, 4)), ((3,), (3, 4))]
)
def test_frechet_distance_rejects(shapes):
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(*(torch.zeros(shape) for shape in shapes))


def test_diversity_is_the_mean_over_labels_of_pairwise_distances():
    images = torch.zeros(5, 3, 2, 2)
    images[1], images[3] = 0.5, 1.0
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert pairwise_diversity(images, labels) == pytest.approx(0.75)
    assert math.isnan(pairwise_diversity(images, torch.arange(5)))


def test_accuracy():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    assert prompt_accuracy(logits, torch.tensor([0, 1, 0, 1])) == 0.5
    with pytest.raises(ValueError, match="expected"):
        prompt_accuracy(logits, torch.tensor([1, 0]))


def test_the_error_of_a_diversity_is_its_spread_over_draws():
    labels = torch.arange(40) % 2
    draws = [torch.randn(40, 1, 4, 4) for _ in range(40)]
    spread = torch.tensor([pairwise_diversity(images, labels) for images in draws]).std().item()
    found = sum(diversity_error(images, labels) for images in draws) / len(draws)
    assert found == pytest.approx(spread, rel=0.4)
    assert math.isnan(diversity_error(draws[0], torch.arange(40)))
