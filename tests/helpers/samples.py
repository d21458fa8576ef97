"""What the tests of searches and runs share: options, targets, results read back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.generators.base import Conditioning, Generator, Prediction
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.objective import MatchingObjective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.targets import Target
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.search.gradient import Search
from oneshot_fast.search.options import SearchOptions
from oneshot_fast.search.problem import Assignment, Problem

PROMPTS = ["a handwritten digit three", "a handwritten digit seven"]

# between equal searches in other batches, whose rounding a few steps amplify
ROUNDING = 1e-4  # of losses, relative
NOISE = 3e-3  # of noises, absolute

STEPS = 12
FULL = AssignOptions("rotation", rotation_optimizer="raw_adam", lr=0.155, steps=STEPS)
"""With small steps, which do not amplify what rounding makes of other batches."""
PATIENT = dataclasses.replace(FULL, stop_patience=2, stop_improvement=0.045)
"""The same, stopped early."""

GRADIENT = {
    "rotation": SearchOptions("rotation", steps=8),
    "raw": SearchOptions("rotation", steps=8, rotation_optimizer="raw_adam"),
    "tiles": SearchOptions("rotation", steps=8, rotation_groups=2),
    "sphere": SearchOptions("sphere", steps=8),
    "white": SearchOptions("white", steps=8),
    "sphere, Adam": SearchOptions("sphere", steps=8, sphere_optimizer="adam"),
    "white, Adam": SearchOptions("white", steps=8, sphere_optimizer="adam"),
}
"""Ways to move noises."""


class Limited:
    """A generator that evaluates at most so many targets at once, as if on a small GPU."""

    def __init__(self, generator: Generator, limit: int) -> None:
        self.generator, self.limit, self.sizes = generator, limit, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def predict(self, eps: Tensor, prompts: Conditioning) -> Prediction:
        self.sizes.append(len(eps))
        if len(eps) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return self.generator.predict(eps, prompts)


def no_prompts(count: int) -> Conditioning:
    """For losses that need none, [count, 1]."""
    return Conditioning(torch.zeros(count, 1), torch.zeros(count, 1))


def of_one_prompt(targets: list[Target]) -> list[Target]:
    """The same targets, all with the first one's prompt."""
    first = targets[0]
    return [
        dataclasses.replace(
            target,
            prompt=first.prompt,
            record=dataclasses.replace(target.record, prompt=first.record.prompt),
        )
        for target in targets
    ]


def pool_seed(targets: list[Target], k: int) -> int:
    """Seed of candidate ``k`` of the pool of ``targets``, which share a prompt."""
    return derived_seed(0, "pool", targets[0].record.id, k)


def batch_of(tiny: Generator, data: Path) -> tuple[Tensor, Conditioning, Tensor, Tensor]:
    """Noises, prompts, latents and images of the pairs in ``data``."""
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


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
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
