"""Is a stream of noises iid N(0, 1)? Tests on sums over their patches; no noise is kept."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.noise.checks import (
    LEVEL,
    QUANTILE,
    eigenvalue_band,
    eigenvalue_check,
    moment_checks,
    moments_of,
    shift_checks,
)

_BINS = 60
_TAIL = 1e-3  # probability of each outermost bin of a histogram, about

Check = dict[str, Any]
_band = functools.lru_cache(eigenvalue_band)  # a simulation


class Histogram:
    """Counts of a stream of numbers in bins of equal width; the outermost two take the tails."""

    def __init__(self, low: float, high: float, law: Any) -> None:
        """Cut [low, high] into bins; ``law`` is a frozen distribution of scipy."""
        self.low, self.high, self.law = low, high, law
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count ``values``, of any shape."""
        inside = values.float().clamp(self.low, self.high)
        self.counts += torch.histc(inside, _BINS, self.low, self.high).double()

    def probabilities(self) -> Tensor:
        """What the law gives each bin, [bins] float64."""
        edges = torch.linspace(self.low, self.high, _BINS + 1, dtype=torch.float64)[1:-1]
        steps = [0.0, *self.law.cdf(edges.numpy()).tolist(), 1.0]
        return torch.tensor(steps, dtype=torch.float64).diff()

    def check(self, name: str, meaning: str) -> Check:
        """Pearson's chi-square test (Pearson 1900) of the counts against the law."""
        expected = self.counts.sum() * self.probabilities()
        value = ((self.counts - expected).square() / expected).sum().item()
        return chi_square_check(name, meaning, value, _BINS - 1)

    def result(self) -> dict[str, Any]:
        """For a plot: edges, densities measured and expected, and the latter's allowed width."""
        share, width = self.probabilities(), (self.high - self.low) / _BINS
        total = self.counts.sum()
        spread = QUANTILE * (share * (1 - share) / total).sqrt()
        return {
            "edges": [self.low + width * k for k in range(_BINS + 1)],
            "density": (self.counts / total / width).tolist(),
            "expected": (share / width).tolist(),
            "allowed": (spread / width).tolist(),
        }


class PatchStatistics:
    """Sums over noises of one shape, from which tests of their law follow."""

    def __init__(self, shape: Sequence[int], patch_size: int) -> None:
        """Start with no noise.

        Args:
            shape: [C, H, W] of a noise.
            patch_size: Patch side p, latent pixels; divides H and W.
        """
        C, H, W = self.shape = tuple(shape)
        self.p, self.D = patch_size, C * patch_size**2
        self.patches, self.noises = H // patch_size * (W // patch_size), 0
        self.powers = torch.zeros(4, dtype=torch.float64)
        self.total = torch.zeros(self.shape, dtype=torch.float64)
        self.outer = torch.zeros(self.D, self.D, dtype=torch.float64)
        energy = scipy.stats.chi2(self.D, scale=1 / self.D)
        self.values = Histogram(-3.1, 3.1, scipy.stats.norm())
        self.norms = Histogram(float(energy.ppf(_TAIL)), float(energy.isf(_TAIL)), energy)

    def add(self, z: Tensor) -> None:
        """Count noises [B, C, H, W] float32."""
        square = z * z
        powers = (z, square, square * z, square * square)
        self.powers += torch.stack([x.sum(dtype=torch.float64) for x in powers])
        self.total += z.sum(0, dtype=torch.float64)
        self.outer += ops.patch_outer(z, z, self.p).double()
        self.values.add(z)
        self.norms.add(F.avg_pool2d(square.mean(1, keepdim=True), self.p))
        self.noises += len(z)

    @property
    def vectors(self) -> int:
        """Patches counted."""
        return self.noises * self.patches

    def result(self) -> dict[str, Any]:
        """JSON values: moments, curves for plots, checks with p-values, and how far from N(0, I).

        ``kl`` is the divergence in nats per patch of the Gaussian of the patches' covariance from
        N(0, I), ``kl_by_chance`` what sampling noise gives on average, and ``mean_shift`` the RMS
        over the noise's elements of their mean, in units of the noise's deviation.
        """
        m, D = self.vectors, self.D
        covariance = self.outer / m
        eigenvalues = torch.linalg.eigvalsh(covariance).flip(0)
        band = _band(m, D)
        moments = moments_of(self.powers, m * D)
        kl = (eigenvalues.sum() - eigenvalues.log().sum() - D).item() / 2
        shift = self.total / self.noises**0.5
        means, variances = self._per_element(covariance)
        return {
            "noises": self.noises,
            "patches": m,
            "dimensions": D,
            "moments": moments,
            "kl": kl,
            "kl_by_chance": D * (D + 1) / (4 * m),
            "mean_shift": (self.total / self.noises).square().mean().sqrt().item(),
            "mean_shift_by_chance": self.noises**-0.5,
            "eigenvalues": {
                "measured": eigenvalues.tolist(),
                "low": (band[0] - band[2] * band[1]).clamp_min(0).tolist(),
                "high": (band[0] + band[2] * band[1]).tolist(),
            },
            "means": means,
            "variances": variances,
            "values": self.values.result(),
            "norms": self.norms.result(),
            "checks": [
                *_with_p(moment_checks(moments, m * D), _normal_p),
                self.values.check("values", "chi-square of the histogram of all elements"),
                self.norms.check("norms", "chi-square of the histogram of the patches' norms"),
                *_shift_checks(shift, self.p, self.noises),
                *_with_p(
                    [eigenvalue_check(eigenvalues, *band)], lambda check: _largest_p(check, D)
                ),
                covariance_check(kl, m, D),
            ],
        }

    def _per_element(self, covariance: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
        """Mean and variance of each of a patch's elements, with their allowed ranges."""
        C, H, W = self.shape
        m, D, p = self.vectors, self.D, self.p
        sums = self.total.view(C, H // p, p, W // p, p).sum((1, 3)).flatten()
        tail = LEVEL / (2 * D)  # Bonferroni: all D stay inside with probability 1 - LEVEL
        width = float(scipy.stats.norm.isf(tail)) / math.sqrt(m)
        low, high = (scipy.stats.chi2.ppf([tail, 1 - tail], m) / m).tolist()
        means = {"measured": (sums / m).tolist(), "low": -width, "high": width}
        return means, {"measured": covariance.diagonal().tolist(), "low": low, "high": high}


def chi_square_check(name: str, meaning: str, value: float, freedom: int) -> Check:
    """A statistic that has the chi-square law; only large values speak against it."""
    law = scipy.stats.chi2(freedom)
    high, p = float(law.isf(LEVEL)), float(law.sf(value))
    return {
        "name": name, "meaning": meaning, "value": value, "low": 0.0, "high": high,
        "ok": value <= high, "p_value": p,
    }  # fmt: skip


def covariance_check(kl: float, m: int, D: int) -> Check:
    """Likelihood ratio test that ``m`` vectors of known mean 0 have covariance I.

    m (tr S - ln |S| - D) = 2 m kl is chi-square with D (D + 1) / 2 degrees of freedom after
    Bartlett's correction. Source: Anderson 2003, An Introduction to Multivariate Statistical
    Analysis, section 10.8.
    """
    correction = 1 - (2 * D**2 + 3 * D - 1) / (6 * m * (D + 1))
    meaning = "likelihood ratio of the patch covariance to I"
    return chi_square_check("covariance is I", meaning, 2 * m * kl * correction, D * (D + 1) // 2)


def _with_p(checks: Sequence[Check], p_value: Callable[[Check], float]) -> list[Check]:
    return [{**check, "p_value": p_value(check)} for check in checks]


def _normal_p(check: Check) -> float:
    """Two-sided, of a check whose range is that of a normal law."""
    middle, half = (check["low"] + check["high"]) / 2, (check["high"] - check["low"]) / 2
    return float(2 * scipy.stats.norm.sf(QUANTILE * abs(check["value"] - middle) / half))


def _largest_p(check: Check, count: int) -> float:
    """Of the largest of ``count`` departures in standard deviations (Bonferroni)."""
    return min(1.0, float(2 * count * scipy.stats.norm.sf(check["value"])))


def _shift_checks(shift: Tensor, p: int, noises: int) -> list[Check]:
    """The mean noise and the mean patch, whose squared standard errors are chi-square."""
    found = shift_checks(shift, p, noises)
    checks = []
    for check, count in zip(found, (shift.numel(), shift.shape[0] * p * p), strict=True):
        law = scipy.stats.chi2(count)
        energy = count * check["value"] ** 2
        tail = 2 * min(float(law.cdf(energy)), float(law.sf(energy)))
        checks.append({**check, "p_value": min(1.0, tail)})
    return checks
