"""Whether assigned noise still looks like Gaussian noise: a run's z against its own base noise.

All ways to assign keep every norm, so norms and variance check the stored files; mean, skewness,
kurtosis and covariance can change, because each noise was found for its target.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.noise.checks import Check, nearest_check, norm_check
from oneshot_fast.noise.rotation import angles_between, rotation_angles
from oneshot_fast.noise.statistics import PatchSums
from oneshot_fast.runtime.files import write_json
from oneshot_fast.runtime.seeds import gaussian

# largest error that float32 may leave in an element of z or of q q^T
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
        and ``checks``, each with name, meaning, value, low, high and ok. Of noises of several sizes
        those of the commonest are measured, and ``other_sizes`` is how many the others are.
    """
    sizes: dict[torch.Size, NoiseStatistics] = {}
    for z, q, eps in _shards(folder):
        sizes.setdefault(z.shape[1:], NoiseStatistics()).add(z, q, eps)
    found = sorted((one.result() for one in sizes.values()), key=lambda one: -one["targets"])
    result = found[0] | {"other_sizes": sum(one["targets"] for one in found[1:])}
    write_json(folder / "diagnostics.json", result)
    return result


def _shards(folder: Path) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield z [b, C, H, W], q, if any, and base noise of one shard after the other, float64."""
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for noise_path, group in itertools.groupby(rows, key=lambda row: row["noise_path"]):
        members = list(group)
        index = [row["noise_index"] for row in members]
        found = {
            name: rows[index].double() for name, rows in load_file(folder / noise_path).items()
        }
        eps = gaussian([row["seed"] for row in members], found["z"].shape[1:]).double()
        yield found["z"], found.get("q"), eps


class NoiseStatistics:
    """Sums over a run's noises, from which every diagnostic follows."""

    def __init__(self) -> None:
        """Start with no noise."""
        self._sums: dict[str, PatchSums] = {}
        self._norms: list[float] = []
        self._angles: list[float] = []
        self._residual = self._skewing = 0.0
        self._compared: list[Tensor] = []

    def add(self, z: Tensor, q: Tensor | None, eps: Tensor) -> None:
        """Count a batch of noises ``z`` and their base noises ``eps``, [B, C, H, W] float64 both.

        ``q`` are the rotations, [B, D, D] or [B, G, G, D, D] float64; None for other noises.
        """
        if not self._sums:
            p = _patch_size(z, q)
            self._sums = {name: PatchSums(z.shape[1:], p) for name in ("z", "base")}
        self._sums["z"].add(z)
        self._sums["base"].add(eps)
        room = _COMPARED - sum(map(len, self._compared))
        self._compared.append(z[: max(0, room)].flatten(1).float())
        self._norms += z.square().mean((1, 2, 3)).tolist()
        if q is None:
            self._angles += angles_between(z, eps).tolist()
            gap = (z.flatten(1).norm(dim=1) - eps.flatten(1).norm(dim=1)) / z[0].numel() ** 0.5
            self._residual = max(self._residual, _largest(gap))
            return
        self._angles += rotation_angles(q).tolist()
        rotated = ops.patch_rotate(eps, q, self._sums["z"].p)
        self._residual = max(self._residual, _largest(z - rotated))
        eye = torch.eye(q.shape[-1], dtype=q.dtype)
        self._skewing = max(self._skewing, _largest(q @ q.mT - eye))

    def result(self) -> dict[str, Any]:
        z = self._sums["z"]
        d = z.patches * z.D
        curves = {name: sums.eigenvalues.tolist() for name, sums in self._sums.items()}
        checks = [
            *z.checks(),
            norm_check(self._norms, d),
            *nearest_check(torch.cat(self._compared)),
            *self._file_checks(),
        ]
        return {
            "targets": z.noises,
            "elements": d,
            "patches": z.patches,
            "patch_size": z.p,
            "moments": {name: sums.moments for name, sums in self._sums.items()},
            "norms": [round(value, 6) for value in self._norms],
            "angles": [round(value, 4) for value in self._angles],
            "eigenvalues": curves | z.eigenvalue_range(),
            "mean_shift": z.shift.mul(1000).round().div(1000).tolist(),
            "checks": [check.row() for check in checks],
        }

    def _file_checks(self) -> list[Check]:
        return [
            Check(
                "stored noise",
                "largest difference from the rotated base noise, or without a rotation from its "
                "norm, per sqrt(d); only rounding is allowed",
                self._residual, 0.0, ROUNDING,
            ),
            Check(
                "stored rotations",
                "largest element of q q^T - I; only rounding is allowed",
                self._skewing, 0.0, ROUNDING,
            ),
        ]  # fmt: skip


def _patch_size(z: Tensor, q: Tensor | None) -> int:
    """Side of the patches that ``q`` turns; without it the smallest that shows neighbours."""
    C, H, W = z.shape[1:]
    return 1 + (H % 2 == 0 and W % 2 == 0) if q is None else math.isqrt(q.shape[-1] // C)


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
