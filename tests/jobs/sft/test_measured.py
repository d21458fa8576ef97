"""sft --eval_every: measured on held-out pairs as it goes; the best is the best there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from html_pages import page

from oneshot_fast.generators.loading import load_generator

Call = Callable[..., Any]
Flags = Callable[..., list[object]]


@pytest.fixture
def flags(small_model: Path, small_assigned: Path) -> Flags:
    """Of a training on the shared assignment into a folder."""
    fixed = (
        "--epochs 3 --batch_size 2 --preserve_latent_weight 0 "
        "--preserve_pixel_weight 0 --eval_every 2 --eval_samples 20 --heldout 0.34 --save_minutes 0"
    )
    given = ["--model_id", small_model, "--manifest_path", small_assigned / "manifest.jsonl"]
    return lambda folder, *more: [*given, "--output_dir", folder, *fixed.split(), *more]


def test_an_epoch_that_is_better_is_the_best(flags: Flags, call: Call, tmp_path: Path) -> None:
    ended = call("sft", *flags(tmp_path / "run", "--lr", 1e-4, "--judge", "thickness"))
    assert ended.code == 0 and "2 of 6 pairs are held out, to measure by" in ended.err, ended.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [*summary["measured"]] == ["base", "epoch-002", "epoch-003"]
    assert summary["samples"] == 4 and summary["measured_by"]["real"] == 2
    assert "judge thickness" in summary["verdicts"]["epoch-003"]
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").open()]
    assert ["energy_score" in row for row in rows] == [False, True, True]
    assert rows[1]["energy_score"] == summary["measured"]["epoch-002"]["energy_score"]
    gains = [
        row["before"] - row["after"] > row["error"] and row["before"] - row["after"]
        for row in (summary["verdicts"][f"epoch-00{k}"]["energy_score"] for k in (2, 3))
    ]
    assert summary["best_epoch"] == (2 if gains[0] > gains[1] else 3 if gains[1] else 0)
    best = load_generator(tmp_path / "run/checkpoint-best").fingerprint()
    final = load_generator(tmp_path / "run/checkpoint-final").fingerprint()
    assert (best == final) == (summary["best_epoch"] == 3)
    html = page(tmp_path / "run")
    assert html.headings[:3] == [
        "Is it better?",
        "Quality on random noise",
        "Fit to the matched pairs",
    ]
    assert "The final generator" in ended.out and "energy score for 2 held-out images" in ended.out
    again = call("sft", *flags(tmp_path / "run", "--lr", 1e-4, "--judge", "thickness"))
    assert again.code == 0 and json.loads((tmp_path / "run/summary.json").read_text()) == summary


def test_where_nothing_beats_the_base_it_is_the_best(
    small_model: Path, flags: Flags, call: Call, tmp_path: Path
) -> None:
    ended = call("sft", *flags(tmp_path / "run", "--lr", 1e-30))
    assert ended.code == 0 and ended.out.startswith("Nothing beat the base"), ended.err
    best = load_generator(tmp_path / "run/checkpoint-best").fingerprint()
    assert best == load_generator(small_model).fingerprint()


def test_an_interrupted_training_ends_with_the_same_best(
    flags: Flags, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oneshot_fast.jobs.sft.measured import MeasuredSftRun

    assert call("sft", *flags(tmp_path / "whole", "--lr", 1e-4)).code == 0
    after_epoch = MeasuredSftRun.after_epoch

    def killed(self: MeasuredSftRun, epoch: int) -> dict[str, Any]:
        if epoch == 3:
            raise KeyboardInterrupt
        return after_epoch(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(MeasuredSftRun, "after_epoch", killed)
        assert call("sft", *flags(tmp_path / "run", "--lr", 1e-4)).code == 130
    assert (tmp_path / "run/state.safetensors").exists()
    assert call("sft", *flags(tmp_path / "run", "--lr", 1e-4)).code == 0
    whole, run = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "run"))
    for key in ("measured", "verdicts", "best_epoch"):
        assert run[key] == whole[key]
    models = [load_generator(tmp_path / n / "checkpoint-best") for n in ("whole", "run")]
    assert models[0].fingerprint() == models[1].fingerprint()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--heldout", 0], "eval_every needs held-out pairs"),
        (["--heldout_root", "DATA"], "--heldout and --heldout_root exclude each other"),
        (["--eval_samples", 9], "eval_samples must be at least 10"),
        (["--eval_every", 0], "--heldout has no effect without --eval_every"),
        (["--images_per_prompt", 3], "--images_per_prompt has no effect without --reward"),
    ],
)
def test_flags_that_make_no_sense(
    flags: Flags, data: Path, call: Call, tmp_path: Path, more: list[object], said: str
) -> None:
    more = [data if value == "DATA" else value for value in more]
    ended = call("sft", *flags(tmp_path / "run", *more))
    assert ended.code == 2 and said in ended.err and not (tmp_path / "run").exists()


def test_other_data_can_be_held_out(
    flags: Flags, small_data: Path, call: Call, tmp_path: Path
) -> None:
    held = shutil.copytree(small_data, tmp_path / "held")
    fixed = flags(tmp_path / "run", "--heldout_root", held)
    at = fixed.index("--heldout")
    ended = call("sft", *fixed[:at], *fixed[at + 2 :], "--features", "vae")
    assert ended.code == 0, ended.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["samples"] == 6 == summary["measured_by"]["real"]
    assert summary["measured_by"]["is_weak"] and "a weak judge" in ended.out
