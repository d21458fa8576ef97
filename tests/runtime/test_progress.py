"""Trackers: event files where asked for, one line where the package is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

COMMANDS = ("assign", "sft", "em")


def flags(command: str, data: Path, assigned: Path, folder: Path, tracker: str) -> list[object]:
    more = {
        "assign": f"--data_root {data} --output_root {folder} --model_id tiny --steps 1 "
        "--max_samples 2",
        "sft": f"--manifest_path {assigned}/manifest.jsonl --output_dir {folder} --model_id tiny "
        "--epochs 1 --preserve_pool_size 2",
        "em": f"--data_root {data} --work_dir {folder} --initial_model_id tiny --max_samples 2 "
        "--assign_steps 1 --train_epochs 1 --eval_samples 10 --preserve_pool_size 2",
    }
    return [*more[command].split(), "--report_to", tracker]


@pytest.mark.parametrize(
    ("command", "tag"), [("assign", "best_loss"), ("sft", "matching"), ("em", "diversity")]
)
def test_tensorboard_gets_the_losses(
    small_data: Path, assigned: Path, tmp_path: Path, call: Any, command: str, tag: str
) -> None:
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(module).EventAccumulator
    argv = flags(command, small_data, assigned, tmp_path / "run", "tensorboard")
    assert call(command, *argv).code == 0
    log = events(str(tmp_path / "run" / "logs")).Reload()
    assert log.Scalars(tag)[-1].value > 0


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_tracker_is_one_line_before_any_work(
    small_data: Path, assigned: Path, tmp_path: Path, call: Any, command: str
) -> None:
    argv = flags(command, small_data, assigned, tmp_path / "run", "wandb")
    ended = call(command, *argv)
    assert ended.code == 2 and "pip install wandb" in ended.error
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock", "run.json"}
