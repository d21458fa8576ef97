"""Tests of the Gaussian law: statistics beside the ranges that iid N(0, 1) noise keeps."""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy
import scipy.stats
import torch
from torch import Tensor

LEVEL = 0.001
QUANTILE = NormalDist().inv_cdf(1 - LEVEL / 2)


@dataclass(frozen=True)
class Check:
    """A statistic, and the range in which Gaussian noise has it with probability 1 - LEVEL.

    Attributes:
        name: For tables.
        meaning: What the statistic is, for people.
        value: The statistic.
        low: Lower end of the range.
        high: Upper end of the range.
        p_value: Probability of a value at least as far out; None where the range is no law's.
    """

    name: str
    meaning: str
    value: float
    low: float
    high: float
    p_value: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the value is inside."""
        return self.low <= self.value <= self.high

    def row(self) -> dict[str, Any]:
        """JSON values: the attributes, p_value only where there is one, and ``ok``."""
        return {k: v for k, v in asdict(self).items() if v is not None} | {"ok": self.ok}


def check_law(name: str, meaning: str, value: float, law: Any, *, one_sided: bool = False) -> Check:
    """Check of a statistic of a known law, a frozen distribution of scipy.

    With ``one_sided``, for a law without negative values, only large values speak against it.
    """
    if one_sided:
        return Check(name, meaning, value, 0.0, float(law.isf(LEVEL)), float(law.sf(value)))
    low, high = float(law.ppf(LEVEL / 2)), float(law.isf(LEVEL / 2))
    p_value = 2 * min(float(law.cdf(value)), float(law.sf(value)))
    return Check(name, meaning, value, low, high, min(1.0, p_value))


def rms_check(name: str, meaning: str, errors: Tensor) -> Check:
    """Check of the root mean square of ``errors``, of any shape, which are N(0, 1)."""
    value = errors.square().mean().sqrt().item()
    return check_law(name, meaning, value, _rms_law(errors.numel()))


def norm_check(norms: Sequence[float], d: int) -> Check:
    """Kolmogorov-Smirnov distance of energies ||z||^2 / d, one per noise, to the chi-square law."""
    law = scipy.stats.chi2(d, scale=1 / d)
    distance = float(scipy.stats.ks_1samp(norms, law.cdf).statistic)
    meaning = "largest gap between the distribution of ||z||² and its chi-square law"
    return check_law("norms", meaning, distance, scipy.stats.kstwo(len(norms)), one_sided=True)


def nearest_check(noises: Tensor) -> list[Check]:
    """Smallest of all distances between two of the ``noises`` [N, d] float32, if there are two.

    ||a - b||^2 / 2 of two Gaussian noises has d degrees of freedom; all N (N - 1) / 2 pairs are
    taken as independent, which they nearly are.
    """
    n, d = noises.shape
    pairs = n * (n - 1) // 2
    if not pairs:
        return []
    value, law = torch.pdist(noises).min().item() / math.sqrt(2 * d), _rms_law(d)
    low, high = float(law.ppf(LEVEL / (2 * pairs))), float(law.isf((LEVEL / 2) ** (1 / pairs)))
    p_value = 2 * min(pairs * float(law.cdf(value)), float(law.sf(value)) ** pairs)
    meaning = "smallest distance between two noises, in sqrt(2 d); 0 means one noise serves twice"
    return [Check("nearest noises", meaning, value, low, high, min(1.0, p_value))]


def _rms_law(count: int) -> Any:
    """Law of the root mean square of ``count`` normal values."""
    return scipy.stats.chi(count, scale=count**-0.5)


@functools.lru_cache
def eigenvalue_band(m: int, D: int) -> tuple[Tensor, Tensor, float]:
    """Mean [D], deviation [D] and allowed width of the eigenvalues, descending, of a covariance.

    It is that of ``m`` iid N(0, I_D) vectors about the known mean 0, simulated in float64; the
    width in standard deviations is Bonferroni's, so that all D stay inside with probability 1 -
    LEVEL.
    """
    random = numpy.random.default_rng(0)
    samples = []
    for _ in range(400 if D <= 64 else 40):
        if m >= D:
            product = scipy.stats.wishart.rvs(m, numpy.eye(D), random_state=random)
        else:  # Wishart's law has no density, and few vectors are cheap to multiply
            root = random.standard_normal((D, m))
            product = root @ root.T
        samples.append(numpy.linalg.eigvalsh(product / m)[::-1])
    mean, deviation = numpy.mean(samples, 0), numpy.std(samples, 0, ddof=1)
    width = NormalDist().inv_cdf(1 - LEVEL / (2 * D))
    return torch.from_numpy(mean), torch.from_numpy(deviation), width


def covariance_check(kl: float, m: int, D: int) -> Check:
    """Likelihood ratio test that ``m`` vectors of known mean 0 have covariance I.

    m (tr S - ln |S| - D) = 2 m kl, with kl the divergence in nats of N(0, S) from N(0, I), is
    chi-square with D (D + 1) / 2 degrees of freedom after Bartlett's correction. Source: Anderson
    2003, An Introduction to Multivariate Statistical Analysis, section 10.8.
    """
    correction = 1 - (2 * D**2 + 3 * D - 1) / (6 * m * (D + 1))
    law = scipy.stats.chi2(D * (D + 1) // 2)
    meaning = "likelihood ratio of the patch covariance to I"
    return check_law("covariance is I", meaning, 2 * m * kl * correction, law, one_sided=True)
