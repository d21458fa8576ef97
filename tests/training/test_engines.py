"""What accelerate's config may ask of a training; two processes are in runtime/test_processes."""

import json
import math
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oneshot_fast.errors import UserError
from oneshot_fast.training import engines
from oneshot_fast.training.zero import ZeroEngine, zero_config

# Steps of a model whose sizes are odd, two of which go wrong in one of the processes; then another
# stage goes on with its state. All that is compared is printed.
STEPS = """
import json
import os
import sys
from types import SimpleNamespace

import torch
from torch import nn

from oneshot_fast.generators.base import Conditioning
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.runtime.processes import leave, processes
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.trainer import Trainer


class Squares:
    parts, fault = ("matching",), None

    def __call__(self, model, batch):
        made = model.module(batch["matching"].noise)
        loss = made.square().mean()
        if processes().process_index and self.fault:
            loss = loss * float("nan") if self.fault == "loss" else loss + (0 * made.sum()).sqrt()
        return {"matching": loss}


def start(stage):
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    torch.manual_seed(0)
    trainee = SimpleNamespace(module=nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3)))
    trainee.replace_module = lambda module: None
    return Trainer(trainee, Squares(), SftOptions(lr=0.01), steps=9)


def state(trainer):
    return {name: value.tolist() for name, value in trainer.state()[0].items()}


stages = [int(stage) for stage in sys.argv[1:]]
batch = Batch(matching=Rows(torch.ones(4, 5).cumsum(0) / 4, Conditioning(torch.ones(4, 1, 1))))
found = {}
first = start(stages[0])
first(batch)
first.end_epoch(1)
found["before"] = state(first)
for first.loss.fault in ("loss", "gradient"):
    first(batch)
    found[first.loss.fault] = state(first)
first.loss.fault = None
found["skipped"] = first.skipped
tensors, position = first.state()
tensors = {name: value.clone() for name, value in tensors.items()}
first(batch)
found["after"] = state(first)
first.close()
second = start(stages[1])
second.resume(tensors, position)
second(batch)
found["resumed"] = state(second)
found["keeps"] = [bool(first.best), bool(second.best)]
second.close()
print(json.dumps(found))
leave()
"""
ZERO = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("command", "config", "flags", "said"),
    [
        ("sft", {"FSDP_VERSION": "1"}, "", "version 1 is not supported"),
        ("sft", {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "", "give --gradient_checkpointing"),
        ("sft", {"FSDP_AUTO_WRAP_POLICY": "nonsense"}, "", "accelerate's FSDP config: Invalid"),
        ("sft", {}, "--compile", "not for --compile"),
        ("sft", ZERO, "", "DeepSpeed config needs a package that is not installed: pip install"),
        ("em", {"FSDP_VERSION": "1"}, "", "version 1 is not supported"),
        ("prefer", ZERO, "--reward digit", "asks for DeepSpeed, which is for sft and em"),
        ("prefer", {}, "--reward digit", "is for sft and em; leave it out, for DDP"),
        (
            "reinforce",
            {},
            "--reward digit --batch_size 8 --policy_weight 0 --final_reward_weight 1",
            "for sft and em",
        ),
        ("distill", {}, "--num_inference_steps 2", "is for sft and em; leave it out, for DDP"),
    ],
)
def test_what_cannot_be_sharded_is_one_line(
    command: str, config: dict[str, str], flags: str, said: str, monkeypatch: Any, tmp_path: Path,
    prompts: Path, assigned: Path, small_data: Path, call: Any,
) -> None:  # fmt: skip
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **config}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engines, "processes", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    data = {
        "sft": ["--manifest_path", assigned / "manifest.jsonl"],
        "em": ["--data_root", small_data],
    }
    given = data.get(command, ["--prompt_file", prompts])
    model = {"distill": ["--teacher", "tiny-teacher"], "em": ["--initial_model_id", "tiny"]}
    given += model.get(command, ["--model_id", "tiny"])
    folder = tmp_path / "run"
    where = "--work_dir" if command == "em" else "--output_dir"
    ended = call(command, *given, *flags.split(), where, folder)
    assert ended.code == 2 and said in ended.error
    assert not folder.exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {}}, "put zero_stage: 2 or 3 into"),
        ({"zero_optimization": None}, "put zero_stage: 2 or 3 into"),
        ({"zero_optimization": {"stage": 1}}, "put zero_stage: 2 or 3 into"),
        ({"zero_optimization": "auto"}, "accelerate's DeepSpeed config: "),
        ({}, "accelerate's DeepSpeed config: Please specify"),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "leave compute_grad_norm",
        ),
        ({"zero_optimization": {"stage": 2}, "optimizer": "AdamW"}, "leave optimizer out"),
        ({"zero_optimization": {"stage": "auto"}}, None),
    ],
)
def test_a_deepspeed_config_is_read_or_refused(
    config: dict[str, Any], said: str | None, monkeypatch: Any, tmp_path: Path
) -> None:
    """A stage that is left to accelerate is its 2."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    monkeypatch.setattr("accelerate.utils.compare_versions", lambda *_: True)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        assert zero_config()["zero_optimization"] == {"stage": 2}


def test_a_deepspeed_that_is_too_old_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr("accelerate.utils.compare_versions", lambda *_: False)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    with pytest.raises(UserError, match="needs deepspeed >= 0"):
        zero_config()


def test_a_value_that_is_not_finite_reaches_every_gradient_of_zero() -> None:
    """So DeepSpeed, which looks at gradients alone, leaves the step out in all processes."""
    engine = ZeroEngine.__new__(ZeroEngine)
    engine.count, engine._deepspeed = 2, SimpleNamespace(backward=lambda loss: loss.backward())
    for found, expected in ((1.0, 6.0), (math.nan, math.nan), (math.inf, math.nan)):
        weight = torch.ones((), requires_grad=True)
        engine.backward(3 * weight, torch.tensor([0.0, found]))
        torch.testing.assert_close(weight.grad, torch.tensor(expected), equal_nan=True)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stages", ["2 3", "3 2", "3 3"])
def test_zero_leaves_a_bad_step_out_and_another_stage_goes_on(
    stages: str, tmp_path: Path, forks: Any
) -> None:
    """A loss, or a gradient alone, that is not finite in one process changes nothing in any."""
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    both = forks.run_two(str(script), stages.split(), tmp_path, **ZERO)
    for main, ended in zip((True, False), both, strict=True):
        assert ended.code == 0, ended.err
        found = json.loads(ended.out.splitlines()[-1])
        assert found["loss"] == found["gradient"] == found["before"] and found["skipped"] == 2
        assert found["before"]["updates"] == [1] * 4 and found["after"]["updates"] == [2] * 4
        assert found["after"].keys() == found["resumed"].keys()
        for name, value in found["after"].items():
            torch.testing.assert_close(torch.tensor(found["resumed"][name]), torch.tensor(value))
            assert torch.tensor(value).isfinite().all()
            assert name.startswith(("best/", "sums")) or value != found["before"][name]
        assert found["keeps"] == [main, main]
