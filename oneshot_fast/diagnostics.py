"""Whether assigned noise still looks like Gaussian noise: a run's z against its own base noise.

Each check compares a statistic of z with the range that iid N(0, 1) noise of the same amount keeps
with probability 1 - LEVEL. Rotations keep every norm, so norms and variance check the stored files;
mean, skewness, kurtosis and covariance can change, because each rotation was chosen for its target.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy
import scipy.stats
import torch
from safetensors import safe_open
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.runs import write_json
from oneshot_fast.seeds import gaussian

LEVEL = 0.001
QUANTILE = NormalDist().inv_cdf(1 - LEVEL / 2)
# Largest error that float32 may leave in an element of z or of q q^T.
ROUNDING = 1e-3


def diagnose(folder: Path) -> dict[str, Any]:
    """Measure the noises of an assign run and write the result to ``folder``/diagnostics.json.

    Args:
        folder: Run folder with manifest.jsonl and noises/; one shard is in memory at a time.

    Returns:
        JSON values: ``targets``, ``elements`` (of one noise), ``patches`` (of one noise),
        ``patch_size``; ``moments`` of z and of the base noise; ``norms`` ||z||^2 / d and RMS
        rotation ``angles`` (degrees) per target; ``eigenvalues`` of the patch covariance of z and
        of the base noise, descending, with the allowed band; ``mean_shift`` [C, H, W], the mean of
        z over the targets in standard errors; and ``checks``, each with name, meaning, value, low,
        high and ok.
    """
    statistics = NoiseStatistics()
    for z, q, eps in _shards(folder):
        statistics.add(z, q, eps)
    result = statistics.result()
    write_json(folder / "diagnostics.json", result)
    return result


def _shards(folder: Path) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield z [b, C, H, W], q and base noise of one shard after the other, float64."""
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for noise_path, group in itertools.groupby(rows, key=lambda row: row["noise_path"]):
        members = list(group)
        index = [row["noise_index"] for row in members]
        with safe_open(folder / noise_path, framework="pt") as file:
            z, q = (file.get_tensor(name)[index].double() for name in ("z", "q"))
        yield z, q, gaussian([row["seed"] for row in members], z.shape[1:]).double()


class NoiseStatistics:
    """Sums over noises, from which every diagnostic follows."""

    def __init__(self) -> None:
        """Start with no noise."""
        self.powers = {name: torch.zeros(4, dtype=torch.float64) for name in ("z", "base")}
        self.outer: dict[str, Tensor] = {}
        self.total = torch.zeros(())
        self.norms: list[float] = []
        self.angles: list[float] = []
        self.residual = self.skewing = 0.0

    def add(self, z: Tensor, q: Tensor, eps: Tensor) -> None:
        """Count a batch.

        Args:
            z: Rotated noise, [B, C, H, W] float64.
            q: Rotations, [B, D, D] or [B, G, G, D, D] float64.
            eps: Base noise, [B, C, H, W] float64.
        """
        self.shape, D = z.shape[1:], q.shape[-1]
        self.patch_size = math.isqrt(D // z.shape[1])
        for name, x in (("z", z), ("base", eps)):
            self.powers[name] += torch.stack([x.pow(k).sum() for k in range(1, 5)])
            outer = ops.patch_outer(x, x, self.patch_size)
            self.outer[name] = self.outer[name] + outer if name in self.outer else outer
        self.total = self.total + z.sum(0)
        self.norms += z.square().mean((1, 2, 3)).tolist()
        self.angles += rotation_angles(q).tolist()
        self.residual = max(self.residual, _largest(z - ops.patch_rotate(eps, q, self.patch_size)))
        eye = torch.eye(D, dtype=q.dtype)
        self.skewing = max(self.skewing, _largest(q @ q.mT - eye))

    def result(self) -> dict[str, Any]:
        """All numbers and checks, as ``diagnose`` returns them."""
        n, d, p = len(self.norms), math.prod(self.shape), self.patch_size
        patches = d // self.outer["z"].shape[-1]
        eigenvalues = {
            name: torch.linalg.eigvalsh(outer / (n * patches)).flip(0)
            for name, outer in self.outer.items()
        }
        band = eigenvalue_band(n * patches, self.outer["z"].shape[-1])
        shift = self.total / n**0.5
        moments = {name: _moments(sums, n * d) for name, sums in self.powers.items()}
        checks = [
            *_moment_checks(moments["z"], n * d),
            _norm_check(self.norms, d),
            *_shift_checks(shift, p, n),
            _eigenvalue_check(eigenvalues["z"], *band),
            *self._file_checks(),
        ]
        low, high = band[0] - band[2] * band[1], band[0] + band[2] * band[1]
        curves = {**eigenvalues, "low": low.clamp_min(0), "high": high}
        return {
            "targets": n,
            "elements": d,
            "patches": patches,
            "patch_size": p,
            "moments": moments,
            "norms": [round(value, 6) for value in self.norms],
            "angles": [round(value, 4) for value in self.angles],
            "eigenvalues": {name: curve.tolist() for name, curve in curves.items()},
            "mean_shift": shift.mul(1000).round().div(1000).tolist(),
            "checks": checks,
        }

    def _file_checks(self) -> list[dict[str, Any]]:
        return [
            _check(
                "stored noise",
                "largest difference between z and its rotated base noise; only rounding is allowed",
                self.residual, 0.0, ROUNDING,
            ),
            _check(
                "stored rotations",
                "largest element of q q^T - I; only rounding is allowed",
                self.skewing, 0.0, ROUNDING,
            ),
        ]  # fmt: skip


def rotation_angles(q: Tensor) -> Tensor:
    """RMS rotation angle of each image: sqrt(mean theta^2) over the eigenvalues e^(i theta) of q.

    0 leaves the noise as it is; uniformly random rotations have about 104 degrees (pi / sqrt(3)).
    The cosines are the eigenvalues of q's symmetric part, since q is normal.

    Args:
        q: Orthogonal, [B, D, D] or [B, G, G, D, D].

    Returns:
        Degrees, [B].
    """
    cosines = torch.linalg.eigvalsh((q + q.mT) / 2).clamp(-1, 1)
    return cosines.acos().square().flatten(1).mean(1).sqrt().rad2deg()


def eigenvalue_band(m: int, D: int) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues of the covariance of ``m`` iid N(0, I_D) vectors about the known mean 0.

    Simulated; the width in standard deviations is Bonferroni's, so that all D eigenvalues stay
    inside with probability 1 - LEVEL.

    Returns:
        Mean [D] and standard deviation [D] of each eigenvalue, descending, float64; the width.
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


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _moments(powers: Tensor, count: int) -> dict[str, float]:
    mean, second, third, fourth = (powers / count).tolist()
    variance = second - mean**2
    return {
        "mean": mean,
        "variance": variance,
        "skewness": (third - 3 * mean * second + 2 * mean**3) / variance**1.5,
        "kurtosis": (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2
        - 3,
    }


def _check(name: str, meaning: str, value: float, low: float, high: float) -> dict[str, Any]:
    ok = low <= value <= high
    return {"name": name, "meaning": meaning, "value": value, "low": low, "high": high, "ok": ok}


def _moment_checks(moments: dict[str, float], count: int) -> list[dict[str, Any]]:
    """Standard errors of the moments of ``count`` normal values: sqrt(1, 2, 6, 24 / count)."""
    laws = (
        ("mean", "mean of all elements", 0.0, 1),
        ("variance", "variance of all elements; no rotation changes the energy", 1.0, 2),
        ("skewness", "asymmetry of all elements", 0.0, 6),
        ("kurtosis", "excess kurtosis of all elements; above 0 means heavy tails", 0.0, 24),
    )
    checks = []
    for name, meaning, expected, factor in laws:
        width = QUANTILE * math.sqrt(factor / count)
        checks.append(_check(name, meaning, moments[name], expected - width, expected + width))
    return checks


def _norm_check(norms: list[float], d: int) -> dict[str, Any]:
    """Kolmogorov-Smirnov distance of the energies d * norms to the chi-square law."""
    law = scipy.stats.chi2(d, scale=1 / d)
    distance = float(scipy.stats.ks_1samp(norms, law.cdf).statistic)
    meaning = "largest gap between the distribution of ||z||² and its chi-square law"
    return _check("norms", meaning, distance, 0.0, float(scipy.stats.kstwo.isf(LEVEL, len(norms))))


def _shift_checks(shift: Tensor, p: int, n: int) -> list[dict[str, Any]]:
    """Mean squared standard errors of the mean noise, per latent element and per patch element.

    Args:
        shift: Mean of z over the targets in standard errors, [C, H, W].
        p: Patch side, latent pixels.
        n: Targets.
    """
    C, H, W = shift.shape
    tiles = shift.view(C, H // p, p, W // p, p)
    laws = (
        ("mean noise", f"RMS of the mean of {n} noises, in standard errors", shift),
        ("mean patch", "RMS of the mean over all patches, in standard errors",
         tiles.sum((1, 3)) / math.sqrt(H // p * (W // p))),
    )  # fmt: skip
    checks = []
    for name, meaning, errors in laws:
        count = errors.numel()
        energies = scipy.stats.chi2.ppf([LEVEL / 2, 1 - LEVEL / 2], count)
        low, high = numpy.sqrt(energies / count).tolist()
        checks.append(_check(name, meaning, errors.square().mean().sqrt().item(), low, high))
    return checks


def _eigenvalue_check(
    values: Tensor, mean: Tensor, deviation: Tensor, width: float
) -> dict[str, Any]:
    # With fewer patches than dimensions the smallest eigenvalues are exactly 0.
    departure = _largest((values - mean) / deviation.clamp_min(1e-9))
    meaning = "largest departure of a patch covariance eigenvalue, in standard deviations"
    return _check("patch covariance", meaning, departure, 0.0, width)
