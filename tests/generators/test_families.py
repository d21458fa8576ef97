"""Every family of pipelines: equal to diffusers' own call, differentiable, trained and saved."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from double_precision import float64_stays
from family_samples import CALLS, FAMILIES, SCHEDULERS, WIDTH, family, side_of, tiny_pipeline
from safetensors.torch import save_file
from single_files import narrow_flux
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from oneshot_fast.data.images import to_pil
from oneshot_fast.errors import ModelError, UserError
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.lora_files import LoraFile
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.generators.pipeline import PipelineGenerator
from oneshot_fast.planning.memory import fake_copy

PROMPTS = ["a photo of paper", "thick white ink"]
# the embedded model is of the shape of SDXL; LCMs, who draw noise between steps, take two here
TRAINED = [name for name in FAMILIES if name != "StableDiffusionXLPipeline"]
# these are written as one file, whole, or the transformer alone
WHOLE = ("StableDiffusionPipeline", "StableDiffusion3Pipeline")
ONE_FILE = (*WHOLE, "FluxPipeline", "ZImagePipeline")


def called(pipe: Any, eps: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] that diffusers makes of noises in one step."""
    name, side = type(pipe).__name__, side_of(type(pipe).__name__)
    given = pipe._pack_latents(eps, *eps.shape) if name == "FluxPipeline" else eps.clone()
    with torch.no_grad():
        return pipe(
            [*PROMPTS], num_inference_steps=1, latents=given, height=side, width=side,
            output_type="pt", **CALLS[name],
        ).images  # fmt: skip


def from_one_file(pipe: Any, file: Path, folder: Path) -> Any:
    """What diffusers alone makes of the one file of a pipeline, and of a folder for the rest."""
    kind, place = type(pipe), {"config": str(folder)}
    if kind.__name__ in WHOLE:
        single = kind.from_single_file(str(file), **place)
        for part in single.components.values():  # diffusers 0.42 leaves T5 in training mode
            if isinstance(part, torch.nn.Module):
                part.eval()
    else:
        read = type(pipe.transformer).from_single_file
        transformer = read(str(file), subfolder="transformer", **place)
        single = kind.from_pretrained(folder, transformer=transformer)
    single.set_progress_bar_config(disable=True)
    return single


def made(generator: PipelineGenerator, eps: Tensor) -> Tensor:
    with torch.no_grad():
        return generator.images(generator.latents(eps, generator.encode_prompts(PROMPTS)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of every class, as diffusers saves it."""
    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        tiny_pipeline(name).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs, too few to hold some out."""
    root = tmp_path_factory.mktemp("pairs")
    rows = []
    for k, prompt in enumerate(PROMPTS):
        to_pil(torch.full((3, 32, 32), 0.3 + 0.4 * k)).save(root / f"{k}.png")
        rows.append({"image": f"{k}.png", "prompt": f"{prompt}, or not"})
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_equals_the_pipeline_with_every_scheduler(name: str) -> None:
    pipe, side = tiny_pipeline(name), side_of(name)
    for kind, config in SCHEDULERS[name]:
        pipe.scheduler = tiny_pipeline(name, kind, **config).scheduler
        generator = family(name)(pipe)
        eps = torch.randn(2, *generator.latent_shape(side, side))
        expected = called(pipe, eps)
        assert expected.std() > 0.05
        torch.testing.assert_close(made(generator, eps), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"pixels is not in multiples of \d+$"):
        generator.latent_shape(side, side + generator.size_multiple // 2)
    conditioning, blank = generator.encode_prompts(PROMPTS), generator.blank_prompts(2)
    for key, value in blank.tensors().items():
        assert value.shape == conditioning.tensors()[key].shape
    assert not generator.is_truncated(PROMPTS[0]) and generator.is_truncated("a digit " * 400)


@pytest.mark.parametrize("name", [name for name in FAMILIES if family(name).is_flow])
def test_a_flow_takes_no_other_scheduler(name: str) -> None:
    pipe = tiny_pipeline(name, LCMScheduler, timestep_spacing="trailing")
    with pytest.raises(ModelError, match="is LCMScheduler, whose single step is not that of a fl"):
        family(name)(pipe)


def test_sana_reads_as_many_tokens_as_its_pipeline() -> None:
    generator: Any = family("SanaSprintPipeline")(tiny_pipeline("SanaSprintPipeline"))
    tokens = len(generator.pipe.tokenizer("a a").input_ids)
    each = tokens - len(generator.pipe.tokenizer("a").input_ids)

    def counts(n: int) -> bool:
        """Whether the last of so many words makes a difference."""
        one, other = (
            generator.encode_prompts(["a " * (n - 1) + word]).embeds for word in ("a", "b")
        )
        return not torch.equal(one, other)

    most = next(n for n in range(1, 400) if generator.is_truncated("a " * n + "a"))
    assert each == 1 and counts(most) and not counts(most + 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_half_precision_vae_stays_so_where_its_pipeline_leaves_it(name: str) -> None:
    pipe = tiny_pipeline(name)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.to(torch.float16)
    family(name)(pipe)
    is_sdxl = name == "StableDiffusionXLPipeline"
    assert pipe.vae.dtype == (torch.float32 if is_sdxl else torch.float16)


def test_flux_without_guidance_reads_256_tokens() -> None:
    pipe = tiny_pipeline("FluxPipeline")
    assert family("FluxPipeline")(pipe).prompt_tokens == 512
    pipe.transformer.register_to_config(guidance_embeds=False)
    generator: Any = family("FluxPipeline")(pipe)
    assert generator.prompt_tokens == 256
    assert generator.is_truncated("a digit " * 200)
    assert generator.encode_prompts(PROMPTS).embeds.shape[1] == 256
    assert generator.blank_prompts(2).embeds.shape[1] == 256


def test_width_is_that_of_the_first_layer() -> None:
    widths = {name: family(name)(tiny_pipeline(name)).width for name in FAMILIES}
    convolved = {name for name in FAMILIES if hasattr(tiny_pipeline(name), "unet")}
    assert widths == {name: 8 if name in convolved else WIDTH for name in FAMILIES}
    assert load_generator("tiny").width == 64


def test_sizes_and_flags_that_a_family_cannot_take_are_refused() -> None:
    sd3 = family("StableDiffusion3Pipeline")(tiny_pipeline("StableDiffusion3Pipeline"))
    assert sd3.latent_shape(64, 64) == (4, 32, 32)
    with pytest.raises(UserError, match="a size of 68 x 64 pixels is above 64, the model's"):
        sd3.latent_shape(64, 68)
    with pytest.raises(UserError, match=r"Z-Image is compiled anew .*; leave --compile out"):
        family("ZImagePipeline")(tiny_pipeline("ZImagePipeline")).compile()


def test_sd3_goes_without_its_third_text_encoder(folders: Path, tmp_path: Path) -> None:
    whole = folders / "StableDiffusion3Pipeline"
    pipe = StableDiffusion3Pipeline.from_pretrained(whole, text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "less")
    generator = load_generator(tmp_path / "less")
    assert isinstance(generator, PipelineGenerator) and "text_encoder_3" not in generator.networks
    eps = torch.randn(2, *generator.latent_shape(16, 16))
    torch.testing.assert_close(made(generator, eps), called(pipe, eps), rtol=0, atol=1e-5)
    assert generator.prompt_tokens == 77 and load_generator(whole).prompt_tokens == 256
    shapes = [
        c.embeds.shape for c in (generator.blank_prompts(2), generator.encode_prompts(PROMPTS))
    ]
    assert shapes[0] == shapes[1]
    generator.save(tmp_path / "saved")
    assert load_generator(tmp_path / "saved").fingerprint() == generator.fingerprint()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_in_the_noise_is_that_of_the_step(name: str) -> None:
    generator = family(name)(tiny_pipeline(name).to(torch.float64))
    conditioning, side = generator.encode_prompts(PROMPTS[:1]), side_of(name)
    eps = torch.randn(1, *generator.latent_shape(side, side), dtype=torch.float64)
    with float64_stays():
        assert torch.autograd.gradcheck(
            lambda eps: generator.latents(eps, conditioning), eps.requires_grad_(), fast_mode=True,
            eps=1e-6, atol=1e-6,
        )  # fmt: skip


def test_a_safety_checker_leaves_with_the_bytes_it_came_with(tmp_path: Path) -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = CLIPConfig(
        vision_config={**small, "num_attention_heads": 1, "image_size": 32, "patch_size": 16},
        text_config={**small, "num_attention_heads": 1}, projection_dim=8,
    )  # fmt: skip
    judge = StableDiffusionSafetyChecker(config)
    more = {"safety_checker": judge, "feature_extractor": CLIPImageProcessor()}
    parts = tiny_pipeline("StableDiffusionPipeline").components
    StableDiffusionPipeline(**{**parts, **more}).save_pretrained(tmp_path / "old")
    load_generator(tmp_path / "old", dtype=torch.bfloat16).save(tmp_path / "new")
    (old,), (new,) = (tmp_path.glob(f"{k}/safety_checker/*.safetensors") for k in ("old", "new"))
    assert old.read_bytes() == new.read_bytes()


def test_a_float16_t5_leaves_with_the_bytes_it_came_with(tmp_path: Path) -> None:
    old = tmp_path / "old"
    tiny_pipeline("StableDiffusion3Pipeline").to(torch.float16).save_pretrained(old)
    rows = {"lora_A": torch.ones(2, WIDTH), "lora_B": torch.ones(WIDTH, 2)}
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{name}.{k}.weight": v for k, v in rows.items()}, tmp_path / "lora.safetensors")
    more = {"lora": (LoraFile(tmp_path / "lora.safetensors"),)}
    for dtype in (torch.float32, torch.float16):
        kinds = []
        for k, lora in enumerate(({}, more)):
            generator: Any = load_generator(old, dtype=dtype, **lora)
            held = generator.networks["text_encoder_3"].named_parameters()
            kinds.append({name: p.dtype for name, p in held})
            new = tmp_path / f"{dtype} {k}"
            generator.save(new)
            for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
                (a,), (b,) = (f.glob(f"{part}/*.safetensors") for f in (old, new))
                assert a.read_bytes() == b.read_bytes()
        assert kinds[0] == kinds[1]  # transformers keeps a part of it in float32
    assert {*kinds[0].values()} == {torch.float16, torch.float32}


def test_bfloat16_files_are_read_again_where_a_class_is_ours(tmp_path: Path) -> None:
    tiny_pipeline("PixArtAlphaPipeline").to(torch.bfloat16).save_pretrained(tmp_path / "old")
    load_generator(tmp_path / "old").save(tmp_path / "new")
    load_generator(tmp_path / "new")
    old, new = (json.loads((tmp_path / k / "model_index.json").read_text()) for k in ("old", "new"))
    assert old["transformer"] == new["transformer"]


def test_a_missing_tokenizer_is_refused(folders: Path, tmp_path: Path) -> None:
    for name, gone in (("StableDiffusionPipeline", "tokenizer"), ("FluxPipeline", "tokenizer_2")):
        folder = shutil.copytree(folders / name, tmp_path / name)
        (folder / gone / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=f"there is no {gone}/tokenizer.json"):
            load_generator(folder)


def test_what_a_decoder_cannot_do_is_refused_or_left_out(folders: Path) -> None:
    for flag in ("decoder_checkpointing", "decoder_tiling"):
        with pytest.raises(UserError, match=f"{flag} is not for an AutoencoderDC"):
            ModelOptions(**{flag: 4}).load(str(folders / "SanaSprintPipeline"))
    with fake_copy(load_generator(folders / "SanaSprintPipeline")) as fake:
        fake.recompute("full")
        eps = torch.randn(2, *fake.latent_shape(64, 64), requires_grad=True)
        fake.images(fake.latents(eps, fake.blank_prompts(2))).mean().backward()
        assert eps.grad is not None and eps.grad.shape == eps.shape


@pytest.mark.parametrize("name", TRAINED)
def test_all_commands_take_it_and_diffusers_reads_what_they_save(
    folders: Path, pairs: Path, tmp_path: Path, call: Any, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    side, model = side_of(name), folders / name
    narrow_flux(monkeypatch)
    one = " --save_single_file" * (name in ONE_FILE)
    steps = "--num_inference_steps 2" if name == "LatentConsistencyModelPipeline" else ""
    file = f"{tmp_path}/em/checkpoint-final.safetensors --model_config {model}"
    commands = {
        "em": f"--initial_model_id {model} --resolution {side} --data_root {pairs} "
        f"--work_dir {tmp_path}/em --num_cycles 1 --assign_steps 1 --train_epochs 1 --num_images 0 "
        "--train_lr 0.1 --preserve_pool_size 2 --eval_samples 10 --train_lora_rank 2" + one,
        "sft": f"--model_id {model} --manifest_path {tmp_path}/em/cycle-01/assign/manifest.jsonl "
        f"--output_dir {tmp_path}/sft --epochs 1 --batch_size 2 --preserve_pool_size 2 --lr 0.01 "
        "--gradient_checkpointing" + one,
        "optimize": f"--model_id {file if one else model} --resolution {side} --num_images 0 "
        f"--output_dir {tmp_path}/best --steps 1 --prompt {PROMPTS[0]!r} "
        "--reward python:optimize_samples.contrast",
    }
    for command, flags in commands.items():
        ended = call(command, *shlex.split(f"{flags} {steps}"))
        assert ended.code == 0, ended.err
    before = load_generator(model)
    eps = torch.randn(2, *before.latent_shape(side, side))
    for saved in (tmp_path / "sft/checkpoint-final", tmp_path / "em/checkpoint-final"):
        pipe = DiffusionPipeline.from_pretrained(saved)
        pipe.set_progress_bar_config(disable=True)
        found = made(load_generator(saved), eps)
        torch.testing.assert_close(found, called(pipe, eps), rtol=0, atol=1e-5)
        assert (found - made(before, eps)).abs().max() > 1e-4
        if one:
            place = model if name in WHOLE else saved
            single = from_one_file(pipe, saved.with_suffix(".safetensors"), place)
            torch.testing.assert_close(called(single, eps), found, rtol=0, atol=1e-5)
    lora = LoraFile.parse(f"{tmp_path}/em/cycle-01/sft/lora-final")
    merged = made(load_generator(model, lora=(lora,)), eps)
    torch.testing.assert_close(merged, found, rtol=0, atol=1e-5)
