"""Sums over a stream of noises, and tests of their law on them; no noise is kept."""

import math
from collections.abc import Sequence
from typing import Any

import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.noise.checks import (
    LEVEL,
    QUANTILE,
    Check,
    check_law,
    covariance_check,
    eigenvalue_band,
    rms_check,
)

_BINS = 60
_TAIL = 1e-3  # probability of each outermost bin of a histogram, about


class PatchSums:
    """Sums over noises of one shape: their moments, mean and patch covariance follow.

    Attributes:
        shape: (C, H, W) of a noise.
        p: Patch side, latent pixels.
        D: Elements of a patch.
        patches: Patches of a noise.
        noises: Noises counted.
    """

    def __init__(self, shape: Sequence[int], patch_size: int) -> None:
        """Start with no noise of ``shape`` [C, H, W]; the patch side divides H and W."""
        C, H, W = self.shape = tuple(shape)
        self.p, self.D = patch_size, C * patch_size**2
        self.patches, self.noises = H // patch_size * (W // patch_size), 0
        self._powers = torch.zeros(4, dtype=torch.float64)
        self._total = torch.zeros(self.shape, dtype=torch.float64)
        self._outer = torch.zeros(self.D, self.D, dtype=torch.float64)

    def add(self, z: Tensor) -> None:
        """Count noises [B, C, H, W], float32 or float64."""
        square = z * z
        powers = (z, square, square * z, square * square)
        self._powers += torch.stack([x.sum(dtype=torch.float64) for x in powers])
        self._total += z.sum(0, dtype=torch.float64)
        self._outer += ops.patch_outer(z, z, self.p).double()
        self.noises += len(z)

    @property
    def vectors(self) -> int:
        """Patches counted."""
        return self.noises * self.patches

    @property
    def moments(self) -> dict[str, float]:
        """Mean, variance, skewness and excess kurtosis of all elements."""
        mean, second, third, fourth = (self._powers / (self.vectors * self.D)).tolist()
        variance = second - mean**2
        cubes = third - 3 * mean * second + 2 * mean**3
        fourths = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        return {
            "mean": mean,
            "variance": variance,
            "skewness": cubes / variance**1.5,
            "kurtosis": fourths / variance**2 - 3,
        }

    @property
    def shift(self) -> Tensor:
        """Mean noise in standard errors, [C, H, W] float64."""
        return self._total / self.noises**0.5

    @property
    def covariance(self) -> Tensor:
        """Of the patches about the mean 0, [D, D] float64."""
        return self._outer / self.vectors

    @property
    def eigenvalues(self) -> Tensor:
        """Of the patches' covariance, [D] float64, descending."""
        return torch.linalg.eigvalsh(self.covariance).flip(0)

    def eigenvalue_range(self) -> dict[str, list[float]]:
        """Ends "low" and "high" of what is allowed to each eigenvalue, [D]."""
        mean, deviation, width = eigenvalue_band(self.vectors, self.D)
        low, high = (mean - width * deviation).clamp_min(0), mean + width * deviation
        return {"low": low.tolist(), "high": high.tolist()}

    def checks(self) -> list[Check]:
        """Tests of the moments, of the mean noise and patch, and of the patches' covariance."""
        return [*self._moment_checks(), *self._shift_checks(), self._eigenvalue_check()]

    def _moment_checks(self) -> list[Check]:
        """Standard errors of the moments of N normal values: sqrt(1, 2, 6, 24 / N)."""
        moments, count = self.moments, self.vectors * self.D
        laws = (
            ("mean", "mean of all elements", 0.0, 1),
            ("variance", "variance of all elements; no rotation changes the energy", 1.0, 2),
            ("skewness", "asymmetry of all elements", 0.0, 6),
            ("kurtosis", "excess kurtosis of all elements; above 0 means heavy tails", 0.0, 24),
        )
        return [
            check_law(name, meaning, moments[name], scipy.stats.norm(mean, (c / count) ** 0.5))
            for name, meaning, mean, c in laws
        ]

    def _shift_checks(self) -> list[Check]:
        """RMS standard errors of the mean noise, per latent element and per patch element."""
        (C, H, W), p, noise = self.shape, self.p, self.shift
        patch = noise.view(C, H // p, p, W // p, p).sum((1, 3)) / self.patches**0.5
        of_noise = f"RMS of the mean of {self.noises} noises, in standard errors"
        of_patch = "RMS of the mean over all patches, in standard errors"
        return [rms_check("mean noise", of_noise, noise), rms_check("mean patch", of_patch, patch)]

    def _eigenvalue_check(self) -> Check:
        """Largest departure of an eigenvalue from its mean; the p-value is Bonferroni's bound."""
        mean, deviation, width = eigenvalue_band(self.vectors, self.D)
        # with fewer patches than dimensions the smallest eigenvalues are exactly 0
        value = ((self.eigenvalues - mean) / deviation.clamp_min(1e-9)).abs().max().item()
        p_value = min(1.0, float(2 * self.D * scipy.stats.norm.sf(value)))
        meaning = "largest departure of a patch covariance eigenvalue, in standard deviations"
        return Check("patch covariance", meaning, value, 0.0, width, p_value)


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
        return check_law(name, meaning, value, scipy.stats.chi2(_BINS - 1), one_sided=True)

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


class PatchStatistics(PatchSums):
    """Sums and histograms of noises of one shape, and whether they are iid N(0, 1)."""

    def __init__(self, shape: Sequence[int], patch_size: int) -> None:
        super().__init__(shape, patch_size)
        energy = scipy.stats.chi2(self.D, scale=1 / self.D)
        self.values = Histogram(-3.1, 3.1, scipy.stats.norm())
        self.norms = Histogram(float(energy.ppf(_TAIL)), float(energy.isf(_TAIL)), energy)

    def add(self, z: Tensor) -> None:
        super().add(z)
        self.values.add(z)
        self.norms.add(F.avg_pool2d(z.square().mean(1, keepdim=True), self.p))

    def result(self) -> dict[str, Any]:
        """JSON values: moments, curves for plots, checks with p-values, and how far from N(0, I).

        ``kl`` is the divergence in nats per patch of the Gaussian of the patches' covariance from
        N(0, I), ``kl_by_chance`` what sampling noise gives on average, and ``mean_shift`` the RMS
        over the noise's elements of their mean, in units of the noise's deviation.
        """
        m, D, eigenvalues = self.vectors, self.D, self.eigenvalues
        kl = (eigenvalues.sum() - eigenvalues.log().sum() - D).item() / 2
        means, variances = self._per_element()
        checks = [
            *self.checks(),
            self.values.check("values", "chi-square of the histogram of all elements"),
            self.norms.check("norms", "chi-square of the histogram of the patches' norms"),
            covariance_check(kl, m, D),
        ]
        return {
            "noises": self.noises,
            "patches": m,
            "dimensions": D,
            "moments": self.moments,
            "kl": kl,
            "kl_by_chance": D * (D + 1) / (4 * m),
            "mean_shift": (self._total / self.noises).square().mean().sqrt().item(),
            "mean_shift_by_chance": self.noises**-0.5,
            "eigenvalues": {"measured": eigenvalues.tolist(), **self.eigenvalue_range()},
            "means": means,
            "variances": variances,
            "values": self.values.result(),
            "norms": self.norms.result(),
            "checks": [check.row() for check in checks],
        }

    def _per_element(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Mean and variance of each of a patch's elements, with their allowed ranges."""
        C, H, W = self.shape
        m, D, p = self.vectors, self.D, self.p
        sums = self._total.view(C, H // p, p, W // p, p).sum((1, 3)).flatten()
        tail = LEVEL / (2 * D)  # Bonferroni: all D stay inside with probability 1 - LEVEL
        width = float(scipy.stats.norm.isf(tail)) / math.sqrt(m)
        low, high = (scipy.stats.chi2.ppf([tail, 1 - tail], m) / m).tolist()
        means = {"measured": (sums / m).tolist(), "low": -width, "high": width}
        return means, {"measured": self.covariance.diagonal().tolist(), "low": low, "high": high}
