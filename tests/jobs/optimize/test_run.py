"""Noise optimisation by rewards: what the methods find, and what a run keeps."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.jobs.optimize import markdown, measure
from oneshot_fast.data.images import load_image
from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.jobs.optimize.plan import search_memory
from oneshot_fast.jobs.optimize.run import OptimizeRun
from oneshot_fast.jobs.optimize.search import Optimized, RewardSearch
from oneshot_fast.rewards import load_rewards
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.search.samples import Sample, samples_of

Call = Callable[..., Any]
DIGITS = ("three", "seven", "zero")
PROMPTS = [f"a photo of the digit {digit}" for digit in DIGITS]
SAMPLES = [Sample(str(k), k, prompt, 20 + k) for k, prompt in enumerate(PROMPTS)]
FLAGS = "--model_id tiny --reward digit --reward thickness:0.1 --steps 3 --batch_size 2"


def solve(tiny: Generator, *rewards: str, **options: Any) -> list[Optimized]:
    search = RewardSearch(tiny, load_rewards(rewards), OptimizeOptions(**options), save_steps=[2])
    return search.solve(SAMPLES)


def images_of(tiny: Generator, z: Tensor, prompts: list[str]) -> Tensor:
    with torch.no_grad():
        return tiny.decode(tiny.latents(z, tiny.encode_prompts(prompts)))


@pytest.mark.parametrize("method", ["sphere", "rotation", "white", "free"])
def test_gradients_raise_the_reward(tiny: Generator, method: Any) -> None:
    found = solve(tiny, "digit", method=method, steps=12)
    before = sum(one.initial["total"] for one in found) / 3
    after = sum(one.best["total"] for one in found) / 3
    assert before < -0.5 and after > 0.5 * before
    for one in found:
        eps = gaussian([one.seed], one.last.z.shape)[0]
        assert one.seed == one.sample.seed and len(one.last.losses) == 13
        energy = (one.last.z.square().sum() / eps.square().sum()).item()
        assert energy == pytest.approx(1, rel=0.5 if method == "free" else 1e-4)
        assert one.last.losses[one.last.best_step] == min(one.last.losses) and 5 < one.angle < 150
        if method == "rotation":
            assert one.last.q is not None and one.last.q.shape == (16, 16)


def test_what_is_reported_is_what_the_noise_makes(tiny: Generator) -> None:
    rewards = load_rewards(["digit", "thickness:0.1"])
    found = solve(tiny, "digit", "thickness:0.1", steps=4)
    z = torch.stack([one.last.z for one in found])
    images = images_of(tiny, z, PROMPTS)
    scores = rewards.scores(images, PROMPTS)
    for k, one in enumerate(found):
        for name in ("digit", "thickness"):
            assert one.best[name] == pytest.approx(scores[name][k].item(), rel=1e-3, abs=1e-4)
        assert one.best["total"] == pytest.approx(one.best["digit"] + 0.1 * one.best["thickness"])
        assert one.last.losses == pytest.approx([-value for value in one.last.scores["total"]])
        assert set(one.images) == {"initial", "best", "step-002"}
        difference = one.images["best"].float() - 255 * images[k]
        assert difference.abs().max() < 1.01
        first = images_of(tiny, gaussian([one.seed], one.last.z.shape), [PROMPTS[k]])[0]
        assert (one.images["initial"].float() - 255 * first).abs().max() < 1.01


def test_a_result_does_not_depend_on_its_batch(tiny: Generator) -> None:
    together = solve(tiny, "digit", steps=3, lr=0.1)
    search = RewardSearch(tiny, load_rewards(["digit"]), OptimizeOptions(steps=3, lr=0.1))
    for one, sample in zip(together, SAMPLES, strict=True):
        alone = search.solve([sample])[0]
        assert alone.last.losses == pytest.approx(one.last.losses, rel=1e-3)
        torch.testing.assert_close(alone.last.z, one.last.z, rtol=0, atol=1e-3)


def test_best_of_n_is_the_best_and_needs_no_gradient(tiny: Generator) -> None:
    name = "python:optimize_samples.darkness"
    with pytest.raises(ValueError, match="best_of_n"):
        solve(tiny, name, method="sphere")
    found = solve(tiny, name, method="best_of_n", candidates=6)
    for k, one in enumerate(found):
        assert len(one.last.losses) == 6 and one.best["total"] == max(one.last.scores["total"])
        assert one.initial["total"] == one.last.scores["total"][0] and one.angle == 0
        torch.testing.assert_close(one.last.z, gaussian([one.seed], one.last.z.shape)[0])
        image = images_of(tiny, one.last.z[None], [PROMPTS[k]])
        score = -(image * 255).round().mean().item()
        assert one.best["total"] == pytest.approx(score, abs=0.02)
    assert any(one.last.best_step > 0 for one in found)


def test_gradients_start_at_the_best_candidate(tiny: Generator) -> None:
    chosen = solve(tiny, "digit", method="best_of_n", candidates=4)
    found = solve(tiny, "digit", candidates=4, steps=2)
    for one, best in zip(found, chosen, strict=True):
        assert one.seed == best.seed and one.initial == pytest.approx(best.initial)
        assert one.last.scores["digit"][0] == pytest.approx(best.best["digit"], abs=1e-4)


def test_drift_and_norm_are_held_back_by_their_weights(tiny: Generator) -> None:
    wild = solve(tiny, "thickness", method="free", steps=10, prior_weight=0.0)
    held = solve(tiny, "thickness", method="free", steps=10, prior_weight=1.0)
    near = solve(tiny, "thickness", method="free", steps=10, noise_l2_weight=100.0)

    def departure(found: list[Optimized]) -> float:
        return sum(abs(one.last.z.square().mean().item() - 1) for one in found)

    assert departure(held) < 0.5 * departure(wild)
    assert sum(one.angle for one in near) < 0.7 * sum(one.angle for one in wild)
    limited = solve(tiny, "digit", steps=6, max_angle=0.3)
    assert all(one.angle < math.degrees(0.3) + 0.1 for one in limited)


def test_memory_by_part(tiny: Generator) -> None:
    options = OptimizeOptions(steps=2)
    sizes = {}
    for checkpointing in (False, True):
        rewards = load_rewards(["digit", "thickness"], checkpointing=checkpointing)
        search = RewardSearch(tiny, rewards, options)
        sizes[checkpointing] = search_memory(search, SAMPLES[0], 4)
    plain, saving = sizes[False], sizes[True]
    assert plain.weights["unet"] == sum(p.nbytes for p in tiny.denoiser.parameters())
    parts = {"unet", "decoder", "reward digit", "reward thickness"}
    assert {f"activations of {part}" for part in parts} == plain.held.keys()
    part = "activations of reward digit"
    assert saving.held[part] < 0.1 * plain.held[part]
    assert plain.step >= sum(plain.held.values())
    assert plain.peak > sum(plain.weights.values()) + plain.step


def command(folder: Path, *more: object) -> list[object]:
    prompts = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    return [*FLAGS.split(), *prompts, "--output_dir", folder, *more]


def test_a_run_has_its_files(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "my run"
    more = ("--num_images_per_prompt", 2, "--save_steps", 1, "--num_images", 4)
    ended = call("optimize", *command(folder, *more))
    assert ended.code == 0, ended.err
    assert str(folder / "training" / "manifest.jsonl") in shlex.split(ended.out)  # to be pasted
    names = {path.name for path in folder.iterdir()} - {".lock"}
    assert names == {
        "curves.png", "diagnostics.json", "failures.jsonl", "files.jsonl", "history.jsonl",
        "images", "manifest.jsonl", "metrics_per_prompt.json", "metrics_summary.json", "noises",
        "pairs.jsonl", "report.html", "run.json", "training",
    }  # fmt: skip
    assert len(list((folder / "images").iterdir())) == 4 * 3
    per_prompt = json.loads((folder / "metrics_per_prompt.json").read_text())
    summary = json.loads((folder / "metrics_summary.json").read_text())
    assert [part["prompt"] for part in per_prompt] == PROMPTS
    images = [image for part in per_prompt for image in part["images"]]
    assert summary["samples"] == 6 and summary["prompts"] == 3 and summary["failed"] == 0
    for name in ("digit", "thickness", "total"):
        curve = summary["rewards"][name]["per_step"]
        assert len(curve) == 4
        last = [image["scores"][name][-1] for image in images]
        assert curve[-1] == pytest.approx(sum(last) / 6)
    assert summary["best_reward"] > summary["initial_reward"]
    best = max(per_prompt[0]["images"], key=lambda image: image["best"]["total"])
    assert per_prompt[0]["best_id"] == best["id"]
    page = (folder / "report.html").read_text()
    assert "still Gaussian" in page and page.count("<img") == 12
    # what comes out goes into the other commands
    assert len(read_pairs(folder)[0]) == 4
    assert read_manifest(folder / "manifest.jsonl")[1][0].reason.startswith("no such file")
    assert call("optimize", *command(folder, *more)).code == 0  # nothing left to do
    # a summary that was written on the way is not the last one
    path = folder / "metrics_summary.json"
    path.write_text(json.dumps({**summary, "training_pairs": None}))
    assert call("optimize", *command(folder, *more)).code == 0
    assert json.loads(path.read_text())["training_pairs"] == 4


def test_explicit_seeds_are_torchs(tmp_path: Path, call: Call) -> None:
    flags = command(tmp_path / "run", "--seeds", 5, 6, "--method", "best_of_n", "--candidates", 1)
    assert call("optimize", *flags).code == 0
    rows = [json.loads(line) for line in (tmp_path / "run/manifest.jsonl").open()]
    assert [row["seed"] for row in rows] == [5, 6] * 3
    z = load_file(tmp_path / "run" / rows[1]["noise_path"])["z"][rows[1]["noise_index"]]
    assert torch.equal(z, torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(6)))


def test_a_killed_run_goes_on(forks: Any, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert forks.run("optimize", command(whole), whole).code == 0
    for at in ("00000002.safetensors", "metrics_summary.json"):
        assert forks.run("optimize", command(killed), killed, at=at).code < 0
    ended = forks.run("optimize", command(killed), killed)
    assert ended.code == 0, ended.err
    for name in ("manifest.jsonl", "metrics_per_prompt.json", "pairs.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    for path in (whole / "noises").iterdir():
        expected, found = load_file(path), load_file(killed / "noises" / path.name)
        assert torch.equal(found["z"], expected["z"])
    assert not list(killed.rglob(".tmp-*"))


def test_rewards_that_are_not_finite_fail_alone(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "run"
    prompts = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    flags = ["--model_id", "tiny", "--reward", "python:optimize_samples.not_finite", "--steps", 2]
    ended = call("optimize", *flags, *prompts, "--output_dir", folder)
    assert ended.code == 1
    failures = [json.loads(line) for line in (folder / "failures.jsonl").open()]
    assert [failure["prompt"] for failure in failures] == [PROMPTS[1]]
    assert json.loads((folder / "metrics_summary.json").read_text())["samples"] == 2


def test_dry_run_writes_nothing(tmp_path: Path, call: Call) -> None:
    ended = call("optimize", *command(tmp_path / "run"), "--dry_run")
    assert ended.code == 0 and "activations of reward digit" in ended.out
    assert not (tmp_path / "run").exists()


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two \n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == read_prompts(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n{"title": "two"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: no field prompt, text, caption"):
        read_prompts(tmp_path / "b.jsonl")


def test_samples_have_seeds_of_their_own() -> None:
    samples = samples_of(["a", "a", "b"], 2, seed=0)
    assert len({sample.seed for sample in samples}) == len({s.id for s in samples}) == 6
    assert samples == samples_of(["a", "a", "b"], 2, seed=0)
    assert samples[0].seed != samples_of(["a"], 1, seed=1)[0].seed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "nothing"], "no reward 'nothing'"),
        (["--reward", "digit", "--save_steps", "9", "--steps", "3"], "save_steps"),
        (["--reward", "digit", "--steps", "0"], "steps"),
        (["--reward", "digit", "--prompt_file", "absent.txt"], "no such file"),
        (["--reward", "digit", "--prior_weight", "1"], "sphere keeps the norm"),
        (["--reward", "digit", "--method", "pool"], "a pool needs targets"),
        (["--reward", "digit", "--method", "rotation", "--patch_size", "3"], "patch_size"),
        (["--reward", "clip", "--models_dir", "absent"], "oneshot_fast.download"),
        ([], "--reward"),
    ],
)
def test_bad_input(tmp_path: Path, call: Call, flags: list[str], message: str) -> None:
    prompt = ("--prompt", PROMPTS[0], "--model_id", "tiny", "--output_dir", tmp_path / "run")
    ended = call("optimize", *prompt, *flags)
    assert ended.code == 2 and message in ended.error
    assert not (tmp_path / "run").exists()


def test_images_are_saved_as_they_were_scored(tiny: Generator, tmp_path: Path) -> None:
    options, rewards = OptimizeOptions(steps=2), load_rewards(["digit"])
    run = OptimizeRun(tiny, PROMPTS, tmp_path / "run", options, rewards=rewards)
    run.run()
    image = load_image(tmp_path / "run/images/00000-00-best.png", 64, 64)
    expected = run.search.solve(run.samples)[0].images["best"].float() / 255
    assert torch.equal(image, expected)
    with Image.open(tmp_path / "run/images/00000-00-best.png") as picture:
        assert picture.size == (64, 64)


def test_the_usual_script_finds_the_same() -> None:
    """The benchmark's script, in plain torch and diffusers, takes the steps of our ``free``."""
    found = measure(prompts=2, steps=3, batch_size=2, rounds=1)
    rewards = {name: row["best_reward"] for name, row in found.items()}
    assert rewards["ours, free"] == pytest.approx(rewards["usual script"], rel=0.01)
    settings = {"threads": 1, "prompts": 2, "steps": 3, "batch_size": 2, "rounds": 1}
    about = dict.fromkeys(("device", "torch", "commit", "date"), "x")
    assert "| usual script |" in markdown({**about, "settings": settings, "results": found})


def test_searches_that_stop_early_have_curves_of_one_length(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "run"
    ended = call("optimize", *command(folder, "--stop_loss", 0.3, "--steps", 6))
    assert ended.code == 0, ended.err
    per_prompt = json.loads((folder / "metrics_per_prompt.json").read_text())
    lengths = {len(image["losses"]) for part in per_prompt for image in part["images"]}
    assert len(lengths) > 1
    summary = json.loads((folder / "metrics_summary.json").read_text())
    assert len(summary["rewards"]["total"]["per_step"]) == max(lengths)
