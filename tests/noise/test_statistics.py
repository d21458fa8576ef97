"""Statistics of noises: tests of their law reject what they should, at the rate they state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from oneshot_fast.noise.statistics import PatchStatistics

C, P = 2, 2
SHAPE, D = (C, 8, 16), C * P * P


def noises(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def result(z: Tensor, chunks: int = 1) -> dict[str, Any]:
    statistics = PatchStatistics(SHAPE, P)
    for part in z.chunk(chunks):
        statistics.add(part)
    return statistics.result()


def outside(found: dict[str, Any]) -> set[str]:
    return {check["name"] for check in found["checks"] if not check["ok"]}


def test_statistics_against_plain_torch_in_fp64() -> None:
    z = noises(60) * 1.1 + 0.05
    found, x = result(z, chunks=7), z.double()
    patches = x.view(60, C, 4, P, 8, P).permute(0, 2, 4, 1, 3, 5).reshape(-1, D)
    covariance = patches.T @ patches / len(patches)
    expected = torch.linalg.eigvalsh(covariance).flip(0)
    close = {"rel": 1e-5}
    assert found["eigenvalues"]["measured"] == pytest.approx(expected.tolist(), **close)
    assert found["means"]["measured"] == pytest.approx(patches.mean(0).tolist(), **close)
    assert found["variances"]["measured"] == pytest.approx(covariance.diagonal().tolist(), **close)
    assert found["moments"]["kurtosis"] == pytest.approx(
        scipy.stats.kurtosis(x.flatten()), rel=1e-4
    )
    kl = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(torch.zeros(D).double(), covariance),
        torch.distributions.MultivariateNormal(torch.zeros(D).double(), torch.eye(D).double()),
    )
    assert found["kl"] == pytest.approx(kl.item(), **close)
    assert found["mean_shift"] == pytest.approx(x.mean(0).square().mean().sqrt().item(), **close)
    counts = torch.histc(patches.square().mean(1), 60, *_ends(found["norms"]["edges"]))
    inner = slice(1, -1)
    width = found["norms"]["edges"][1] - found["norms"]["edges"][0]
    density = [count / len(patches) / width for count in counts.tolist()[inner]]
    assert found["norms"]["density"][inner] == pytest.approx(density, abs=2 / len(patches) / width)


def _ends(edges: list[float]) -> tuple[float, float]:
    return edges[0], edges[-1]


def test_checks_fail_at_the_stated_rate_and_p_values_are_uniform() -> None:
    # 150 runs x 12 checks at 0.1 %: 1.8 expected, more than 8 has probability 2e-4.
    found = [result(noises(40, seed)) for seed in range(150)]
    assert sum(len(outside(part)) for part in found) <= 8
    names = [check["name"] for check in found[0]["checks"]]
    assert len(names) == 10
    for k, name in enumerate(names):
        p_values = [part["checks"][k]["p_value"] for part in found]
        if name != "patch covariance":  # Bonferroni's bound, which is not exact
            assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-4, name
        assert all(
            (p < 1e-3) != part["checks"][k]["ok"] for p, part in zip(p_values, found, strict=True)
        )


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda z: 1.05 * z, {"variance", "values", "norms", "covariance is I"}),
        (lambda z: z + 0.2 * noises(1, 99), {"mean noise"}),
        (lambda z: z.sign() * (z.abs() + 0.1) / 1.09, {"values", "kurtosis"}),
        (
            lambda z: z * torch.tensor([1.05, 0.9474]).view(C, 1, 1),
            {"patch covariance", "covariance is I"},
        ),
    ],
)
def test_other_noise_is_told(spoil: Callable[[Tensor], Tensor], expected: set[str]) -> None:
    assert expected <= outside(result(spoil(noises(300))))
