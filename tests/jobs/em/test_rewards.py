"""The main job by rewards: search, train on what was found, measure, and resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from samples import PROMPTS

from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.jobs.em.rewards import RewardEmRun

Call = Callable[..., Any]
FLAGS = (
    "--initial_model_id tiny --reward thickness --judge digit --images_per_prompt 4 "
    "--assign_method search --assign_candidates 4 --assign_batch_size 4 --num_cycles 2 "
    "--train_epochs 4 --train_batch_size 4 --train_lr 1e-4 --preserve_latent_weight 0 "
    "--preserve_pixel_weight 0 --eval_samples 12"
)


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "checkpoint-final/unet/diffusion_pytorch_model.safetensors")


def test_the_reward_rises_and_a_killed_run_ends_the_same(
    tmp_path: Path, prompts: Path, forks: Any
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*FLAGS.split(), "--prompt_file", prompts, "--work_dir"]
    assert forks.run("em", [*flags, whole], whole).code == 0
    killed = forks.run("em", [*flags, parts], parts, at="training/.tmp-manifest.jsonl")
    assert killed.code == -9
    ended = forks.run("em", [*flags, parts], parts)
    assert ended.code == 0, ended.err
    assert "search of cycle 2" in ended.out
    expected, found = weights(whole), weights(parts)
    assert all((expected[name] == found[name]).all() for name in expected)
    summary = json.loads((parts / "summary.json").read_text())
    noise = summary["random_noise"]
    assert noise["final"] == noise["cycle-02"]
    assert noise["final"]["reward"] > noise["base"]["reward"] + 0.3
    assert noise["final"]["drift"] > noise["base"]["drift"] == 0
    assert {"judge digit", "thickness", "diversity", "accuracy"} <= noise["base"].keys()
    first, second = (row["search"] for row in summary["cycles"])
    assert first["best_reward"] > first["initial_reward"] < second["initial_reward"]
    page = (parts / "report.html").read_text()
    assert "judge digit, which was not trained on" in page and "Images of cycle 2" in page
    assert (parts / "curves.png").is_file()


def test_the_e_steps_options_are_those_of_a_search() -> None:
    em = EmOptions(assign_method="search+sphere", em_schedule="5:1,3:2", noise_l2_weight=2.0)
    found = em.optimize(2)
    assert (found.mover, found.steps, found.draws) == ("sphere", 3, 32)
    assert found.max_angle == 0.6 and found.noise_l2_weight == 2.0
    found = EmOptions(assign_method="search", em_schedule="5:1").optimize()
    assert (found.method, found.draws, found.gradient_steps) == ("best_of_n", 5, 0)


def test_rewards_keep_the_preserve_losses_by_default(
    tmp_path: Path, prompts: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RewardEmRun, "plan", lambda run: repr(run.options))
    flags = ["--reward", "thickness", "--prompt_file", prompts, "--work_dir", tmp_path / "run"]
    said = call("em", *flags, "--initial_model_id", "tiny", "--dry_run").out
    assert "preserve_latent_weight=0.5, preserve_pixel_weight=0.05" in said
    assert "num_cycles=2" in said


def test_a_dry_run_shows_both_steps(tmp_path: Path, prompts: Path, call: Call) -> None:
    flags = [*FLAGS.split(), "--prompt_file", prompts, "--work_dir", tmp_path / "run"]
    ended = call("em", *flags, "--dry_run")
    assert ended.code == 0 and not (tmp_path / "run").exists()
    assert "activations of reward thickness" in ended.out and "for 8 pairs" in ended.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "thickness"], "--prompt_file"),
        (["--reward", "thickness", "--prompt_file", "p", "--data_root", "x"], "data_root"),
        (["--reward", "thickness", "--prompt_file", "p", "--max_samples", "3"], "no targets"),
        (["--reward", "thickness", "--prompt_file", "p", "--num_images", "3"], "num_images"),
        (["--reward", "thickness", "--prompt_file", "p", "--judge", "thickness"], "cannot judge"),
        (["--reward", "thickness", "--prompt_file", "p", "--warm_start"], "warm_start"),
        (["--reward", "thickness", "--prompt_file", "p", "--assign_method", "pool"], "pool"),
        (["--reward", "thickness", "--prompt_file", "absent"], "no such file"),
        (["--reward", "python:optimize_samples.darkness", "--prompt_file", "p"], "gradient"),
    ],
)
def test_bad_input(tmp_path: Path, call: Call, flags: list[str], message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS[0], encoding="utf-8")
    flags = [str(path) if flag == "p" else flag for flag in flags]
    ended = call("em", "--initial_model_id", "tiny", "--work_dir", tmp_path / "run", *flags)
    assert ended.code == 2 and message in ended.error
    assert not (tmp_path / "run").exists()
