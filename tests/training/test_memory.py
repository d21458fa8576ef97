"""Updates in the backward pass, networks off the device, and checkpoints on the way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.errors import UserError
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.training.memory import offloaded
from oneshot_fast.training.trainer import BadStepsError, Trainer

BASE: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 1e-4, "preserve_pool_size": 4}
IN_BACKWARD = {**BASE, "optimizer_in_backward": True}


def train(
    small_model: Path, small_assigned: Path, folder: Path, options: dict[str, Any], **more: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    generator = load_generator(small_model, master_weights=True)
    pairs, _ = read_manifest(small_assigned / "manifest.jsonl")
    run = SftRun(generator, pairs, folder, SftOptions(**options), **more)
    summary = run.run()
    return generator.denoiser.state_dict(), summary


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_updates_in_the_backward_pass_are_the_same_and_keep_no_gradient(
    small_model: Path, small_assigned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unclipped = {"max_grad_norm": float("inf"), "lr_warmup_steps": 3}
    usual, expected = train(small_model, small_assigned, tmp_path / "usual", {**BASE, **unclipped})
    left: list[int] = []
    update = Trainer.update

    def watched(self: Trainer) -> None:
        left.append(sum(p.grad is not None for p in self.parameters.values()))
        update(self)

    monkeypatch.setattr(Trainer, "update", watched)
    ours, summary = train(
        small_model, small_assigned, tmp_path / "ours", {**IN_BACKWARD, **unclipped}
    )
    assert same(ours, usual)
    assert left == [0] * 4
    assert summary["matched_loss_after"] == expected["matched_loss_after"]
    rows = [json.loads((tmp_path / f / "history.jsonl").read_text().splitlines()[0])
            for f in ("usual", "ours")]  # fmt: skip
    assert rows[1] == {**rows[0], "gradient_norm": pytest.approx(rows[0]["gradient_norm"])}
    clipped, _ = train(
        small_model, small_assigned, tmp_path / "clipped", {**IN_BACKWARD, "max_grad_norm": 1e-9}
    )
    assert not same(clipped, usual)


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2, "use_ema": True}], ids=str)
def test_selective_checkpointing_changes_nothing_but_memory(
    small_model: Path, small_assigned: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    options = {**IN_BACKWARD, "epochs": 1, **more}
    usual, _ = train(small_model, small_assigned, tmp_path / "usual", options)
    ours, _ = train(
        small_model, small_assigned, tmp_path / "ours", {**options, "selective_checkpointing": True}
    )
    assert same(ours, usual)


def test_updates_in_the_backward_pass_resume_exactly(
    small_model: Path, small_assigned: Path, tmp_path: Path, forks: Any
) -> None:
    fixed = "--epochs 3 --lr 1e-4 --preserve_pool_size 4 --save_minutes 0"
    flags = ["--manifest_path", small_assigned / "manifest.jsonl", *fixed.split()]
    flags += ["--model_id", small_model]
    flags += ["--optimizer_in_backward", "--keep_checkpoints", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert forks.run("sft", [*flags, "--output_dir", whole], whole).code == 0
    flags += ["--output_dir", parts]
    for place in ("history.jsonl", "checkpoint-6"):
        assert forks.run("sft", flags, parts, at=place).code == -9
    assert forks.run("sft", flags, parts).code == 0
    file = "unet/diffusion_pytorch_model.safetensors"
    for name in ("checkpoint-4", "checkpoint-6", "checkpoint-best", "checkpoint-final"):
        assert same(*(load_file(folder / name / file) for folder in (whole, parts)))
    names = {path.name for path in parts.iterdir() if re.search(r"checkpoint-\d", path.name)}
    assert names == {"checkpoint-4", "checkpoint-6"}  # of 2, 4 and 6
    assert not same(*(load_file(parts / f"checkpoint-{k}" / file) for k in (4, 6)))
    assert same(*(load_file(parts / f"checkpoint-{k}" / file) for k in (6, "final")))


class Poison:
    """Makes what the UNet's first weight gets as its gradient, or its output, NaN at some steps."""

    def __init__(self, generator: Any, steps: set[int], forward: bool) -> None:
        self.count = 0
        self.weight = next(iter(generator.denoiser.parameters()))

        def after(module: object, inputs: object, output: tuple[Tensor]) -> tuple[Tensor] | None:
            if not torch.is_grad_enabled():
                return None
            self.count += 1
            return (output[0] * float("nan"),) if forward and self.count in steps else None

        def gradient(value: Tensor) -> Tensor | None:
            return value * float("nan") if not forward and self.count in steps else None

        generator.denoiser.register_forward_hook(after)
        self.weight.requires_grad_(True).register_hook(gradient)


@pytest.mark.parametrize("forward", [True, False])
def test_a_bad_step_destroys_no_weight(
    small_model: Path, small_assigned: Path, tmp_path: Path, forward: bool
) -> None:
    pairs, _ = read_manifest(small_assigned / "manifest.jsonl")
    generator = load_generator(small_model, master_weights=True)
    poison, options = Poison(generator, {2}, forward), SftOptions(**IN_BACKWARD)
    before = poison.weight.detach().clone()
    summary = SftRun(generator, pairs, tmp_path / "run", options).run()
    assert (summary["skipped_steps"], summary["steps"]) == (1, 4)
    assert all(value.isfinite().all() for value in generator.denoiser.state_dict().values())
    assert not torch.equal(poison.weight, before)  # the good steps trained it

    generator = load_generator(small_model, master_weights=True)
    poison = Poison(generator, {1, 2, 3}, forward)
    before = {k: v.clone() for k, v in generator.denoiser.state_dict().items()}
    with pytest.raises(BadStepsError):
        SftRun(generator, pairs, tmp_path / "bad", options).run()
    state = load_file(tmp_path / "bad" / "state.safetensors")
    changed = [k for k in before if not torch.equal(before[k], state[f"weight/{k}"])]
    assert all(value.isfinite().all() for value in state.values())
    # a bad loss ends the step before it; a bad gradient keeps only its own weight
    first = next(iter(before))
    assert first not in changed and bool(changed) != forward


def test_what_cannot_go_with_it_is_refused() -> None:
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        SftOptions(optimizer_in_backward=True, gradient_accumulation_steps=2).check()


def test_no_hook_is_left_behind(small_model: Path, small_assigned: Path, tmp_path: Path) -> None:
    pairs, _ = read_manifest(small_assigned / "manifest.jsonl")
    generator = load_generator(small_model, master_weights=True)
    SftRun(generator, pairs, tmp_path, SftOptions(**IN_BACKWARD)).run()
    weight = next(iter(generator.denoiser.parameters())).requires_grad_(True)
    before = weight.detach().clone()
    weight.sum().backward()
    assert torch.equal(weight, before) and weight.grad is not None


def test_training_encodes_nothing_once_it_has_begun(
    small_model: Path, small_assigned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, _ = read_manifest(small_assigned / "manifest.jsonl")
    generator = load_generator(small_model, master_weights=True)
    pipe, encoded = generator.pipe, []
    for network in (pipe.text_encoder, pipe.text_encoder_2, pipe.vae.encoder):
        network.register_forward_pre_hook(lambda *_: encoded.append(1))
    started: list[int] = []
    update = Trainer.update

    def watched(self: Trainer) -> None:
        started.append(len(encoded))
        update(self)

    monkeypatch.setattr(Trainer, "update", watched)
    run = SftRun(generator, pairs, tmp_path, SftOptions(**BASE), offload_encoders=True)
    run.run()
    assert started[0] > 0 and started == [started[0]] * 4


def test_offloaded_networks_leave_the_device_and_come_back(small_model: Path) -> None:
    def places(module: torch.nn.Module) -> set[str]:
        return {p.device.type for p in module.parameters()}

    # "meta" holds no values, so nothing can come back from it: only the way there is seen
    for keep in (True, False):
        generator = load_generator(small_model, master_weights=True)
        pipe = generator.pipe
        encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.vae.encoder)
        with pytest.raises(NotImplementedError, match="meta"), offloaded(generator, keep, "meta"):
            assert all(places(module) == {"meta"} for module in encoders)
            assert places(generator.denoiser) == {"cpu"}
            assert places(pipe.vae.decoder) == ({"cpu"} if keep else {"meta"})
            assert places(pipe.vae.post_quant_conv) == ({"cpu"} if keep else {"meta"})
