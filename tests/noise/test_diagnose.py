"""Noise diagnostics: Gaussian noise passes, each kind of other noise fails by its own check."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.noise.diagnose import NoiseStatistics, diagnose
from oneshot_fast.runtime.files import write_jsonl, write_safetensors
from oneshot_fast.runtime.seeds import gaussian

N, C, H, W, P = 40, 4, 16, 8, 2
D = C * P * P


def rotated(tiles: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw z [N, C, H, W], q [N, *tiles, D, D], eps; the rotations do not know the noise."""
    draw = torch.Generator().manual_seed(seed)
    eps = torch.randn(N, C, H, W, generator=draw, dtype=torch.float64)
    skew = 0.3 * torch.randn(N, *tiles, D, D, generator=draw, dtype=torch.float64)
    q = torch.linalg.matrix_exp(skew - skew.mT)
    return ops.patch_rotate(eps, q, P), q, eps


def measured(z: Tensor, q: Tensor, eps: Tensor) -> dict[str, Any]:
    statistics = NoiseStatistics()
    statistics.add(z, q, eps)
    return statistics.result()


def failed(result: dict[str, Any]) -> set[str]:
    return {check["name"] for check in result["checks"] if not check["ok"]}


@pytest.mark.parametrize("tiles", [(), (2, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_rotated_gaussian_noise_passes_every_check(tiles: tuple[int, ...], seed: int) -> None:
    assert failed(measured(*rotated(tiles, seed))) == set()


def channels_unequal(z: Tensor) -> Tensor:
    scale = torch.tensor([1.1, 1.1, 0.8888, 0.8888], dtype=z.dtype)
    return z * scale.view(1, C, 1, 1)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda z: 1.2 * z, {"variance", "norms", "patch covariance"}),
        (lambda z: 0.9 * z, {"variance", "norms"}),
        (lambda z: z + 0.1, {"mean", "mean noise", "mean patch"}),
        # A shape that all noises share, without a common level.
        (lambda z: z + 0.5 * torch.linspace(-1, 1, W, dtype=z.dtype), {"mean noise"}),
        # Channels of opposite sign cancel in the mean of all elements.
        (
            lambda z: z + 0.1 * torch.tensor([1.0, -1, 1, -1], dtype=z.dtype).view(C, 1, 1),
            {"mean patch"},
        ),
        (channels_unequal, {"patch covariance"}),
        (lambda z: z + 0.15 * (z.square() - 1), {"skewness"}),
        (lambda z: z.sign() * z.abs().pow(1.3) / 1.17, {"kurtosis"}),
        # Right on the whole, but every noise has another energy.
        (lambda z: z * torch.linspace(0.8, 1.17, N, dtype=z.dtype).view(N, 1, 1, 1), {"norms"}),
    ],
)
def test_other_noise_fails(spoil: Any, expected: set[str]) -> None:
    z, q, eps = rotated()
    found = failed(measured(spoil(z), q, eps))
    assert expected | {"stored noise"} <= found


def test_opposite_channels_leave_the_mean_of_all_elements_alone() -> None:
    z, q, eps = rotated()
    z = z + 0.1 * torch.tensor([1.0, -1, 1, -1], dtype=z.dtype).view(C, 1, 1)
    assert "mean" not in failed(measured(z, q, eps))


def test_noise_of_another_seed_and_unorthogonal_rotations_are_noticed() -> None:
    z, q, eps = rotated()
    assert failed(measured(z, q, eps.flip(0))) == {"stored noise"}
    assert "stored rotations" in failed(measured(z, 1.01 * q, eps))


def test_a_statistic_lies_in_its_range_at_the_stated_rate() -> None:
    # 100 runs x 8 checks at 0.1 % each: 0.8 expected, more than 6 has probability 1e-5.
    alarms, draw = 0, torch.Generator().manual_seed(1)
    eye = torch.eye(D, dtype=torch.float64)
    for _ in range(100):
        eps = torch.randn(8, C, 8, 8, generator=draw, dtype=torch.float64)
        result = measured(eps, eye.expand(8, D, D), eps)
        alarms += len(failed(result))
        for check in result["checks"]:  # those of the files have no law
            assert (check.get("p_value", 1) < 1e-3) != check["ok"]
    assert alarms <= 6


def write_run(folder: Path, shards: list[int], tiles: tuple[int, ...] = ()) -> Tensor:
    """Folder of an assign run with shards of these sizes; returns its z, in manifest order."""
    rows: list[dict[str, Any]] = []
    noises = []
    for shard, size in enumerate(shards):
        seeds = [1000 * shard + k for k in range(size)]
        draw = torch.Generator().manual_seed(shard)
        skew = 0.1 * torch.randn(size, *tiles, D, D, generator=draw)
        q = torch.linalg.matrix_exp(skew - skew.mT)
        z = ops.patch_rotate(gaussian(seeds, (C, H, W)), q, P)
        name = f"noises/{shard}.safetensors"
        write_safetensors(folder / name, {"z": z, "q": q}, {})
        # Backwards: the manifest, not the shard, says which noise belongs to which seed.
        for k in reversed(range(size)):
            rows.append({"noise_path": name, "noise_index": k, "seed": seeds[k]})
            noises.append(z[k])
    write_jsonl(folder / "manifest.jsonl", rows)
    return torch.stack(noises).double()


@pytest.mark.parametrize("tiles", [(), (2, 2)])
def test_diagnose_adds_up_shards(tmp_path: Path, tiles: tuple[int, ...]) -> None:
    z = write_run(tmp_path, [5, 1, 8], tiles)
    result = diagnose(tmp_path)
    assert json.loads((tmp_path / "diagnostics.json").read_text()) == result
    assert failed(result) == set()
    assert (result["targets"], result["elements"], result["patch_size"]) == (14, C * H * W, P)
    moments = result["moments"]["z"]
    centred = z - z.mean()
    assert math.isclose(moments["mean"], z.mean().item(), abs_tol=1e-12)
    assert math.isclose(moments["variance"], centred.square().mean().item(), rel_tol=1e-9)
    deviation = centred.square().mean().sqrt()
    assert math.isclose(
        moments["skewness"], (centred / deviation).pow(3).mean().item(), abs_tol=1e-9
    )
    assert math.isclose(
        moments["kurtosis"], (centred / deviation).pow(4).mean().item() - 3, abs_tol=1e-9
    )
    assert result["norms"] == pytest.approx(z.square().mean((1, 2, 3)).tolist(), abs=1e-6)
    shift = z.mean(0) * math.sqrt(14)
    torch.testing.assert_close(
        torch.tensor(result["mean_shift"], dtype=torch.float64), shift, atol=6e-4, rtol=0
    )
    patches = z.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 1, 4, 5).reshape(-1, D)
    expected = torch.linalg.eigvalsh(patches.T @ patches / len(patches)).flip(0)
    assert result["eigenvalues"]["z"] == pytest.approx(expected.tolist(), rel=1e-9)


def test_diagnose_notices_a_spoiled_file(tmp_path: Path) -> None:
    z = write_run(tmp_path, [6])
    write_safetensors(
        tmp_path / "noises/0.safetensors",
        {"z": 1.2 * z.flip(0).float(), "q": torch.eye(D).expand(6, D, D)},
        {},
    )
    assert {"variance", "norms", "stored noise"} <= failed(diagnose(tmp_path))
