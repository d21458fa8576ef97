"""What accelerate's config may ask of a training; two processes are in runtime/test_processes."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oneshot_fast.training import engines
from oneshot_fast.training.zero import ZeroEngine

ZERO = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("command", "config", "flags", "said"),
    [
        ("sft", {"FSDP_VERSION": "1"}, "", "version 1 is not supported"),
        ("sft", {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "", "give --gradient_checkpointing"),
        ("sft", {"FSDP_AUTO_WRAP_POLICY": "nonsense"}, "", "accelerate's FSDP config: Invalid"),
        ("sft", {}, "--compile", "not for --compile"),
        ("sft", ZERO, "", "DeepSpeed config needs a package that is not installed: pip install"),
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
    prompts: Path, assigned: Path, call: Any,
) -> None:  # fmt: skip
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **config}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engines, "processes", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    data = ["--manifest_path", assigned / "manifest.jsonl"]
    given = data if command == "sft" else ["--prompt_file", prompts]
    folder = tmp_path / "run"
    model = ["--teacher", "tiny-teacher"] if command == "distill" else ["--model_id", "tiny"]
    ended = call(command, *given, *flags.split(), *model, "--output_dir", folder)
    assert ended.code == 2 and said in ended.error
    assert not folder.exists()


def test_a_value_that_is_not_finite_reaches_every_gradient_of_zero() -> None:
    """So DeepSpeed, which looks at gradients alone, leaves the step out in all processes."""
    engine = ZeroEngine.__new__(ZeroEngine)
    engine.count, engine._deepspeed = 2, SimpleNamespace(backward=lambda loss: loss.backward())
    for found, expected in ((1.0, 6.0), (math.nan, math.nan), (math.inf, math.nan)):
        weight = torch.ones((), requires_grad=True)
        engine.backward(3 * weight, torch.tensor([0.0, found]))
        torch.testing.assert_close(weight.grad, torch.tensor(expected), equal_nan=True)
