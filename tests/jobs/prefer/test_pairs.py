"""Training on given pairs: what is read, what fails alone, that the better image is preferred."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from shard_samples import parquet, png

from oneshot_fast.data.images import load_image
from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.preferences import noise_of, noises_by_image, read_preferences
from oneshot_fast.errors import DataError, UserError
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.levels import Levels
from oneshot_fast.jobs.prefer.options import PreferOptions
from oneshot_fast.jobs.prefer.pairs import PairRun
from oneshot_fast.rewards import load_rewards
from oneshot_fast.training.losses.preference import NoisedPairs

PROMPT = "a handwritten digit three"
FLAGS = (
    "--model_id tiny --judge thickness --objective dpo --eval_samples 10 --batch_size 3 --epochs 2 "
    "--lr 1e-4"
)


@pytest.fixture
def pairs(data: Path) -> Path:
    """Three pairs, and lines that cannot be used; a manifest with the noise of each image."""
    images = sorted((data / "images").iterdir())
    names = [f"images/{image.name}" for image in images]
    (data / "broken.png").write_bytes(b"no image")
    rows: list[Any] = [
        {"prompt": PROMPT, "image": names[k], "rejected": names[k + 3]} for k in range(3)
    ]
    rows[1]["weight"] = 2.0
    rows += [
        {"prompt": PROMPT, "image": names[0]},
        {"prompt": PROMPT, "image": names[0], "rejected": names[0]},
        {"prompt": PROMPT, "image": names[0], "rejected": names[1], "weight": -1},
        {"prompt": PROMPT, "image": names[0], "rejected": "absent.png"},
        {"prompt": PROMPT, "image": names[0], "rejected": "broken.png"},
        {"prompt": "another prompt", "image": names[0], "rejected": names[1]},
    ]
    path = data / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_file({"z": torch.randn(7, 4, 8, 8)}, data / "z.safetensors")
    lines = [
        {"prompt": PROMPT, "target_image_path": name, "noise_path": "z.safetensors"}
        | {"noise_index": k}
        for k, name in enumerate([*names, "broken.png"])
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (data / "manifest.jsonl").write_text(text, encoding="utf-8")
    return path


def test_pairs_are_read_and_bad_lines_fail_alone(pairs: Path) -> None:
    found, failures = read_preferences(pairs)
    assert [pair.line for pair in found] == [1, 2, 3, 8, 9] and found[1].weight == 2
    assert len({pair.id for pair in found}) == 5
    said = {failure.line: failure.reason for failure in failures}
    assert said[4] == "missing field 'rejected'" and "the same file" in said[5]
    assert said[6] == "'weight' is -1: give a finite number, 0 or more"
    assert said[7].startswith("no such file: absent.png")
    with pytest.raises(DataError, match="no such file of pairs"):
        read_preferences(pairs.parent / "absent.jsonl")


def test_pairs_of_pick_a_pic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels: list[Any] = [(1, 0), (0.5, 0.5), (0, 1), (1, 1), (None, None), (1.0, 0.0)]
    rows = [
        {"caption": f"grey {k}", "jpg_0": png(k), "jpg_1": png(100 + k), "label_0": a, "label_1": b}
        for k, (a, b) in enumerate(labels)
    ]
    rows[5]["caption"] = None
    path = tmp_path / "part.parquet"
    path.write_bytes(parquet(rows, group=2))
    found, failures = read_preferences(path)
    assert "left out as ties: 1" in capsys.readouterr().err
    assert [(pair.line, pair.prompt) for pair in found] == [(1, "grey 0"), (3, "grey 2")]
    shades = [
        load_image(x, 4, 4).mean() * 255 for pair in found for x in (pair.image, pair.rejected)
    ]
    assert [round(float(x)) for x in shades] == [0, 100, 102, 2]  # the second row of labels swaps
    said = {failure.line: failure.reason for failure in failures}
    assert said[4].startswith("'label_0' and 'label_1' are 1.0 and 1.0: give 1 and 0")
    assert "are None and None" in said[5] and said[6] == "'caption' must be a string, not null"
    # what assign --image_field jpg_1 writes
    save_file({"z": torch.zeros(1, 4, 8, 8)}, tmp_path / "z.safetensors")
    line = {"prompt": "grey 2", "target_image_path": "part.parquet#jpg_1:1:0"}
    line |= {"noise_path": "z.safetensors", "noise_index": 0}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line))
    noises = noises_by_image(read_manifest(tmp_path / "manifest.jsonl")[0])
    assert noise_of(noises, found[1].image, "grey 2").noise_index == 0
    for bad, message in (
        (parquet([row | {"label_0": 0.5, "label_1": 0.5} for row in rows[:2]]), "or ties alone"),
        (parquet([{"caption": "a", "jpg_0": b""}]), "it lacks label_0, label_1, jpg_1"),
        (path.read_bytes()[:-20], "cannot be read"),
    ):
        (tmp_path / "bad.parquet").write_bytes(bad)
        with pytest.raises(DataError, match=message):
            read_preferences(tmp_path / "bad.parquet")


def test_the_better_image_is_preferred(pairs: Path, call: Callable[..., Any]) -> None:
    folder = pairs.parent / "run"
    flags = [*FLAGS.split(), "--pairs", pairs, "--output_dir", folder]
    flags += ["--manifest_path", pairs.parent / "manifest.jsonl"]
    ended = call("prefer", *flags)
    assert ended.code == 1 and "6 pairs failed" in ended.err
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    assert last["preference"] < first["preference"] and last["preferred"] == 1
    assert last["loser"] - last["winner"] > first["loser"] - first["winner"]
    assert first["moved"] == 0 and first["preferred"] == 0  # the first step begins at the base
    reasons = [json.loads(x) for x in (folder / "failures.jsonl").read_text().splitlines()]
    said = {row["line"]: row["reason"] for row in reasons}
    assert "broken.png" in said[8] and "no manifest has a noise" in said[9]
    assert (folder / "report.html").exists() and (folder / "curves.png").exists()
    # a finished one says the same again, and is trained anew where an image is mended
    assert "trained anew" not in call("prefer", *flags).err
    (pairs.parent / "broken.png").write_bytes(
        next((pairs.parent / "images").iterdir()).read_bytes()
    )
    ended = call("prefer", *flags)
    assert "trained anew" in ended.err and "5 pairs failed" in ended.err


def test_a_killed_training_goes_on_with_its_pairs(pairs: Path, forks: Any) -> None:
    home = pairs.parent
    flags = [*FLAGS.split(), "--epochs", "2", "--save_minutes", 0, "--pairs", pairs]
    flags += ["--manifest_path", home / "manifest.jsonl", "--output_dir"]
    whole, parts = home / "whole", home / "parts"
    assert forks.run("prefer", [*flags, whole], whole).code == 1
    assert forks.run("prefer", [*flags, parts], parts, at="epoch-002.json").code == -9
    image = home / json.loads(pairs.read_text().splitlines()[0])["image"]
    before = image.read_bytes()
    image.write_bytes((home / json.loads(pairs.read_text().splitlines()[1])["image"]).read_bytes())
    changed = forks.run("prefer", [*flags, parts], parts)
    assert changed.code == 2 and "files of theirs changed" in changed.err, changed.err
    image.write_bytes(before)
    assert forks.run("prefer", [*flags, parts], parts).code == 1
    rows = [(folder / "history.jsonl").read_text() for folder in (whole, parts)]
    assert rows[0] == rows[1]


def test_flags_that_have_no_effect_are_refused(pairs: Path, call: Callable[..., Any]) -> None:
    for more, said in (
        ({"objective": "drpo"}, "--objective drpo draws its own images; with --pairs give dpo"),
        ({"objective": "dpo", "group": 8}, "--group has no effect with --pairs"),
        ({"objective": "pso", "action_std": 0.1}, "--action_std has no effect with --pairs"),
        ({"objective": "dpo", "loser_weight": -1.0}, "loser_weight is -1.0"),
    ):
        with pytest.raises(UserError, match=said):
            PreferOptions(**more).check_pairs()
    with pytest.raises(UserError, match="--loser_weight has no effect without --pairs"):
        PreferOptions(loser_weight=0.5).check_drawn()
    flags = [*FLAGS.split(), "--pairs", pairs, "--output_dir", pairs.parent / "run"]
    for flag, said in (
        (["--reward", "digit"], "--reward is of images that are drawn"),
        (["--manifest_path", pairs, "--pair_noise", "random"], "no effect on --pair_noise random"),
        ([], "give --manifest_path of assign"),
        (["--pair_space", "x0"], "--pair_space has no effect on one step"),
        (
            ["--num_inference_steps", 2, "--backprop_steps", 1],
            "--backprop_steps has no effect without preserve losses",
        ),
    ):
        ended = call("prefer", *flags, *flag)
        assert ended.code == 2 and said in ended.err
    (pairs.parent / "run.json").write_text('{"num_inference_steps": 4}')
    ended = call("prefer", *flags, "--manifest_path", pairs.parent / "manifest.jsonl")
    assert ended.code == 2 and "found with num_inference_steps 4, not 1" in ended.err
    assert "or --pair_noise random" in ended.err
    ended = call("prefer", *flags, "--pair_noise", "random", "--dry_run")
    assert ended.code == 0 and "peak of a step of 3 pairs" in ended.out, ended.err


def test_one_of_several_steps_is_compared_by_its_noise(pairs: Path, tiny: Any) -> None:
    few = FewStepGenerator.over(tiny, 2)
    found = read_preferences(pairs)[0][:3]
    runs = {
        space: PairRun(few, found, pairs.parent / "few", PreferOptions(
            objective="dpo", pair_noise="random", pair_space=space
        ), judge=load_rewards(["thickness"]))
        for space in ("eps", "x0")
    }  # fmt: skip
    of = {space: {} for space in runs}  # batches by step
    for space, run in runs.items():
        read = run._read(found)
        run._found = [(pair, *x) for pair, x in zip(found, read, strict=True)]  # type: ignore[misc]
        for step in range(8):
            rows = run.batch([0, 1, 2], step)["preference"]
            of[space][rows.extra["step"][0]] = rows
        assert of[space].keys() == {0, 1}
        first = of[space][0]  # noise alone, and clean latents
        assert torch.equal(first.extra["noised"], first.noise) and first.noise.shape[1] == 1
        assert first.extra["root"].tolist() == [1, 1, 1]
    levels = Levels(few, few.noise_shape(64, 64))
    signal, scale = (part[:, None] for part in levels.of_step(1, 3, torch.zeros(1)))
    rows, clean = of["eps"][1], of["x0"][1]
    assert torch.equal(rows.extra["noised"], clean.extra["noised"])
    noise = (clean.extra["noised"] - signal * clean.extra["targets"]) / scale
    torch.testing.assert_close(noise[:, 0], noise[:, 1])  # one for both images of a pair
    assert 0.5 < noise.std() < 1.5
    with torch.no_grad():
        policy, x0 = NoisedPairs()(few, rows)
        at_clean, same = NoisedPairs()(few, clean)
    assert torch.equal(x0, same) and torch.equal(at_clean, x0)
    told = (clean.extra["noised"] - signal * x0) / scale
    wrong = (told - noise).square().flatten(2).mean(2)
    given = (policy - rows.extra["targets"]).square().flatten(2).mean(2)
    torch.testing.assert_close(given, wrong, rtol=1e-4, atol=1e-6)


def test_pairs_train_several_steps(pairs: Path, call: Callable[..., Any]) -> None:
    folder = pairs.parent / "few"
    flags = [*FLAGS.split(), "--pairs", pairs, "--pair_noise", "random", "--epochs", 1]
    flags += ["--num_inference_steps", 2]
    planned = call("prefer", *flags, "--dry_run")
    assert planned.code == 0 and "peak of a step of 3 pairs" in planned.out, planned.err
    ended = call("prefer", *flags, "--output_dir", folder)
    assert ended.code == 1 and "pairs failed" in ended.err
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["moved"] > 0  # from the base, by its last step
