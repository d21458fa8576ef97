"""Memory of a training step as estimated, beside the count of real steps; the dry run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.plan import sft_plan, training_batch, training_memory
from oneshot_fast.planning.memory import LiveMemory
from oneshot_fast.training.trainer import Trainer

MOMENTS = "optimiser's moments"
FULL: dict[str, Any] = {"batch_size": 2}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "latent losses only": {"preserve_pixel_weight": 0.0},
    "pixel loss": {"pixel_l1_weight": 1.0},
    "checkpointing": {"gradient_checkpointing": True, "preserve_pixel_weight": 0.0},
    "selective": {"selective_checkpointing": True, "preserve_pixel_weight": 0.0},
    "in backward": {"optimizer_in_backward": True, "preserve_pixel_weight": 0.0},
    "two parts": {"gradient_accumulation_steps": 2},
    "average": {"use_ema": True},
    "adapter": {"lora_rank": 4},
    "adapter on bfloat16": {"lora_rank": 4, "weights_dtype": "bfloat16"},
    "selective adapter": {"selective_checkpointing": True, "lora_rank": 4},
}


def counted(model: Path, options: SftOptions) -> int:
    """Most bytes of weights, moments, average and what a real step makes, in use at once."""
    generator = load_generator(str(model), master_weights=True)
    trainer = Trainer(generator, options.loss(), options, steps=9)
    networks = generator.networks.values()
    known = [t for n in networks for t in (*n.parameters(), *n.buffers())]
    average = [] if trainer.ema is None else trainer.ema.shadow_params
    batch = training_batch(generator, options, 64)
    with LiveMemory([*known, *average]) as memory:
        for _ in range(2):
            trainer(batch)
    weights = sum(p.nbytes for n in networks for p in n.parameters())
    return weights + sum(p.nbytes for p in average) + memory.peak


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_near_the_count_of_real_steps(name: str, small_model: Path) -> None:
    options, generator = SftOptions(**{**FULL, **CASES[name]}), load_generator(str(small_model))

    def kinds() -> dict[str, Any]:
        return {k: (p.dtype, p.requires_grad) for k, p in generator.denoiser.named_parameters()}

    before = kinds()
    estimate = training_memory(generator, options, 64)
    assert kinds() == before
    assert estimate.peak == pytest.approx(counted(small_model, options), rel=0.15)


def test_each_option_saves_what_it_says(tiny: Generator) -> None:
    def of(**more: Any) -> Any:
        return training_memory(
            tiny, SftOptions(**{**FULL, "preserve_pixel_weight": 0.0, **more}), 64
        )

    plain, offloaded = of(), training_memory(tiny, SftOptions(), 64, offloads=True)
    weights = sum(p.nbytes for p in tiny.denoiser.parameters())
    assert plain.held["gradients"] == plain.trained_bytes == weights == plain.weights["unet"]
    assert plain.kept[MOMENTS] == 2 * weights
    assert of(optimizer_in_backward=True).held["gradients"] < 0.1 * weights
    selective = of(selective_checkpointing=True).held["activations"]
    assert (
        of(gradient_checkpointing=True).held["activations"]
        < 0.6 * selective
        < 0.6 * plain.held["activations"]
    )
    assert of(use_ema=True).kept["average of the weights"] == weights
    adapter = of(lora_rank=4, weights_dtype="bfloat16")
    assert adapter.kept[MOMENTS] == 2 * adapter.trained_bytes < 0.1 * weights
    assert 0.5 * weights < adapter.weights["unet"] < 0.6 * weights
    assert offloaded.weights["text_encoder"] == offloaded.weights["text_encoder_2"] == 0
    assert 0 < offloaded.weights["vae"] < plain.weights["vae"]
    nothing = SftOptions(preserve_pixel_weight=0.0)
    assert training_memory(tiny, nothing, 64, offloads=True).weights["vae"] == 0


def test_the_dry_run_of_a_training_writes_nothing(
    small_model: Path, small_assigned: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    flags = ["--manifest_path", small_assigned / "manifest.jsonl", "--model_id", small_model]
    flags.append("--dry_run")
    before = {path: path.stat().st_mtime_ns for path in small_assigned.rglob("*")}
    ended = call("sft", *flags, "--output_dir", tmp_path / "run", "--lora_rank", 4)
    assert ended.code == 0 and not (tmp_path / "run").exists(), ended.err
    assert {path: path.stat().st_mtime_ns for path in small_assigned.rglob("*")} == before
    assert "in all, for 6 pairs and 20 steps: " in ended.out
    trained = [float(v) for v in re.findall(r"trained parameters: ([\d.]+) thousand", ended.out)]
    assert 1 < trained[0] < 200
    assert call("sft", *flags).code == 0  # no output_dir is needed


def test_one_file_of_a_model_is_counted(tiny: Generator) -> None:
    def of(**more: Any) -> float:
        plan = sft_plan(tiny, SftOptions(batch_size=2, **more), resolution=16, samples=2)
        (found,) = re.findall(r"disk: ([\d.]+) MB for the checkpoints", "\n".join(plan.lines))
        return float(found)

    assert of(save_single_file=True) == pytest.approx(2 * of(), abs=0.2)
