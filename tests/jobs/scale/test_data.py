"""Pools of one's own: what is scored, written and resumed."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oneshot_fast.data.images import load_image
from oneshot_fast.data.shards import read_tar
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.jobs.scale.labels import read_labels
from oneshot_fast.jobs.scale.options import ScaleOptions
from oneshot_fast.jobs.scale.pools import read_pool
from oneshot_fast.jobs.scale.rules import Prune
from oneshot_fast.jobs.scale.walk import Walker
from oneshot_fast.rewards import load_rewards
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.scale import PoolOptions
from oneshot_fast.search.samples import samples_of


def test_labels_pool_and_pictures_are_of_the_same_images(made: Path, tiny: Any) -> None:
    labels = [json.loads(line) for line in (made / "labels.jsonl").open()]
    pool = read_pool(made / "pool.safetensors")
    assert pool.base.shape == (2, 2, 3, 2) and pool.rewards == ("thickness", "digit")
    assert pool.weights == (1.0, 0.5)
    loaded = PoolOptions(made / "pool.safetensors").load()  # as scale run adds them up
    assert loaded.rewards == ("total",)
    np.testing.assert_allclose(loaded.base[..., 0], pool.base @ (1.0, 0.5), rtol=1e-12)
    assert [label["id"] for label in labels] == [f"p000{p}/id00{j}" for p in (0, 1) for j in (0, 1)]
    for label, values in zip(labels, pool.base.reshape(4, 3, 2), strict=True):
        for r, name in enumerate(pool.rewards):
            np.testing.assert_allclose(values[:, r], label["scores_per_step"][name], rtol=1e-6)
            assert label["scores"][name] == label["scores_per_step"][name][-1]
    label, generator = labels[1], FewStepGenerator.over(tiny, 3)
    z, told = gaussian([label["seed"]], (4, 8, 8)), [label["seed"]]
    with torch.no_grad():
        latents = generator.estimates(z, generator.told([label["prompt"]], told))
        for step, one in enumerate(latents):
            image = generator.images(one)
            saved = load_image(made / "images" / label["id"] / f"s{step:02d}.png", 64, 64)
            assert (image[0] - saved).abs().max() < 1.01 / 255
            score = load_rewards(["thickness"])(image, [label["prompt"]]).item()
            assert label["scores_per_step"]["thickness"][step] == pytest.approx(score, rel=1e-4)
    total = label["scores"]["thickness"] + 0.5 * label["scores"]["digit"]
    first = (made / "labels.yaml").read_text().splitlines()[0]
    assert first.startswith("p0000: {id000: ") and f"id001: {total!r}" in first
    assert "What early rewards tell" in (made / "report.html").read_text()


def test_some_steps_and_no_pictures(
    made: Path, data_flags: list[Any], tmp_path: Path, call: Callable[..., Any]
) -> None:
    folder = tmp_path / "run"
    flags = [*data_flags, "--output_dir", folder, "--no_save_images", "--steps_saved", "0:1"]
    assert call("scale", *flags).code == 0
    pool, whole = (read_pool(place / "pool.safetensors") for place in (folder, made))
    assert pool.steps == (0, 2) and not (folder / "images").exists()
    np.testing.assert_array_equal(pool.base, whole.base[:, :, [0, 2]])
    for steps, said in (
        ("0-3", "write it as 0:15,19"),
        ("0:9", "there are 0 to 2"),
        ("2:0", "2:0, which is no step"),
    ):
        ended = call("scale", *data_flags, "--output_dir", tmp_path / "no", "--steps_saved", steps)
        assert ended.code == 2 and said in ended.error
    assert call("scale", *data_flags).error.endswith("give --output_dir DIR")
    planned = call("scale", *data_flags, "--steps_saved", "0:1", "--dry_run").out.splitlines()
    assert planned[0] == "prompts: 2, images of each: 2, pictures: 8"
    assert planned[1].startswith("evaluations: 12, ")
    assert planned[2].startswith("decoded and scored: 8, ")


def test_a_damaged_picture_is_made_again(
    made: Path, data_flags: list[Any], call: Callable[..., Any]
) -> None:
    picture = made / "images" / "p0001" / "id000" / "s01.png"
    before = picture.read_bytes()
    picture.write_bytes(before[:50])
    assert call("scale", *data_flags, "--output_dir", made).code == 0
    assert picture.read_bytes() == before


def test_shards_have_the_pictures_of_a_prompt_and_are_made_again(
    made: Path, data_flags: list[Any], tmp_path: Path, call: Callable[..., Any]
) -> None:
    flags = [*data_flags, "--output_dir", tmp_path / "run", "--format", "tar"]
    assert call("scale", *flags).code == 0
    shards = tmp_path / "run" / "images"
    assert sorted(path.name for path in shards.iterdir()) == ["p0000.tar", "p0001.tar"]
    before = [path.read_bytes() for path in sorted(shards.iterdir())]
    with tarfile.open(shards / "p0001.tar") as shard:
        for member in shard:
            data = shard.extractfile(member).read()  # type: ignore[union-attr]
            prompt, _, rest = member.name.partition("-")
            image, _, kind = rest.partition(".")
            if kind == "json":
                assert json.loads(data)["id"] == f"{prompt}/{image}"
            else:
                assert data == (made / "images" / prompt / image / kind).read_bytes()
    # a sample is a WebDataset one, of which the last step can be trained on
    found = [*read_tar(str(shards / "p0000.tar"), None, "s02.png")]
    assert [sample.key for sample in found] == ["p0000-id000.s02.png", "p0000-id001.s02.png"]
    (shards / "p0001.tar").write_bytes(b"torn")
    assert call("scale", *flags).code == 0
    assert [(shards / f"p000{k}.tar").read_bytes() for k in (0, 1)] == before
    pictures = [read_labels(place, "digit") for place in (made, tmp_path / "run")]
    rows = [(p, n) for p in (0, 1) for n in (0, 1)]
    for step in range(3):
        assert torch.equal(*(labels.images(rows, step) for labels in pictures))
    both = [*data_flags, "--output_dir", tmp_path / "no", "--format", "tar", "--no_save_images"]
    assert "--format has no effect" in call("scale", *both).error


def test_pictures_of_few_rows_are_in_memory(tiny: Any) -> None:
    """Each batch's are handed on before the next one is decoded, those of the last step too."""
    generator = FewStepGenerator.over(tiny, 3)
    walker, taken = Walker(generator, load_rewards(["thickness"]), (64, 64), 2), []
    walker.on_pictures = lambda step, first, images: taken.append((step, first, len(images)))
    rule = Prune(ScaleOptions(candidates=3, after=(0, 1), keep=(1.0, 1.0)), 3, 3)
    found = walker.walk(samples_of(["a handwritten digit one"], 1, seed=0), rule)
    assert taken == [(step, first, n) for step in range(3) for first, n in ((0, 2), (2, 1))]
    assert not len(found.images)
