"""Noises found in memory: those of a run over a folder."""

from __future__ import annotations

import dataclasses
import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from samples import rows_of

from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.data.records import Record
from oneshot_fast.errors import UserError
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign import in_memory
from oneshot_fast.jobs.assign.in_memory import assign_noise
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.run import AssignRun


@pytest.fixture(scope="module")
def records(small_data: Path) -> list[Record]:
    """With the ids that images in memory have."""
    found = read_pairs(small_data)[0][:3]
    return [dataclasses.replace(record, id=str(k)) for k, record in enumerate(found)]


@pytest.mark.parametrize(
    "options",
    [
        AssignOptions("best_of_n+free", 3, steps=2, pixel_l1_weight=0.5),
        AssignOptions("rotation", steps=3, stop_patience=1, stop_improvement=0.2),
        AssignOptions("pool", 4),
    ],
    ids=["chosen, then moved", "stopped early", "pool"],
)
def test_it_is_the_search_of_a_run(
    tiny: Generator, records: list[Record], tmp_path: Path, options: AssignOptions
) -> None:
    AssignRun(tiny, records, tmp_path, options, seed=5, batch_size=2, num_images=0).run()
    prompts = [record.prompt for record in records]
    paths = [record.image_path for record in records]
    found = assign_noise(tiny, prompts, paths, options, seed=5, batch_size=2)  # type: ignore[arg-type]
    for row in rows_of(tmp_path / "manifest.jsonl"):
        k, kept = row["index"], load_file(tmp_path / row["noise_path"])
        end = int(found.last_step[k]) + 1
        assert found.losses[:end, k].tolist() == row["losses"]
        assert found.best_loss[k].item() == row["best_loss"]
        assert found.best_step[k].item() == row["best_step"]
        assert torch.equal(found.z[k], kept["z"][row["noise_index"]])
        if found.q is not None:
            assert torch.equal(found.q[k], kept["q"][row["noise_index"]])


def test_images_are_tensors_pictures_or_files(tiny: Generator, records: list[Record]) -> None:
    prompts, options = [record.prompt for record in records], AssignOptions(steps=1, lr=0.1)
    paths = [record.image_path for record in records]
    tensor = torch.stack([TargetImages(tiny).image(path, "crop") for path in paths])
    pictures = [Image.open(str(path)) for path in paths]
    eps = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    kinds: list[Any] = [tensor, pictures, [str(path) for path in paths]]
    found = [assign_noise(tiny, prompts, images, options, eps=eps) for images in kinds]
    assert all(torch.equal(one.z, found[0].z) for one in found)
    chosen = assign_noise(tiny, prompts, tensor, AssignOptions("best_of_n", 1), eps=eps)
    assert torch.equal(chosen.z, eps)


def test_what_does_not_match_is_refused(tiny: Generator) -> None:
    images = torch.rand(2, 3, 64, 64)
    with pytest.raises(UserError, match="as many prompts as images, at least one, got 1 and 2"):
        assign_noise(tiny, ["a"], images)
    with pytest.raises(UserError, match=r"expected eps of shape \(2, 4, 8, 8\)"):
        assign_noise(tiny, ["a", "b"], images, eps=torch.zeros(2, 4, 8, 9))


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(in_memory, optionflags=doctest.ELLIPSIS).failed == 0
