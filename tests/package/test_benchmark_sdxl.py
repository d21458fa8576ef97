"""The SDXL-Turbo benchmark runs at the smallest size and reports every variant."""

import json

import pytest
import torch

from benchmarks.sdxl import turbo
from benchmarks.sdxl.models import build_unet


@pytest.mark.slow
def test_sdxl_turbo_at_the_smallest_size(tmp_path):
    output = tmp_path / "result.json"
    flags = "--arch tiny --device cpu --steps 2 --images 2 --batch-sizes 2 --rounds 1"
    assert turbo.main([*flags.split(), "--no-memory", "--options", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    names = [(row["kind"], row["variant"]) for row in rows]
    assert names == [
        ("assign", "reference"),
        ("assign", "reference, quiet"),
        ("assign", "ours, batch 2"),
        ("sft", "reference"),
        ("sft", "ours"),
        ("sft", "ours, LoRA 16"),
    ]
    shown, quiet, ours = rows[:3]
    assert shown["files"] > quiet["files"] == 1  # pictures and plots, and the noise alone
    # one step from the same law of noises: the losses are alike
    assert 0.5 < ours["loss"] / quiet["loss"] < 2
    assert "| ours, batch 2 |" in output.with_suffix(".md").read_text()


def test_the_full_architecture_has_the_published_size():
    with torch.device("meta"):
        unet = build_unet("full")
    assert sum(p.numel() for p in unet.parameters()) == 2567463684
