"""Trackers: event files where asked for, one line where the package is missing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from oneshot_fast.generators.options import ModelOptions

COMMANDS = ("assign", "sft", "em")


Flags = Callable[[str, Path, str], list[object]]


@pytest.fixture
def flags(small_model: Path, small_data: Path, small_assigned: Path) -> Flags:
    """Flags of a short run of a command into a folder with a tracker."""
    pairs, matched = f"--data_root {small_data}", f"--manifest_path {small_assigned}/manifest.jsonl"
    short = {
        "assign": f"{pairs} --steps 1 --max_samples 2 --model_id {small_model} --output_root",
        "sft": f"{matched} --epochs 1 --preserve_pool_size 2 --model_id {small_model} --output_dir",
        "em": f"{pairs} --max_samples 2 --assign_steps 1 --train_epochs 1 --eval_samples 10 "
        f"--preserve_pool_size 2 --initial_model_id {small_model} --work_dir",
    }
    return lambda command, folder, to: [*short[command].split(), folder, "--report_to", to]


@pytest.mark.parametrize(
    ("command", "tag"), [("assign", "best_loss"), ("sft", "matching"), ("em", "diversity")]
)
def test_tensorboard_gets_the_losses(
    flags: Flags, tmp_path: Path, call: Any, command: str, tag: str
) -> None:
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(module).EventAccumulator
    argv = flags(command, tmp_path / "run", "tensorboard")
    assert call(command, *argv).code == 0
    log = events(str(tmp_path / "run" / "logs")).Reload()
    assert log.Scalars(tag)[-1].value > 0


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_tracker_is_one_line_before_any_work(
    flags: Flags, tmp_path: Path, call: Any, command: str
) -> None:
    argv = flags(command, tmp_path / "run", "wandb")
    ended = call(command, *argv)
    assert ended.code == 2 and "pip install wandb" in ended.error
    assert not (tmp_path / "run").exists()


class WandB(ModuleType):
    """What W&B's package does for us, kept in lists."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.steps: dict[str, str] = {}
        self.finished = 0
        self.Image = lambda pixels: [*pixels.shape]
        self.config = SimpleNamespace(update=lambda values, **_: None)

    def init(self, **more: Any) -> WandB:
        self.inits.append(more)
        return self

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        assert step is None  # it would have to rise from stage to stage
        self.logged.append(values)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.steps[name] = step_metric

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> WandB:
    import accelerate.tracking

    fake = WandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["wandb"])
    return fake


def test_wandb_gets_all_stages_and_goes_on(
    flags: Flags, tmp_path: Path, call: Any, wandb: WandB
) -> None:
    argv = flags("em", tmp_path / "letters", "wandb")
    for _ in range(2):
        assert call("em", *argv, "--tracker_project", "fonts").code == 0
    first, second = wandb.inits
    assert first == second and wandb.finished == 2
    assert (first["project"], first["name"], first["resume"]) == ("fonts", "letters", "allow")
    found = {key: value for values in wandb.logged for key, value in values.items()}
    for key in ("diversity", "cycle-01/assign/best_loss", "cycle-01/sft/loss"):
        assert found[key] > 0 and wandb.steps[key] == key.replace(key.split("/")[-1], "step")
    assert found["cycle-01"][0][-1] == 3
    assert sum(key.startswith("cycle-01/assign/") and "-target" in key for key in found) == 2

    assert call("em", *argv, "--overwrite").code == 0
    assert wandb.inits[2]["id"] != first["id"] and wandb.inits[2]["project"] == "oneshot_fast"


def test_a_project_is_for_wandb(flags: Flags, tmp_path: Path, call: Any) -> None:
    argv = flags("assign", tmp_path / "run", "none")
    ended = call("assign", *argv, "--tracker_project", "letters")
    assert ended.code == 2 and "without --report_to wandb" in ended.error


@pytest.mark.parametrize("flag", ["--lora_rank 4", "--optimizer adamw8bit", "--report_to wandb"])
@pytest.mark.parametrize("command", ["sft", "em"])
def test_a_missing_package_is_one_line_before_a_model_is_loaded(
    assigned: Path, tmp_path: Path, call: Any, monkeypatch: Any, command: str, flag: str
) -> None:
    package = {"--l": "peft", "--o": "torchao", "--r": "wandb"}[flag[:3]]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(ModelOptions, "load", None)
    if command == "em":
        flags = flag.replace("--lora", "--train_lora").replace("--opt", "--train_opt").split()
        ended = call("em", *flags, "--work_dir", tmp_path / "run")
    else:
        place = ["--manifest_path", assigned / "manifest.jsonl", "--output_dir", tmp_path / "run"]
        ended = call("sft", *flag.split(), *place, "--model_id", "tiny")
    assert ended.code == 2 and f"pip install {package}" in ended.error
    assert not (tmp_path / "run").exists()
