"""Training an adapter: what is trained, what diffusers reads, what preserve losses see."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.embedded.pipeline import model_path
from oneshot_fast.errors import UserError
from oneshot_fast.generators.adapters import add_adapter
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.losses.base import OneStepLoss
from oneshot_fast.training.losses.preserve import Preserve, PreservePool

LORA: dict[str, Any] = {"lora_rank": 4, "lr": 5e-3, "preserve_pool_size": 4, "batch_size": 4}
PROMPT = "a handwritten digit one"


def train(assigned: Path, folder: Path, **more: Any) -> tuple[Generator, dict[str, Any]]:
    generator = load_generator("tiny", master_weights=True)
    pairs, _ = read_manifest(assigned / "manifest.jsonl")
    options = SftOptions(**{**LORA, "epochs": 2, **more})
    run = SftRun(generator, pairs, folder, options, keep_checkpoints=1)
    return generator, run.run()


def make(generator: Generator) -> Tensor:
    with torch.no_grad():
        return generator.latents(gaussian([3], (4, 8, 8)), generator.encode_prompts([PROMPT]))


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_diffusers_reads_the_adapter_and_makes_the_same_latents(
    assigned: Path, tmp_path: Path, tiny: Generator, alpha: float | None
) -> None:
    generator, summary = train(assigned, tmp_path / "run", lora_alpha=alpha)
    assert summary["matched_loss_after"] < 0.95 * summary["matched_loss_before"]
    trained, base = make(generator), make(tiny)
    assert (trained - base).abs().max() > 0.05
    for name in ("lora-final", "checkpoint-4"):
        pipe = StableDiffusionXLPipeline.from_pretrained(model_path())
        pipe.load_lora_weights(tmp_path / "run" / name)
        ours = make(SdxlGenerator(pipe))
        torch.testing.assert_close(ours, trained, rtol=1e-4, atol=1e-4)
        if name == "lora-final":
            pipe.set_progress_bar_config(disable=True)
            theirs = pipe(PROMPT, num_inference_steps=1, guidance_scale=0.0, output_type="latent",
                          latents=gaussian([3], (4, 8, 8))).images  # fmt: skip
            torch.testing.assert_close(theirs, trained, rtol=1e-4, atol=1e-4)
    merged = load_generator(tmp_path / "run" / "checkpoint-final")
    assert torch.equal(make(merged), trained)
    assert merged.denoiser.state_dict().keys() == tiny.denoiser.state_dict().keys()
    size = (tmp_path / "run" / "lora-final" / "pytorch_lora_weights.safetensors").stat().st_size
    assert size < 0.1 * sum(p.nbytes for p in tiny.denoiser.parameters())


def test_only_the_adapter_is_trained_and_kept(
    assigned: Path, tmp_path: Path, tiny: Generator, forks: Any
) -> None:
    fixed = "--model_id tiny --lora_rank 2 --epochs 3 --lr 1e-3 --preserve_pool_size 4"
    flags = ["--manifest_path", assigned / "manifest.jsonl", *fixed.split(), "--save_minutes", "0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert forks.run("sft", [*flags, "--output_dir", whole], whole).code == 0
    flags += ["--output_dir", parts]
    for place in ("history.jsonl", "lora-final"):
        assert forks.run("sft", flags, parts, at=place).code == -9
    state = load_file(parts / "state.safetensors")
    weights = {k: v for k, v in state.items() if k.startswith("weight/")}
    kept = {name: value.dtype for name, value in state.items() if "/" in name}
    assert weights and all(".lora_" in name for name in kept)
    assert {*kept.values()} == {torch.float32}
    assert forks.run("sft", flags, parts).code == 0
    for name in ("lora-best", "lora-final"):
        files = [load_file(f / name / "pytorch_lora_weights.safetensors") for f in (whole, parts)]
        assert files[0].keys() == files[1].keys() and len(files[0]) == len(weights)
        assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    file = "unet/diffusion_pytorch_model.safetensors"
    old, new = (load_file(f / "checkpoint-final" / file) for f in (whole, parts))
    base = tiny.denoiser.state_dict()
    assert all(torch.equal(old[k], new[k]) for k in base)
    changed = {k for k in base if not torch.equal(base[k], new[k])}
    adapted = {k for k in base if k.endswith(("to_q.weight", "to_k.weight", "to_v.weight",
                                              "to_out.0.weight"))}  # fmt: skip
    assert changed == adapted


def live_loss(
    generator: Generator, base: nn.Module | None, rows: Rows, loss: OneStepLoss
) -> Tensor:
    """Preserve loss against a live copy of the base UNet, or against the adapter switched off."""
    unet: Any = generator.denoiser
    with torch.no_grad():
        if base is None:
            unet.disable_adapters()
            latents = generator.latents(rows.noise, rows.conditioning)
            unet.enable_adapters()
        else:
            generator.pipe.unet = base
            latents = generator.latents(rows.noise, rows.conditioning)
            generator.pipe.unet = unet
        live = Rows(rows.noise, rows.conditioning, {"latents": latents})
        return loss(generator, Batch(preserve=live))["preserve"]


def test_the_pool_gives_the_losses_of_a_live_base_generator(tmp_path: Path) -> None:
    generator = load_generator("tiny", master_weights=True)
    prompts = [PROMPT, "a handwritten digit two"]
    pool = PreservePool.build(generator, prompts, (4, 8, 8), 20, 0, tmp_path / "pool.safetensors")
    base = copy.deepcopy(generator.denoiser)
    add_adapter(generator.denoiser, 4, None)
    with torch.no_grad():
        for name, parameter in generator.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    rows, loss = pool.rows(generator, 6, 1), OneStepLoss(preserve=Preserve(0.5, 0.5))
    ours = loss(generator, Batch(preserve=rows))["preserve"].detach()
    assert ours > 1e-3
    for teacher in (base, None):
        theirs = live_loss(generator, teacher, rows, loss)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_bfloat16_base_trains_a_float32_adapter(assigned: Path, tmp_path: Path) -> None:
    generator, summary = train(assigned, tmp_path / "run", weights_dtype="bfloat16")
    assert summary["matched_loss_after"] < 0.99 * summary["matched_loss_before"]
    assert generator.denoiser.dtype == torch.float32  # as it was loaded
    lora = load_file(tmp_path / "run" / "lora-final" / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in lora.values()} == {torch.float32}


def test_an_average_of_the_adapter_and_a_second_training_go_on(
    assigned: Path, tmp_path: Path
) -> None:
    generator, first = train(assigned, tmp_path / "1", use_ema=True, ema_decay=0.5)
    options = SftOptions(**{**LORA, "epochs": 1})
    pairs, _ = read_manifest(assigned / "manifest.jsonl")
    second = SftRun(generator, pairs, tmp_path / "2", options).run()
    assert second["matched_loss_before"] == pytest.approx(first["matched_loss_after"], rel=1e-4)
    assert json.loads((tmp_path / "2" / "summary.json").read_text())["steps"] == 2


def test_the_adapters_of_all_cycles_make_the_final_generator(
    tmp_path: Path, call: Callable[..., Any]
) -> None:
    flags = "--max_samples 6 --assign_steps 1 --train_epochs 1 --train_lr 5e-3 --eval_samples 10"
    flags += " --num_images 0 --train_lora_rank 4 --work_dir"
    assert call("em", *flags.split(), tmp_path / "em").code == 0
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path())
    made = []
    for name in ("cycle-01", "cycle-02"):
        pipe.load_lora_weights(tmp_path / "em" / name / "sft" / "lora-final", adapter_name=name)
        made.append(make(load_generator(tmp_path / "em" / name / "sft" / "checkpoint-final")))
    pipe.set_adapters(["cycle-01", "cycle-02"])
    assert (made[0] - made[1]).abs().max() > 0.01
    torch.testing.assert_close(make(SdxlGenerator(pipe)), made[1], rtol=1e-4, atol=1e-4)
    final = load_generator(tmp_path / "em" / "checkpoint-final")
    assert torch.equal(make(final), made[1])


def test_bad_options_are_refused() -> None:
    for options in (
        SftOptions(lora_rank=-1),
        SftOptions(lora_alpha=4.0),
        SftOptions(lora_rank=4, lora_alpha=0.0),
    ):
        with pytest.raises(UserError, match="lora"):
            options.check()
    with pytest.raises(UserError, match="takes no adapter"):
        add_adapter(nn.Linear(2, 2), 4, None)
