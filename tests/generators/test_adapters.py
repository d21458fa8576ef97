"""Training an adapter: what is trained, what diffusers reads, what preserve losses see."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.embedded.pipeline import model_path
from oneshot_fast.errors import UserError
from oneshot_fast.generators.adapters import TARGETS, add_adapter, write_adapter
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.lora_files import LoraFile
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.generators.toy import ToyGenerator
from oneshot_fast.generators.toy_networks import ToyConfig
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.losses.base import OneStepLoss
from oneshot_fast.training.losses.preserve import Preserve, PreservePool

LORA: dict[str, Any] = {"lora_rank": 4, "lr": 5e-3, "preserve_pool_size": 4, "batch_size": 4}
UNET_FILE, LORA_FILE = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
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


Trained = Callable[..., tuple[Path, Generator, dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(assigned: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trainings by alpha and the names in the adapter's file; each is run once."""

    @functools.cache
    def run(
        alpha: float | None, names: str = "diffusers"
    ) -> tuple[Path, Generator, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("trained") / "run"
        return folder, *train(assigned, folder, lora_alpha=alpha, lora_format=names)

    return run


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_diffusers_reads_the_adapter_and_makes_the_same_latents(
    trained: Trained, tiny: Generator, alpha: float | None
) -> None:
    run, generator, summary = trained(alpha)
    assert summary["matched_loss_after"] < 0.95 * summary["matched_loss_before"]
    trained, base = make(generator), make(tiny)
    assert (trained - base).abs().max() > 0.05
    for name in ("lora-final", "checkpoint-4"):
        pipe = StableDiffusionXLPipeline.from_pretrained(model_path())
        pipe.load_lora_weights(run / name)
        ours = make(SdxlGenerator(pipe))
        torch.testing.assert_close(ours, trained, rtol=1e-4, atol=1e-4)
        if name == "lora-final":
            pipe.set_progress_bar_config(disable=True)
            theirs = pipe(PROMPT, num_inference_steps=1, guidance_scale=0.0, output_type="latent",
                          latents=gaussian([3], (4, 8, 8))).images  # fmt: skip
            torch.testing.assert_close(theirs, trained, rtol=1e-4, atol=1e-4)
    merged = load_generator(run / "checkpoint-final")
    assert torch.equal(make(merged), trained)
    assert merged.denoiser.state_dict().keys() == tiny.denoiser.state_dict().keys()
    size = (run / "lora-final" / "pytorch_lora_weights.safetensors").stat().st_size
    assert size < 0.1 * sum(p.nbytes for p in tiny.denoiser.parameters())


def test_only_the_adapter_is_trained_and_kept(
    small_model: Path, small_assigned: Path, tmp_path: Path, forks: Any
) -> None:
    fixed = "--lora_rank 2 --epochs 3 --lr 1e-3 --preserve_pool_size 4 --save_minutes 0"
    flags = ["--manifest_path", small_assigned / "manifest.jsonl", *fixed.split()]
    flags += ["--model_id", small_model]
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
    base = load_generator(small_model).denoiser.state_dict()
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
    options = SftOptions(preserve_pool_size=20)
    pool = PreservePool.build(generator, options, prompts, (64, 64), 0, tmp_path)
    assert pool is not None
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


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_rounded_base_leaves_exact(assigned: Path, tmp_path: Path, stored: torch.dtype) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=stored)
    pipe.save_pretrained(tmp_path / "base")
    pairs, _ = read_manifest(assigned / "manifest.jsonl")
    options = SftOptions(**{**LORA, "epochs": 1, "weights_dtype": "bfloat16"})
    generator = load_generator(tmp_path / "base", dtype=torch.bfloat16)
    SftRun(generator, pairs, tmp_path / "1", options).run()
    SftRun(generator, pairs, tmp_path / "2", options).run()  # as the cycles of em do
    weights = tmp_path / "base"
    for folder in (tmp_path / "1", tmp_path / "2"):
        final = folder / "checkpoint-final"
        for part in ("vae", "text_encoder", "text_encoder_2"):
            (old,), (new,) = ((f / part).glob("*.safetensors") for f in (tmp_path / "base", final))
            assert old.read_bytes() == new.read_bytes()
        old, new = (load_file(f / "unet" / UNET_FILE) for f in (weights, final))
        lora = load_file(folder / "lora-final" / LORA_FILE)
        assert old.keys() == new.keys() and {v.dtype for v in new.values()} == {stored}
        for key, value in old.items():
            name = f"unet.{key.removesuffix('.weight')}"
            if f"{name}.lora_A.weight" in lora:
                added = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
                assert added.abs().max() > 0
                value = (value.float() + added).to(stored)
            assert torch.equal(new[key], value)
        weights = final


def test_a_training_of_all_weights_leaves_the_other_parts_as_they_came(
    assigned: Path, tmp_path: Path
) -> None:
    StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=torch.float16).save_pretrained(
        tmp_path / "half"
    )
    pairs, _ = read_manifest(assigned / "manifest.jsonl")
    options = SftOptions(epochs=1, preserve_pool_size=4)
    for base, more, saved in (
        (tmp_path / "half", {"master_weights": True}, "auto"),
        (model_path(), {"dtype": torch.bfloat16}, "bfloat16"),
    ):
        generator = load_generator(base, **more)
        run = tmp_path / f"{base.name} run"
        SftRun(generator, pairs, run, replace(options, save_dtype=saved)).run()
        for name in ("checkpoint-best", "checkpoint-final"):
            kept = load_file(run / name / "unet" / UNET_FILE)
            expected = torch.float16 if saved == "auto" else torch.bfloat16
            assert {v.dtype for v in kept.values()} == {expected}
        held = generator.denoiser.state_dict()  # what goes on is what was saved
        assert all(torch.equal(held[k], v.to(held[k].dtype)) for k, v in kept.items())
        for part in ("vae", "text_encoder", "text_encoder_2"):
            (old,), (new,) = (
                (f / part).glob("*.safetensors") for f in (base, run / "checkpoint-final")
            )
            tensors = [load_file(f) for f in (old, new)]
            assert {k.removeprefix("text_model.") for k in tensors[0]} == {
                k.removeprefix("text_model.") for k in tensors[1]
            }
            for values in zip(*(map(t.get, sorted(t)) for t in tensors), strict=True):
                assert values[0].dtype == values[1].dtype and torch.equal(*values)


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_other_programs_read_the_same_change(
    trained: Trained, tiny: Generator, names: Any, alpha: float | None
) -> None:
    run, generator, _ = trained(alpha, names)
    change = make(generator) - make(tiny)
    path = run / "lora-final" / LORA_FILE
    lora = load_file(path)
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path())
    pipe.load_lora_weights(path.parent)
    theirs = make(SdxlGenerator(pipe)) - make(tiny)
    torch.testing.assert_close(theirs, change, rtol=1e-3, atol=1e-4)
    adapted = [name for name, _ in tiny.denoiser.named_modules() if name.endswith(TARGETS)]
    assert len(lora) == (3 if names == "kohya" else 2) * len(adapted)
    read = [module for module in pipe.unet.modules() if isinstance(module, LoraLayer)]
    assert len(read) == len(adapted) and pipe.get_list_adapters() == {"unet": ["default_0"]}
    if names == "kohya":  # what ComfyUI and A1111 look for, and how they scale
        assert {key.rpartition("lora_unet_")[1] for key in lora} == {"lora_unet_"}
        kinds = {key.partition(".")[2] for key in lora}
        assert kinds == {"lora_down.weight", "lora_up.weight", "alpha"}
        modules = {key.partition(".")[0] for key in lora}
        start = "transformer_blocks_0_attn1_to_out_0"
        assert f"lora_unet_middle_block_1_{start}" in modules
        assert f"lora_unet_input_blocks_3_1_{start}" in modules
        assert f"lora_unet_output_blocks_0_1_{start}" in modules
        assert {lora[f"{name}.alpha"].item() for name in modules} == {alpha or 4.0}
        return
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in lora)
    network = copy.deepcopy(tiny.denoiser)  # peft itself, which knows no alpha of a file
    network.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(TARGETS)))
    bare = {key.removeprefix("unet."): value for key, value in lora.items()}
    wrong = set_peft_model_state_dict(network, bare)
    assert not wrong.unexpected_keys
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path(), unet=network)
    torch.testing.assert_close(make(SdxlGenerator(pipe)) - make(tiny), change, rtol=1e-3, atol=1e-4)


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    for name in ("1", "2"):
        network = copy.deepcopy(load_generator("tiny").denoiser)
        add_adapter(network, 4, None)
        weights = [(k, p) for k, p in network.named_parameters() if ".lora_" in k]
        random.Random(name).shuffle(weights)
        write_adapter("unet", dict(weights), defaultdict(lambda: 1.0), tmp_path / name)
    files = [(tmp_path / name / LORA_FILE).read_bytes() for name in ("1", "2")]
    assert files[0] == files[1]


def test_an_average_of_the_adapter_and_a_second_training_go_on(
    assigned: Path, tmp_path: Path
) -> None:
    generator, first = train(assigned, tmp_path / "1", use_ema=True, ema_decay=0.5)
    options = SftOptions(**{**LORA, "epochs": 1})
    pairs, _ = read_manifest(assigned / "manifest.jsonl")
    second = SftRun(generator, pairs, tmp_path / "2", options).run()
    assert second["matched_loss_before"] == pytest.approx(first["matched_loss_after"], rel=1e-4)
    assert json.loads((tmp_path / "2" / "summary.json").read_text())["steps"] == 2


def test_a_training_goes_on_with_an_adapter(assigned: Path, tmp_path: Path) -> None:
    train(assigned, tmp_path / "1", lora_alpha=2.0, lora_format="kohya", epochs=1)
    path, pairs = tmp_path / "1" / "lora-final", read_manifest(assigned / "manifest.jsonl")[0]
    options = SftOptions(lora_from=path, lr=5e-3, preserve_pool_size=4, epochs=1)
    generator = load_generator("tiny", master_weights=True)
    for wrong in ({"lora_rank": 8}, {"lora_alpha": 3.0}):
        with pytest.raises(UserError, match=f"lora-final has .* leave --{next(iter(wrong))} out"):
            SftRun(generator, pairs, tmp_path, replace(options, **wrong))
    run = SftRun(generator, pairs, tmp_path / "2", options)
    assert (run.options.lora_rank, run.options.lora_alpha) == (4, 2.0)
    assert "trained parameters" in str(run.plan())
    start = generator.read_adapter(path)
    second = run.run()
    noted = second["settings"]
    assert len(noted["lora_from"]) == 64 and noted["lora_rank"] == 4
    end = load_file(tmp_path / "2" / "lora-final" / LORA_FILE)
    assert len(end) == len(start.weights)
    for name, value in start.weights.items():
        scale = 0.5 if "lora_B" in name else 1.0  # this file's format has the scale in B
        change = end[f"unet.{name.replace('.default', '')}"] - scale * value
        assert 0 < change.abs().max() < 0.05
    losses = [json.loads((tmp_path / k / "history.jsonl").read_text())["matching"] for k in "12"]
    assert losses[1] < 0.98 * losses[0]
    base, final = load_generator("tiny"), load_generator(tmp_path / "2" / "checkpoint-final")
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "2" / "lora-final")
    theirs = make(SdxlGenerator(pipe)) - make(base)
    torch.testing.assert_close(make(final) - make(base), theirs, rtol=1e-2, atol=2e-3)


def test_the_adapters_of_all_cycles_make_the_final_generator(
    small_data: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    flags = f"--heldout_root {small_data} --max_samples 6 --assign_steps 1 --train_epochs 1"
    flags += " --train_lr 5e-3 --eval_samples 10 --num_images 0 --train_lora_rank 4 --work_dir"
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
        SftOptions(lora_format="kohya"),
    ):
        with pytest.raises(UserError, match="lora"):
            options.check()
    with pytest.raises(UserError, match="takes no adapter"):
        add_adapter(nn.Linear(2, 2), 4, None)


def test_a_small_generator_takes_none_of_it(tmp_path: Path) -> None:
    toy = ToyGenerator(ToyConfig(("a",), 8, (3, 1, 1)))
    with pytest.raises(UserError, match="leave --save_dtype out"):
        toy.save_dtype = torch.float16
    with pytest.raises(UserError, match="leave --lora_from out"):
        toy.read_adapter(tmp_path)
    toy.save(tmp_path / "toy")
    with pytest.raises(UserError, match="takes no LoRA"):
        load_generator(tmp_path / "toy", lora=(LoraFile(tmp_path),))
