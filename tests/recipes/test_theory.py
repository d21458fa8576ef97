"""Rotations and the Gaussian law: tests reject what they should, at the rate they state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from safetensors.torch import save_file
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.noise.rotation import PatchRotation
from oneshot_fast.noise.statistics import PatchStatistics
from oneshot_fast.theory import TheoryCommand, load_rotations, measure, towards

Call = Callable[..., Any]
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


def test_a_fixed_rotation_keeps_the_law_and_a_chosen_one_does_not(tmp_path: Path) -> None:
    sets = measure(TheoryCommand(tmp_path, channels=C, num_samples=20000))["sets"]
    base, fixed, chosen = (sets[f"{n}"] for n in ("base", "fixed rotation", "chosen rotation"))
    assert outside(base) == outside(fixed) == set()
    eigenvalues = [part["eigenvalues"]["measured"] for part in (base, fixed)]
    assert eigenvalues[0] == pytest.approx(eigenvalues[1], abs=1e-5)
    assert base["norms"]["density"] == pytest.approx(fixed["norms"]["density"], abs=0.01)
    assert base["means"]["measured"] != pytest.approx(fixed["means"]["measured"], abs=1e-4)
    assert {"mean noise", "mean patch"} <= outside(chosen)
    assert chosen["mean_shift"] > 2 * chosen["mean_shift_by_chance"]
    assert "norms" not in outside(chosen)


def test_towards_is_the_closest_rotation() -> None:
    eps, pattern = noises(3), noises(1, 5)[0]
    q = towards(pattern, eps, P)
    torch.testing.assert_close(q @ q.mT, torch.eye(D).expand(3, D, D), atol=1e-5, rtol=0)
    best = (ops.patch_rotate(eps, q, P) * pattern).sum((1, 2, 3))
    for seed in range(20):
        skew = 0.2 * torch.randn(3, D, D, generator=torch.Generator().manual_seed(seed))
        other = torch.linalg.matrix_exp(skew - skew.mT) @ q
        assert ((ops.patch_rotate(eps, other, P) * pattern).sum((1, 2, 3)) < best).all()


def test_adapters(tmp_path: Path) -> None:
    rotation = PatchRotation((2, C, 8, 8), P)
    torch.nn.init.normal_(rotation.skew, std=0.3)
    expected = rotation.q().detach()
    save_file({"q": expected}, tmp_path / "q.safetensors")
    save_file(rotation.state_dict(), tmp_path / "skew.safetensors")
    torch.save(rotation.state_dict(), tmp_path / "skew.pt")
    for name in ("q.safetensors", "skew.safetensors", "skew.pt"):
        torch.testing.assert_close(load_rotations(tmp_path / name, D), expected, atol=1e-5, rtol=0)
    found = measure(TheoryCommand(channels=C, num_samples=5000, adapter=tmp_path / "q.safetensors"))
    assert found["rotations"] == 2 and outside(found["sets"]["fixed rotation"]) == set()


def test_command_with_assigned_noises(assigned: Path, tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "theory"
    manifest = assigned / "manifest.jsonl"
    ended = call(
        "theory", "--output_dir", folder, "--num_samples", 4096, "--manifest_path", manifest
    )
    assert ended.code == 0, ended.err
    found = json.loads((folder / "theory.json").read_text())
    assert list(found["sets"]) == ["base", "fixed rotation", "assigned noises"]
    assert found["sets"]["assigned noises"]["noises"] == 6
    assert found["settings"]["manifest_path"] == str(manifest)
    assert (folder / "theory.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 5 and "assigned noises" in page


def test_bad_input(assigned: Path, tmp_path: Path, call: Call) -> None:
    out = ("--output_dir", tmp_path / "theory")
    assert "covariance" in call("theory", *out, "--num_samples", 100).error
    assert "at most 1024" in call("theory", *out, "--patch_size", 32).error
    save_file({"q": 1.1 * torch.eye(16)}, tmp_path / "q.safetensors")
    assert "orthogonal" in call("theory", *out, "--adapter", tmp_path / "q.safetensors").error
    save_file({"other": torch.eye(16)}, tmp_path / "q.safetensors")
    assert 'no tensor "q"' in call("theory", *out, "--adapter", tmp_path / "q.safetensors").error
    manifest = ("--manifest_path", assigned / "manifest.jsonl")
    assert "do not fit" in call("theory", *out, *manifest, "--channels", 3).error
    assert not (tmp_path / "theory").exists()
