"""Whether assigned noise still looks like Gaussian noise: a run's z against its own base noise.

Each check compares a statistic of z with the range that iid N(0, 1) noise of the same amount keeps
with probability 1 - LEVEL. All ways to assign keep every norm, so norms and variance check the
stored files; mean, skewness, kurtosis and covariance can change, because each noise was found for
its target.
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
from oneshot_fast.runtime.files import write_json
from oneshot_fast.runtime.seeds import gaussian

LEVEL = 0.001
QUANTILE = NormalDist().inv_cdf(1 - LEVEL / 2)
# Largest error that float32 may leave in an element of z or of q q^T.
ROUNDING = 1e-3
_COMPARED = 512  # noises among which the nearest are looked for


def diagnose(folder: Path) -> dict[str, Any]:
    """Measure the noises of an assign run and write the result to ``folder``/diagnostics.json.

    Args:
        folder: Run folder with manifest.jsonl and noises/; one shard is in memory at a time.

    Returns:
        JSON values: ``targets``, ``elements`` (of one noise), ``patches`` (of one noise),
        ``patch_size``; ``moments`` of z and of the base noise; ``norms`` ||z||^2 / d and ``angles``
        in degrees per target, of the rotation (RMS) or else between z and its base noise;
        ``eigenvalues`` of the patch covariance of z and of the base noise, descending, with the
        allowed band; ``mean_shift`` [C, H, W], the mean of z over the targets in standard errors;
        and ``checks``, each with name, meaning, value, low, high and ok.
    """
    statistics = NoiseStatistics()
    for z, q, eps in _shards(folder):
        statistics.add(z, q, eps)
    result = statistics.result()
    write_json(folder / "diagnostics.json", result)
    return result


def _shards(folder: Path) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield z [b, C, H, W], q, if any, and base noise of one shard after the other, float64."""
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for noise_path, group in itertools.groupby(rows, key=lambda row: row["noise_path"]):
        members = list(group)
        index = [row["noise_index"] for row in members]
        with safe_open(folder / noise_path, framework="pt") as file:
            z = file.get_tensor("z")[index].double()
            q = file.get_tensor("q")[index].double() if "q" in file.keys() else None  # noqa: SIM118
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
        self.compared: list[Tensor] = []

    def add(self, z: Tensor, q: Tensor | None, eps: Tensor) -> None:
        """Count a batch.

        Args:
            z: Assigned noise, [B, C, H, W] float64.
            q: Its rotations, [B, D, D] or [B, G, G, D, D] float64; None for other noises.
            eps: Base noise, [B, C, H, W] float64.
        """
        self.shape = C, H, W = z.shape[1:]
        if q is None:
            self.patch_size = 1 + (H % 2 == 0 and W % 2 == 0)
        else:
            self.patch_size = math.isqrt(q.shape[-1] // C)
        room = _COMPARED - sum(map(len, self.compared))
        self.compared.append(z[: max(0, room)].flatten(1).float())
        for name, x in (("z", z), ("base", eps)):
            self.powers[name] += torch.stack([x.pow(k).sum() for k in range(1, 5)])
            outer = ops.patch_outer(x, x, self.patch_size)
            self.outer[name] = self.outer[name] + outer if name in self.outer else outer
        self.total = self.total + z.sum(0)
        self.norms += z.square().mean((1, 2, 3)).tolist()
        if q is None:
            self.angles += angles_between(z, eps).tolist()
            gap = (z.flatten(1).norm(dim=1) - eps.flatten(1).norm(dim=1)) / z[0].numel() ** 0.5
            self.residual = max(self.residual, _largest(gap))
            return
        self.angles += rotation_angles(q).tolist()
        self.residual = max(self.residual, _largest(z - ops.patch_rotate(eps, q, self.patch_size)))
        eye = torch.eye(q.shape[-1], dtype=q.dtype)
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
        moments = {name: moments_of(sums, n * d) for name, sums in self.powers.items()}
        checks = [
            *moment_checks(moments["z"], n * d),
            _norm_check(self.norms, d),
            *shift_checks(shift, p, n),
            eigenvalue_check(eigenvalues["z"], *band),
            *_nearest_check(torch.cat(self.compared)),
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
                "largest difference from the rotated base noise, or without a rotation from its "
                "norm, per sqrt(d); only rounding is allowed",
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


def angles_between(z: Tensor, eps: Tensor) -> Tensor:
    """Angles in degrees, [B], between noises [B, C, H, W]; accurate for small ones."""
    a, b = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) for x in (z, eps))
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)).rad2deg()


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


def moments_of(powers: Tensor, count: int) -> dict[str, float]:
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


def moment_checks(moments: dict[str, float], count: int) -> list[dict[str, Any]]:
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


def shift_checks(shift: Tensor, p: int, n: int) -> list[dict[str, Any]]:
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


def _nearest_check(noises: Tensor) -> list[dict[str, Any]]:
    """Smallest of all distances between two of the noises [N, d], if there are two.

    ||a - b||^2 / 2 of two Gaussian noises has d degrees of freedom; all N (N - 1) / 2 pairs are
    taken as independent, which they nearly are.
    """
    n, d = noises.shape
    pairs = n * (n - 1) // 2
    if not pairs:
        return []
    value = torch.pdist(noises).min().item() / math.sqrt(2 * d)
    tails = LEVEL / (2 * pairs), -math.expm1(math.log(LEVEL / 2) / pairs)
    low, high = numpy.sqrt(scipy.stats.chi2.ppf(tails, d) / d).tolist()
    meaning = "smallest distance between two noises, in sqrt(2 d); 0 means one noise serves twice"
    return [_check("nearest noises", meaning, value, low, high)]


def eigenvalue_check(
    values: Tensor, mean: Tensor, deviation: Tensor, width: float
) -> dict[str, Any]:
    # With fewer patches than dimensions the smallest eigenvalues are exactly 0.
    departure = _largest((values - mean) / deviation.clamp_min(1e-9))
    meaning = "largest departure of a patch covariance eigenvalue, in standard deviations"
    return _check("patch covariance", meaning, departure, 0.0, width)
