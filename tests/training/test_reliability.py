"""The M-step when steps go wrong or memory is short, and its memory options."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.errors import UserError
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.runtime.files import read_metadata
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.losses.base import shared_losses
from oneshot_fast.training.memory import checkpoint_activations
from oneshot_fast.training.trainer import BadStepsError, Trainer

BASE: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 1e-4, "preserve_pool_size": 4}


class Fault:
    """Counts the UNet's evaluations that are trained, and does something before some of them."""

    def __init__(self, generator: Generator, act: Any) -> None:
        self.count = 0

        def before(*_: object) -> None:
            if torch.is_grad_enabled():
                self.count += 1
                act(self.count)

        self.hook = generator.denoiser.register_forward_pre_hook(before)


def train(
    small_model: Path, small_assigned: Path, folder: Path, act: Any = None, **more: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    generator = load_generator(small_model, master_weights=True)
    if act is not None:
        Fault(generator, lambda count: act(generator, count))
    pairs, _ = read_manifest(small_assigned / "manifest.jsonl")
    options = SftOptions(**{**BASE, **more})
    summary = SftRun(generator, pairs, folder, options, save_minutes=0).run()
    return generator.denoiser.state_dict(), summary


def poison(generator: Generator, steps: set[int]) -> Any:
    """Make the UNet's output NaN in these evaluations."""
    count = 0

    def after(module: object, inputs: object, output: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal count
        if not torch.is_grad_enabled():
            return output
        count += 1
        return (output[0] * float("nan"),) if count in steps else output

    return generator.denoiser.register_forward_hook(after)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.mark.parametrize("steps", [{1}, {2, 4}])
def test_a_bad_step_is_skipped_and_counted(
    small_model: Path, small_assigned: Path, tmp_path: Path, steps: set[int]
) -> None:
    generator = load_generator(small_model, master_weights=True)
    poison(generator, steps)
    pairs, _ = read_manifest(small_assigned / "manifest.jsonl")
    summary = SftRun(generator, pairs, tmp_path / "run", SftOptions(**BASE)).run()
    assert summary["skipped_steps"] == len(steps) and summary["steps"] == 4
    assert all(value.isfinite().all() for value in generator.denoiser.state_dict().values())


def test_three_bad_steps_in_a_row_stop_with_the_last_good_weights(
    small_model: Path, small_assigned: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    generator = load_generator(small_model, master_weights=True)
    poison(generator, {2, 3, 4})
    pairs, _ = read_manifest(small_assigned / "manifest.jsonl")
    with pytest.raises(BadStepsError, match="3 steps in a row"):
        SftRun(generator, pairs, tmp_path / "run", SftOptions(**BASE)).run()
    state = load_file(tmp_path / "run" / "state.safetensors")
    for name, value in generator.denoiser.state_dict().items():
        assert torch.equal(state[f"weight/{name}"], value) and value.isfinite().all()


def gradient(generator: Generator, batch: Batch, parts: int) -> Tensor:
    options = SftOptions(pixel_l1_weight=0.5)
    trainer = Trainer(generator, options.loss(), options, steps=9)
    with trainer.unfrozen():
        for part in batch.split(parts):
            trainer.add(shared_losses(trainer.loss, generator, part))
    rows = [p.grad.double().flatten() for p in trainer.parameters.values() if p.grad is not None]
    trainer.forget()
    return torch.cat(rows)


def test_parts_and_recomputation_give_the_same_gradient(small_model: Path) -> None:
    generator = load_generator(small_model, master_weights=True)
    noise, latents = torch.randn(2, 5, 4, 8, 8)
    prompts = generator.encode_prompts([f"a handwritten digit {k}" for k in ("one", "two")] * 2)
    images = 1 - generator.decode(latents[:2])
    batch = Batch(
        matching=Rows(
            noise[:2], prompts.select(slice(2)), {"latents": latents[:2], "images": images}
        ),
        preserve=Rows(noise[2:], prompts.select(slice(1, None)), {"latents": latents[2:]}),
    )
    whole = gradient(generator, batch, 1)
    for parts in (2, 3, 5):
        assert (gradient(generator, batch, parts) - whole).norm() < 1e-5 * whole.norm()
    for name in ("gradient_checkpointing", "selective_checkpointing"):
        checkpoint_activations(generator.denoiser, SftOptions(**{name: True}))
        assert (gradient(generator, batch, 1) - whole).norm() < 1e-5 * whole.norm()
    with pytest.raises(UserError, match="give one"):
        SftOptions(gradient_checkpointing=True, selective_checkpointing=True).check()


def test_out_of_memory_halves_the_parts_once(
    small_model: Path, small_assigned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def once(_: object, count: int) -> None:
        if count == 1:
            raise torch.OutOfMemoryError

    def always(_: object, count: int) -> None:
        raise torch.OutOfMemoryError

    halved, _ = train(small_model, small_assigned, tmp_path / "halved", once)
    assert "in 2 parts" in capfd.readouterr().err
    told, _ = train(small_model, small_assigned, tmp_path / "told", gradient_accumulation_steps=2)
    assert distance(halved, told) == 0
    with pytest.raises(UserError, match="out of memory"):
        train(small_model, small_assigned, tmp_path / "never", always)


AVERAGED: dict[str, Any] = {"use_ema": True, "ema_decay": 0.5}


@pytest.fixture(scope="module")
def averaged(
    small_model: Path, small_assigned: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """Average weights of a training that nothing interrupted, other than its last ones."""
    folder = tmp_path_factory.mktemp("averaged")
    whole, _ = train(small_model, small_assigned, folder / "whole", **AVERAGED)
    plain, _ = train(small_model, small_assigned, folder / "plain")
    assert distance(plain, whole) > 0
    return whole


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_the_step_and_the_rest_is_the_same(
    small_model: Path,
    small_assigned: Path,
    averaged: dict[str, Tensor],
    tmp_path: Path,
    name: str,
) -> None:
    def press(_: object, count: int) -> None:
        if count == 3:
            os.kill(os.getpid(), getattr(signal, name))

    with pytest.raises(KeyboardInterrupt):
        train(small_model, small_assigned, tmp_path, press, **AVERAGED)
    assert read_metadata(tmp_path / "state.safetensors", "position")["step"] == 3
    resumed, _ = train(small_model, small_assigned, tmp_path, **AVERAGED)
    assert distance(resumed, averaged) == 0


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_8_bit_moments_and_stochastic_rounding_resume_exactly(
    small_model: Path, small_assigned: Path, tmp_path: Path, dtype: str
) -> None:
    def press(_: object, count: int) -> None:
        if count == 2:
            os.kill(os.getpid(), signal.SIGINT)

    more = {"optimizer": "adamw8bit", "weights_dtype": dtype}
    whole, summary = train(small_model, small_assigned, tmp_path / "whole", **more)
    assert summary["matched_loss_after"] < summary["matched_loss_before"]
    with pytest.raises(KeyboardInterrupt):
        train(small_model, small_assigned, tmp_path / "parts", press, **more)
    assert distance(train(small_model, small_assigned, tmp_path / "parts", **more)[0], whole) == 0
    history = [(tmp_path / f / "history.jsonl").read_text() for f in ("whole", "parts")]
    assert json.loads(history[0].splitlines()[-1]) == json.loads(history[1].splitlines()[-1])


def test_options_that_do_not_go_together_are_refused(small_model: Path) -> None:
    with pytest.raises(UserError, match="adamw8bit"):
        SftOptions(weights_dtype="bfloat16").check()
    with pytest.raises(UserError, match="bfloat16 or float32"):
        generator = load_generator(small_model, dtype=torch.float16, master_weights=True)
        SftRun(generator, [], Path("unused"), SftOptions(), targets=TargetImages(generator))
