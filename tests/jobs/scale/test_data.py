"""Pools of one's own: what is scored, written and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oneshot_fast.data.images import load_image
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.jobs.scale.pools import read_pool
from oneshot_fast.rewards import load_rewards
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.scale import PoolOptions

PROMPTS = ("a photo of the digit three", "a photo of the digit seven")
FLAGS = ["data", "--model_id", "tiny", "--num_inference_steps", 3, "--candidates", 2]
FLAGS += ["--reward", "thickness", "--reward", "digit:0.5", "--batch_size", 3]
FLAGS += ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from oneshot_fast.scale import main

    folder = tmp_path_factory.mktemp("data") / "run"
    assert main([*map(str, FLAGS), "--output_dir", str(folder)]) == 0
    return folder


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


def test_some_steps_and_no_pictures(made: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    folder = tmp_path / "run"
    flags = [*FLAGS, "--output_dir", folder, "--no_save_images", "--steps_saved", "0:1"]
    assert call("scale", *flags).code == 0
    pool, whole = (read_pool(place / "pool.safetensors") for place in (folder, made))
    assert pool.steps == (0, 2) and not (folder / "images").exists()
    np.testing.assert_array_equal(pool.base, whole.base[:, :, [0, 2]])
    for steps, said in (
        ("0-3", "write it as 0:15,19"),
        ("0:9", "there are 0 to 2"),
        ("2:0", "2:0, which is no step"),
    ):
        ended = call("scale", *FLAGS, "--output_dir", tmp_path / "no", "--steps_saved", steps)
        assert ended.code == 2 and said in ended.error
    assert call("scale", *FLAGS).error.endswith("give --output_dir DIR")


def test_a_damaged_picture_is_made_again(made: Path, call: Callable[..., Any]) -> None:
    picture = made / "images" / "p0001" / "id000" / "s01.png"
    before = picture.read_bytes()
    picture.write_bytes(before[:50])
    assert call("scale", *FLAGS, "--output_dir", made).code == 0
    assert picture.read_bytes() == before
