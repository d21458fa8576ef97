"""Rotations and the Gaussian law, on samples and as a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from oneshot_fast.noise.rotation import PatchRotation
from oneshot_fast.recipes.theory import load_rotations
from oneshot_fast.theory import TheoryCommand, measure

Call = Callable[..., Any]
C, P = 2, 2
D = C * P * P


def outside(found: dict[str, Any]) -> set[str]:
    return {check["name"] for check in found["checks"] if not check["ok"]}


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


@pytest.mark.usefixtures("plots")
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
