"""Shared by tests: parts of test_assign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.generators.base import Conditioning, Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.objective import MatchingObjective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.search.gradient import Search
from oneshot_fast.search.problem import Assignment, Problem

ROUNDING = 1e-4  # of a loss, relative: a few steps of Adam amplify float32


NOISE = 1e-3  # of a noise, absolute


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def noises_of(folder: Path) -> dict[str, Tensor]:
    """Read z by the id of its pair."""
    rows = rows_of(folder / "manifest.jsonl")
    return {r["id"]: load_file(folder / r["noise_path"])["z"][r["noise_index"]] for r in rows}


def same_results(a: Path, b: Path) -> None:
    """Equal losses and noises to rounding, sample by sample, whatever the order."""
    old, new = ({r["id"]: r for r in rows_of(f / "manifest.jsonl")} for f in (a, b))
    assert old.keys() == new.keys()
    for name, row in old.items():
        assert row["losses"] == pytest.approx(new[name]["losses"], rel=ROUNDING)
        assert row["seed"] == new[name]["seed"]
    expected = noises_of(b)
    for name, z in noises_of(a).items():
        torch.testing.assert_close(z, expected[name], rtol=0, atol=NOISE)


def batch_of(tiny: Generator, data: Path) -> tuple[Tensor, Conditioning, Tensor, Tensor]:
    records, _ = read_pairs(data)
    targets, paths = TargetImages(tiny), [(record.image_path, "crop") for record in records]
    eps = gaussian([derived_seed(0, record.id) for record in records], (4, 8, 8))
    prompts = tiny.encode_prompts([record.prompt for record in records])
    return eps, prompts, targets.latents(paths), targets.images(paths)


def assign_batch(
    generator: Generator,
    eps: Tensor,
    conditioning: Conditioning,
    latents: Tensor,
    images: Tensor | None,
    options: AssignOptions,
) -> Assignment:
    """Move noises towards targets by gradients."""
    target = {"latents": latents} if images is None else {"latents": latents, "images": images}
    problem = Problem(eps, conditioning, target=target)
    return Search(problem, options, MatchingObjective(generator, options)).run()
