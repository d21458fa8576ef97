"""Noises optimised in memory: those of a run over a folder."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samples import rows_of

from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.optimize import in_memory
from oneshot_fast.jobs.optimize.in_memory import optimize_noise
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.jobs.optimize.run import OptimizeRun
from oneshot_fast.rewards import load_rewards

PROMPTS = ["a photo of the digit three", "a photo of the digit zero"]


@pytest.mark.parametrize(
    "options",
    [OptimizeOptions("best_of_n+rotation", 2, steps=2), OptimizeOptions("best_of_n", 3)],
    ids=["chosen, then moved", "chosen"],
)
def test_it_is_the_search_of_a_run(
    tiny: Generator, tmp_path: Path, options: OptimizeOptions
) -> None:
    rewards = load_rewards(["digit", "thickness:0.1"])
    OptimizeRun(
        tiny, PROMPTS, tmp_path, options, rewards=rewards, images_per_prompt=2, batch_size=2, seed=5
    ).run()
    found = optimize_noise(
        tiny, PROMPTS, rewards, options, seed=5, images_per_prompt=2, batch_size=2
    )
    rows = rows_of(tmp_path / "manifest.jsonl")
    assert len(rows) == len(found.z) == 4 and found.scores.keys() == rows[0]["best"].keys()
    for row in rows:
        k, kept = row["index"], load_file(tmp_path / row["noise_path"])
        best = {name: curve[found.best_step[k], k].item() for name, curve in found.scores.items()}
        assert best == row["best"] and found.best_step[k].item() == row["best_step"]
        assert torch.equal(found.z[k], kept["z"][row["noise_index"]])


def test_a_search_can_stop_early(tiny: Generator) -> None:
    options = OptimizeOptions(steps=6, stop_loss=-0.1, stop_patience=3)
    found = optimize_noise(tiny, PROMPTS, load_rewards(["digit"]), options)
    assert found.last_step.min() < 6
    for k, end in enumerate(found.last_step.tolist()):
        assert found.losses[end + 1 :, k].eq(0).all()
        assert end == 6 or found.losses[end, k] <= -0.1 or end - found.best_step[k] <= 3


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(in_memory).failed == 0
