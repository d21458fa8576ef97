"""The main job end to end on the embedded default, small: tables, files, summary, resume."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oneshot_fast.generators.loading import load_generator

Call = Callable[..., Any]
NUMBER = r"[+-]?\d+\.\d+"


def flags(folder: Path, *more: object) -> list[object]:
    fixed = (
        "--max_samples 6 --assign_steps 2 --train_epochs 4 --train_lr 2e-5 --eval_samples 20 "
        "--preserve_latent_weight 0.5 --preserve_pixel_weight 0.05 --preserve_pool_size 8 "
        "--num_images 2 --compare_direct --train_selective_checkpointing --train_keep_checkpoints 2"
    )
    return ["--work_dir", folder, *fixed.split(), *more]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the embedded default."""
    from oneshot_fast.em import main

    folder = tmp_path_factory.mktemp("em") / "run"
    assert main([str(value) for value in flags(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def summary(aligned: Path) -> Any:
    return json.loads((aligned / "summary.json").read_text(encoding="utf-8"))


def test_all_stages_leave_their_files(aligned: Path) -> None:
    names = {path.name for path in aligned.iterdir()} - {".lock"}
    files = "failures.jsonl history.jsonl preserve.safetensors report.html run.json summary.json"
    folders = "files.jsonl cycle-01 cycle-02 data direct eval heldout-base heldout-final"
    assert names == {*files.split(), *folders.split(), "checkpoint-best", "checkpoint-final"}
    for name in ("base", "cycle-01", "cycle-02", "direct"):
        assert (aligned / "eval" / f"{name}.json").is_file()
        assert (aligned / "eval" / f"{name}.png").stat().st_size > 1000
    stages = [json.loads(s)["stage"] for s in (aligned / "history.jsonl").read_text().splitlines()]
    assert stages == [
        "eval/base", "heldout-base", "cycle-01/assign", "cycle-01/sft", "eval/cycle-01",
        "cycle-02/assign", "cycle-02/sft", "eval/cycle-02", "heldout-final", "direct",
        "eval/direct",
    ]  # fmt: skip
    assert "<html" in (aligned / "report.html").read_text(encoding="utf-8")
    for folder in ("cycle-01/sft", "cycle-02/sft", "direct"):  # 1 step per epoch; the newest two
        last = json.loads((aligned / folder / "summary.json").read_text())["steps"]
        kept = {path.name for path in (aligned / folder).glob("checkpoint-[0-9]*")}
        assert kept == {f"checkpoint-{last - 1}", f"checkpoint-{last}"}
    assert json.loads((aligned / "cycle-01/sft/run.json").read_text())["selective_checkpointing"]


def test_the_summary_has_the_documented_numbers(aligned: Path, summary: Any) -> None:
    noise = summary["random_noise"]
    assert noise.keys() == {"base", "cycle-01", "cycle-02", "final", "direct"}
    for measured in noise.values():
        assert measured["samples"] == 20
        assert 0 <= measured["accuracy"] <= 1 and measured["diversity"] > 0
        assert measured["frechet_distance"] > 0
    assert noise["base"]["drift"] == 0 < noise["cycle-01"]["drift"]
    assert noise["final"] == noise["cycle-02"] != noise["direct"]
    assert summary["real"]["diversity"] > 0 and 0 <= summary["real"]["accuracy"] <= 1
    assert [cycle["cycle"] for cycle in summary["cycles"]] == [1, 2]
    for cycle in summary["cycles"]:
        assert cycle["assign"]["best_loss"] < cycle["assign"]["initial_loss"]
        assert len(cycle["assign"]["losses"]) == 3
        assert cycle["sft"]["matched_loss_after"] < cycle["sft"]["matched_loss_before"]
        assert cycle["sft"]["matched_loss_before"] == pytest.approx(
            cycle["assign"]["best_loss"], rel=1e-4
        )
    heldout = summary["heldout"]
    assert heldout["samples"] == 48 and heldout["final"]["best_loss"] < heldout["base"]["best_loss"]
    said = [summary["verdicts"][f"cycle-0{k}"]["energy_score"] for k in (1, 2)]
    assert [row["after"] for row in said] == [noise[f"cycle-0{k}"]["energy_score"] for k in (1, 2)]
    assert {row["before"] for row in said} == {noise["base"]["energy_score"]}
    assert summary["best_cycle"] == 1 + (said[1]["after"] < said[0]["after"])
    by = summary["measured_by"]
    assert (by["features"], by["real"]) == ("the classifier of these prompts", 48)
    assert summary["failed"] == 0 and summary["settings"]["assign_steps"] == 2


def test_each_part_goes_on_from_the_one_before(aligned: Path, summary: Any) -> None:
    models = {
        name: json.loads((aligned / name / "run.json").read_text())["model"]
        for name in (
            "cycle-01/assign", "cycle-01/sft", "cycle-02/assign", "heldout-base", "heldout-final",
            "direct",
        )
    }  # fmt: skip
    base = load_generator("tiny").fingerprint()
    first = load_generator(aligned / "cycle-01/sft/checkpoint-final").fingerprint()
    final = load_generator(aligned / "checkpoint-final").fingerprint()
    assert len({base, first, final}) == 3
    assert models == {
        "cycle-01/assign": base, "cycle-01/sft": base, "cycle-02/assign": first,
        "heldout-base": base, "heldout-final": final, "direct": base,
    }  # fmt: skip
    best = load_generator(aligned / "checkpoint-best").fingerprint()
    cycle = aligned / f"cycle-0{summary['best_cycle']}/sft/checkpoint-final"
    assert best == load_generator(cycle).fingerprint()
    # Cycles start from fresh base noises; both assignments of the held-out pairs from the same.
    starts = {
        name: [json.loads(s)["seed"] for s in (aligned / name / "manifest.jsonl").open()]
        for name in ("cycle-01/assign", "cycle-02/assign", "heldout-base", "heldout-final")
    }
    assert not set(starts["cycle-01/assign"]) & set(starts["cycle-02/assign"])
    assert starts["heldout-base"] == starts["heldout-final"]


def test_repeating_the_command_prints_the_tables_and_trains_nothing(
    aligned: Path, summary: Any, call: Call
) -> None:
    kept = {path: path.stat().st_mtime_ns for path in aligned.rglob("*.safetensors")}
    started = time.process_time()
    ended = call("em", *flags(aligned))
    seconds = time.process_time() - started
    assert ended.code == 0 and seconds < 20
    assert kept == {path: path.stat().st_mtime_ns for path in aligned.rglob("*.safetensors")}
    again = json.loads((aligned / "summary.json").read_text())
    assert again == summary
    for label in ("prompt accuracy", "Frechet distance", "diversity", "drift from base"):
        assert re.search(rf"^{label} +({NUMBER} +){{3}}({NUMBER}|-)$", ended.out, re.MULTILINE)
    assert re.search(r"base +final +direct +real images", ended.out)
    for k in (1, 2):
        row = rf"^cycle {k} +{NUMBER} -> {NUMBER} -> {NUMBER}$"
        assert re.search(row, ended.out, re.MULTILINE)
    assert re.search(
        rf"48 held-out pairs, assigned: {NUMBER} .*{NUMBER} .*\([+-]\d+ %\)", ended.out
    )
    assert "checkpoint-final" in ended.out and "report.html" in ended.out


def test_checkpoints_can_be_moved_and_are_named_where_they_cannot_be_made(
    aligned: Path, summary: Any, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["cp", "-R", "-P", aligned / "checkpoint-final", tmp_path], check=True)
    both = (load_generator(at / "checkpoint-final").fingerprint() for at in (aligned, tmp_path))
    assert len({*both}) == 1

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "not here")

    run = shutil.copytree(aligned, tmp_path / "run")
    for name in ("checkpoint-best", "checkpoint-final"):
        shutil.rmtree(run / name)
    (run / "checkpoint-final").symlink_to("cycle-02/sft/checkpoint-final")  # as it once was
    for name in ("summary.json", "report.html"):
        (run / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", refuse)
        ended = call("em", *flags(run))
    assert ended.code == 0 and ended.err.count("warning: no ") == 2
    assert f"use {run / 'cycle-02' / 'sft' / 'checkpoint-final'}" in ended.err
    assert json.loads((run / "summary.json").read_text()) == summary
    assert (run / "report.html").is_file()


def test_own_data_without_digits_and_heldout_pairs(
    small_model: Path, data: Path, tmp_path: Path, call: Call
) -> None:
    lines = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    lines[0]["prompt"] = "a \u2028 photo"  # no digit, so there is no classifier to measure with
    lines[1]["image"] = "none.png"
    (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ended = call(
        "em", "--work_dir", tmp_path / "em", "--data_root", data, "--initial_model_id", small_model,
        "--num_cycles", 1, "--assign_steps", 1, "--train_epochs", 1, "--eval_samples", 10,
        "--preserve_latent_weight", 0, "--preserve_pixel_weight", 0, "--num_images", 0,
    )  # fmt: skip
    assert ended.code == 1 and "1 records failed" in ended.err
    summary = json.loads((tmp_path / "em" / "summary.json").read_text())
    assert summary["random_noise"]["final"].keys() == {"samples", "diversity", "drift"}
    assert "6 pairs are too few to hold some out" in ended.err and summary["verdicts"] == {}
    assert "Whether the final generator is better than the base was not measured" in ended.out
    assert "heldout" not in summary and "real" not in summary and summary["best_cycle"] == 1
    assert not list((tmp_path / "em").glob("heldout*"))
    (failure,) = [json.loads(line) for line in (tmp_path / "em" / "failures.jsonl").open()]
    assert (failure["line"], failure["image"]) == (2, "none.png")


def test_a_share_of_the_embedded_data_is_held_out_where_one_is_given(
    tmp_path: Path, call: Call
) -> None:
    short = "--max_samples 10 --num_cycles 1 --assign_steps 1 --train_epochs 1 --num_images 0"
    more = ["--eval_samples", 10, "--heldout", 0.2]
    ended = call("em", "--work_dir", tmp_path / "em", *short.split(), *more)
    assert ended.code == 0 and "2 of 10 pairs are held out, to measure by" in ended.err, ended.err


def test_held_out_prompts_that_no_classifier_knows_are_measured_without_one(
    small_model: Path, data: Path, small_data: Path, tmp_path: Path, call: Call
) -> None:
    lines = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    lines = [{**line, "prompt": "a photo"} for line in lines]
    (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    short = "--num_cycles 1 --assign_steps 1 --train_epochs 1 --num_images 0 --eval_samples 10"
    ended = call(
        "em", "--work_dir", tmp_path / "em", "--data_root", small_data, "--heldout_root", data,
        "--initial_model_id", small_model, *short.split(),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    summary = json.loads((tmp_path / "em" / "summary.json").read_text())
    assert "accuracy" not in summary["random_noise"]["base"]


def test_own_data_is_split_and_measured_by_judges_and_features_without_a_classifier(
    small_model: Path, data: Path, tmp_path: Path, call: Call
) -> None:
    lines = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    lines = [{**lines[k % 6], "prompt": f"{'abc'[k % 3]} photo"} for k in range(64)]
    (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    fixed = (
        "--num_cycles 1 --assign_steps 1 --train_epochs 1 --num_images 0 "
        "--eval_samples 10 --preserve_latent_weight 0 --preserve_pixel_weight 0 --train_lr 1e-12"
    )
    more = ["--judge", "thickness", "--features", "python:feature_samples.rows"]
    flags = ["--initial_model_id", small_model, "--data_root", data, *fixed.split(), *more]
    ended = call("em", "--work_dir", tmp_path / "em", *flags)
    assert ended.code == 0 and "16 of 64 pairs are held out, to measure by" in ended.err, ended.err
    summary = json.loads((tmp_path / "em" / "summary.json").read_text())
    by, settings = summary["measured_by"], summary["settings"]
    assert (by["features"], by["real"]) == ("python:feature_samples.rows", 16)
    assert settings["samples"] == 48 and settings["features"] == by["features"]
    assert {"energy_score", "judge thickness"} <= summary["verdicts"]["cycle-01"].keys()
    assert "judge thickness" in summary["random_noise"]["base"]
    rows = (tmp_path / "em/cycle-01/assign/manifest.jsonl").read_text().splitlines()
    held = (tmp_path / "em/heldout-base/manifest.jsonl").read_text().splitlines()
    ids = [{json.loads(row)["id"] for row in part} for part in (rows, held)]
    assert (len(ids[0]), len(ids[1]), len(ids[0] | ids[1])) == (48, 16, 64)
    refused = call("em", "--work_dir", tmp_path / "em", *flags, "--heldout", 0)
    assert refused.code == 2 and "other settings" in refused.err  # all 64 are trained on
    both = call("em", "--work_dir", tmp_path, *flags, "--heldout", 0.2, "--heldout_root", data)
    assert both.code == 2 and "--heldout and --heldout_root exclude each other" in both.err


def test_direct_training_starts_from_the_base_and_sees_other_noises(aligned: Path) -> None:
    weights = {
        name: load_file(aligned / name / "unet/diffusion_pytorch_model.safetensors")
        for name in ("direct/checkpoint-final", "checkpoint-final")
    }
    direct, final = weights.values()
    assert not any(torch.equal(direct[key], final[key]) for key in direct if "conv_in" in key)
    settings = json.loads((aligned / "direct" / "run.json").read_text())
    assert (settings["noise"], settings["epochs"]) == ("random", 8)


def test_the_dry_run_of_em_writes_nothing(
    small_model: Path, small_data: Path, tmp_path: Path, call: Call
) -> None:
    flags = ["--initial_model_id", small_model, "--data_root", small_data, "--dry_run"]
    flags += ["--work_dir", tmp_path / "run", "--num_cycles", 2, "--assign_steps", 2]
    ended = call("em", *flags, "--train_lora_rank", 4, "--train_optimizer_in_backward")
    assert ended.code == 0 and not (tmp_path / "run").exists(), ended.err
    assert ended.out.count("peak of a step of ") == 2
    assert re.search(r"in all, 2 cycles: [\d.]+ (ms|s|min), without the evaluations", ended.out)
