"""Distances of features: against plain formulas, published expectations, their own errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from oneshot_fast.evaluation.distances import (
    Verdict,
    energy_score,
    frechet,
    kid,
    median_distance,
    mmd,
    neighbours,
    prompt_diversity,
    prompt_resamples,
    replicates,
    resamples,
    verdicts,
)


def sets(n: int = 9, m: int = 7, width: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, width).double(), 1.2 * torch.randn(m, width).double() + 0.5


def ones(*features: Tensor) -> list[Tensor]:
    return [torch.ones(1, len(x), dtype=torch.float64) for x in features]


def mean_over_pairs(kernel, a: Tensor, b: Tensor | None = None) -> float:
    pairs = itertools.permutations(a.numpy(), 2) if b is None else itertools.product(a, b)
    return float(np.mean([kernel(np.asarray(x), np.asarray(y)) for x, y in pairs]))


@pytest.mark.parametrize(
    ("measure", "kernel", "factor"),
    [
        (kid, lambda x, y: (x @ y / len(x) + 1) ** 3, 1),
        (mmd, lambda x, y: math.exp(-((x - y) ** 2).sum() / 200), 1000),
    ],
)
def test_kernel_distances_are_the_unbiased_means_over_pairs(measure, kernel, factor) -> None:
    a, b = sets()
    within = mean_over_pairs(kernel, a) + mean_over_pairs(kernel, b)
    expected = factor * (within - 2 * mean_over_pairs(kernel, a, b))
    assert measure(a, b, *ones(a, b)).item() == pytest.approx(expected, rel=1e-9)


def test_weights_count_images_as_often_as_they_are_drawn() -> None:
    """Frechet distances as of the drawn set itself; kernels pair no image with its own copy."""
    a, b = sets()
    u, v = resamples(len(a), 0, 3), resamples(len(b), 1, 3)
    assert u.sum(1).tolist() == [9] * 4 and u[0].tolist() == [1] * 9
    for k, distance in enumerate(frechet(a, b, u, v)):
        x, y = (f.repeat_interleave(w[k].long(), 0) for f, w in ((a, u), (b, v)))
        covs = [torch.cov(z.T).numpy() for z in (x, y)]
        root = scipy.linalg.sqrtm(covs[0] @ covs[1]).real
        expected = (x.mean(0) - y.mean(0)).square().sum() + np.trace(sum(covs) - 2 * root)
        assert distance.item() == pytest.approx(float(expected), rel=1e-6)
    many = mmd(a, b, resamples(len(a), 0, 4000), resamples(len(b), 1, 4000), 2.0)
    assert many[1:].mean().item() == pytest.approx(many[0].item(), abs=4 * many.std().item() / 60)


@pytest.mark.parametrize("factors", [(2, 1), (1, 3)])
def test_neighbours_by_the_published_formulas(factors) -> None:
    """As the authors' code does, with sorted distances of plain numpy."""
    a, b = (factor * x.numpy() for factor, x in zip(factors, sets(30, 20), strict=True))

    def distances(x, y):
        return np.linalg.norm(x[:, None] - y[None], axis=2)

    balls_a, balls_b = (np.sort(distances(x, x), 1)[:, 5] for x in (a, b))
    between = distances(b, a)  # [M, N]
    expected = {
        "precision": (between < balls_b[:, None]).any(0).mean(),
        "recall": (between < balls_a[None]).any(1).mean(),
        "density": (between < balls_b[:, None]).sum(0).mean() / 5,
        "coverage": (between.min(1) < balls_b).mean(),
    }
    found = neighbours(torch.from_numpy(a), torch.from_numpy(b))
    assert {name: values.mean().item() for name, values in found.items()} == pytest.approx(expected)
    assert 0 < min(expected["precision"], expected["recall"]) < 1


def test_density_and_coverage_of_equal_distributions_are_as_published() -> None:
    """Naeem et al. 2020: 1, and 1 - prod over i = 1..k of (M - i) / (N + M - i)."""
    n, m, k = 300, 200, 5
    found = [neighbours(torch.randn(n, 3).double(), torch.randn(m, 3).double()) for _ in range(20)]
    means = {key: torch.stack([x[key].mean() for x in found]) for key in ("density", "coverage")}
    expected = 1 - math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
    for key, value in (("density", 1.0), ("coverage", expected)):
        error = means[key].std().item() / 20**0.5
        assert means[key].mean().item() == pytest.approx(value, abs=4 * error)


def test_sets_smaller_than_the_neighbourhood() -> None:
    found = neighbours(*sets(2, 3))
    assert all(values.isfinite().all() for values in found.values())


def test_prompt_diversity_is_over_pairs_of_one_prompt() -> None:
    features = torch.tensor([[0.0], [1.0], [5.0], [8.0]]).double()
    labels = torch.tensor([0, 0, 1, 1])
    assert prompt_diversity(features, labels, *ones(features)).item() == pytest.approx(2.0)
    assert prompt_diversity(features, torch.arange(4), *ones(features)).isnan().all()


def judged(a: Tensor, b: Tensor, real: Tensor, seed: int = 0) -> dict[str, Verdict]:
    labels = torch.arange(len(a)) % 4
    return verdicts(*(replicates(x, labels, real, seed=seed) for x in (a, b)))


def test_verdicts_in_pairs() -> None:
    """Small samples: what is nearer is seen as better, what is the same is not."""
    noise, real = torch.randn(64, 16), torch.randn(16, 16)
    far, near = noise + 0.5, noise + 0.4
    found = judged(far, near, real)["mmd"]
    assert found.word == "better" and found.gain > 0 and found.interval[1] < 0
    assert judged(near, far, real)["mmd"].word == "worse"
    assert judged(far, far, real)["mmd"].word == "cannot be told apart"
    # other noises: the same difference drowns in the draw
    other = torch.randn(64, 16) + 0.4
    assert judged(far, other, real)["mmd"].error > 3 * found.error


def test_a_collapsed_generator_is_worse_by_what_decides() -> None:
    """Of 16 images the Frechet distance calls half the spread better; what is unbiased does not."""
    noise, real = torch.randn(64, 64), torch.randn(16, 64)
    labels, of_real = torch.arange(64) % 4, torch.arange(16) % 4
    found = verdicts(
        *(replicates(x + 0.1, labels, real, of_real, seed=0) for x in (noise, noise / 2))
    )
    assert found["energy_score"].word == "worse"
    assert found["frechet_distance"].word == "better"
    assert found["mmd"].word == found["recall"].word == "worse"
    assert found["prompt_diversity"].word == "lower"


def test_standard_errors_are_those_of_other_draws() -> None:
    """The bootstrap's error of a paired difference is about what new images give."""
    changes, errors = [], []
    for k in range(40):
        noise, real = torch.randn(48, 4).double(), torch.randn(48, 4).double()
        u, v = resamples(48, k), resamples(48, k + 100)
        change = mmd(noise + 0.4, real, u, v, 2.0) - mmd(noise + 0.6, real, u, v, 2.0)
        changes.append(change[0].item())
        errors.append(change[1:].std().item())
    assert 0.7 < np.mean(errors) / np.std(changes) < 1.4


def test_median_distance_of_equal_images_is_a_width_all_the_same() -> None:
    assert median_distance(torch.ones(4, 2)) == 1
    assert median_distance(torch.tensor([[0.0], [1.0], [2.0]])) == 1


def test_of_two_real_images_bootstraps_without_a_pair_do_not_count() -> None:
    found = judged(torch.randn(8, 2), torch.randn(8, 2), torch.randn(2, 2))["mmd"]
    assert math.isfinite(found.error) and found.error > 0


def test_what_is_not_finite_has_no_verdict() -> None:
    found = judged(torch.randn(4, 2), torch.randn(4, 2), torch.randn(5, 2))
    assert "prompt_diversity" not in found and "mmd" in found  # one image of each prompt


def test_energy_scores_are_means_over_pairs_of_one_prompt() -> None:
    a, b = sets(7, 4)
    labels_a, labels_b = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([1, 0, -1, 1])
    scores = []
    for y, label in zip(b.numpy(), labels_b.tolist(), strict=True):
        if label < 0:
            continue
        x = a[labels_a == label]
        across = mean_over_pairs(lambda p, q: np.linalg.norm(p - q), x, torch.from_numpy(y[None]))
        scores.append(across - mean_over_pairs(lambda p, q: np.linalg.norm(p - q), x) / 2)
    found = energy_score(a, labels_a, b, labels_b, *ones(a, b))
    assert found.tolist() == pytest.approx([np.mean(scores)])
    # a bootstrap's weights count as copies, which are no pair; a prompt without a pair is left out
    u = torch.tensor([[2.0, 1, 0, 0, 3, 1, 0]]).double()
    drawn = [a[0], a[0], a[1]]
    across = np.mean([np.linalg.norm(x - b[1]) for x in drawn])
    expected = across - np.linalg.norm(a[0] - a[1]) / 2
    found = energy_score(a, labels_a, b, labels_b, u, torch.ones(1, 4).double())
    assert found.tolist() == pytest.approx([expected])
    alone = energy_score(a[:2], torch.tensor([0, 1]), b, labels_b, *ones(a[:2], b))
    assert alone.isnan().all()


@pytest.mark.parametrize(("prompts", "images", "real"), [(40, 2, 40), (5, 20, 20)])
def test_errors_of_energy_scores_are_those_of_other_draws(prompts, images, real) -> None:
    """Of unique captions with two images each, and of few prompts with many."""
    labels, real_labels = torch.arange(prompts * images) % prompts, torch.arange(real) % prompts
    gains, errors = [], []
    for seed in range(40):
        centres = 2 * torch.randn(prompts, 8)
        noise = torch.randn(len(labels), 8)
        y = centres[real_labels] + torch.randn(real, 8)
        drawn = prompt_resamples(labels, real_labels, seed)
        before, after = (
            {"energy_score": energy_score(x.double(), labels, y.double(), real_labels, *drawn)}
            for x in (centres[labels] + by * noise for by in (1.5, 1.2))
        )
        found = verdicts(before, after)["energy_score"]
        gains.append(found.gain)
        errors.append(found.error)
    ratio = np.mean(errors) / np.std(gains, ddof=1)
    assert 0.65 < ratio < 1.5, ratio


def test_energy_scores_see_a_wrong_prompt_and_a_lack_of_spread_in_few_images() -> None:
    """Where marginal distances cannot: images of the other prompt, and of 16 half the spread."""
    centres = torch.tensor([-2.0, 2.0]).repeat(32)
    noise, real = torch.randn(64, 8), torch.randn(16, 8)
    labels = torch.arange(64) % 2
    real[:, 0] += centres[:16]
    right, swapped, narrow = noise.clone(), noise.clone(), noise / 2
    right[:, 0] += centres
    swapped[:, 0] -= centres
    narrow[:, 0] += centres
    kept = [
        replicates(x, labels, real, labels[:16], seed=0) for x in (right, swapped, narrow)
    ]  # fmt: skip
    assert verdicts(kept[0], kept[1])["energy_score"].word == "worse"
    assert verdicts(kept[0], kept[1])["mmd"].word == "cannot be told apart"
    assert verdicts(kept[0], kept[2])["energy_score"].word == "worse"
