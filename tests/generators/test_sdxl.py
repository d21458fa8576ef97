"""The one-step generator: equal to diffusers' own pipeline, kept on disk, refused where it must."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from oneshot_fast.embedded.pipeline import model_path
from oneshot_fast.errors import ModelError
from oneshot_fast.generators import pipeline
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.sdxl import SdxlGenerator

PROMPTS = ["a handwritten digit three", "the number 7 in blue ink"]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    """The embedded pipeline, loaded by diffusers alone."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    """Equal to float32 rounding, relative to the largest value."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, EulerDiscreteScheduler])
def test_one_step_equals_the_pipeline(
    pipe: StableDiffusionXLPipeline, scheduler: Any, prediction: str, size: tuple[int, int]
) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    generator = SdxlGenerator(pipe)
    eps = noise(2, *generator.latent_shape(*size))
    arguments = {
        "prompt": PROMPTS, "num_inference_steps": 1, "guidance_scale": 0.0, "latents": eps,
        "height": size[0], "width": size[1],
    }  # fmt: skip
    with torch.no_grad():
        latents = generator.latents(eps, generator.encode_prompts(PROMPTS))
        expected = pipe(**arguments, output_type="latent").images
        images = pipe(**arguments, output_type="pt").images
    close(latents, expected)
    torch.testing.assert_close(generator.decode(latents), images, rtol=0, atol=1e-4)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipe.scheduler.config, prediction_type="epsilon"
    )


def test_the_step_is_differentiable_in_the_noise(tiny: Generator) -> None:
    eps = noise(1, 4, 8, 8).requires_grad_()
    prompts = tiny.encode_prompts(PROMPTS[:1])
    direction = noise(1, 4, 8, 8, seed=1)
    (gradient,) = torch.autograd.grad((tiny.latents(eps, prompts) * direction).sum(), eps)
    tangent, h = noise(1, 4, 8, 8, seed=2), 1e-3
    with torch.no_grad():
        ahead, behind = (tiny.latents(eps + s * h * tangent, prompts) for s in (1, -1))
    slope = ((ahead - behind) * direction).sum().item() / (2 * h)
    assert (gradient * tangent).sum().item() == pytest.approx(slope, rel=0.02, abs=0.05)


def test_images_and_latents_have_matching_shapes(tiny: Generator) -> None:
    image = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(0))
    latent = tiny.encode_image(image)
    assert latent.shape == tiny.latent_shape(48, 80) == (4, 6, 10)
    decoded = tiny.decode(latent[None])
    assert decoded.shape == (1, 3, 48, 80)
    assert decoded.min() >= 0 and decoded.max() <= 1
    raw = tiny.decode_raw(latent[None])
    torch.testing.assert_close((raw / 2 + 0.5).clamp(0, 1), decoded, rtol=0, atol=1e-5)


def test_prompts_do_not_depend_on_their_neighbours(tiny: Generator) -> None:
    both, one = tiny.encode_prompts([*PROMPTS, PROMPTS[0]]), tiny.encode_prompts(PROMPTS[:1])
    assert torch.equal(both.embeds[0], one.embeds[0]) and torch.equal(both.embeds[0:1], one.embeds)
    assert torch.equal(both.pooled[2], one.pooled[0])
    assert not tiny.is_truncated(PROMPTS[0]) and tiny.is_truncated("a digit " * 60)


def test_prompts_are_kept_up_to_a_number(tiny: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "prompts_kept", 4)
    assert len(tiny.encode_prompts([f"digit {k}" for k in range(9)]).pooled) == 9
    tiny.encode_prompts(["digit 8", "another digit"])
    monkeypatch.setattr(tiny, "_encode_prompt", None)  # a prompt that is not kept would need it
    tiny.encode_prompts([f"digit {k}" for k in (6, 7, 8)])
    with pytest.raises(TypeError):
        tiny.encode_prompts(["digit 5"])


def test_prompts_that_are_too_many_for_memory_lie_on_the_disk(
    tiny: Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts = [f"digit {k}" for k in range(9)]
    expected = tiny.encode_prompts(prompts)
    monkeypatch.setattr(pipeline, "_PROMPT_BYTES", 3 * expected.select([0]).embeds.nbytes)
    monkeypatch.setattr(tiny, "prompts_kept", tiny.prompts_kept)
    with tiny.kept_prompts(prompts, tmp_path / "prompts"):
        assert len(tiny._prompts) == tiny.prompts_kept < 4
        with monkeypatch.context() as patch:
            patch.setattr(tiny, "_encode_prompt", None)
            assert torch.equal(tiny.encode_prompts(prompts).embeds, expected.embeds)
    assert tiny._cache is None and len([*(tmp_path / "prompts").rglob("*.safetensors")]) == 9


def test_a_half_precision_vae_is_decoded_as_the_pipeline_does(pipe: Any) -> None:
    expected = SdxlGenerator(pipe).decode(noise(1, 4, 8, 8))
    config = {**pipe.vae.config, "force_upcast": True}
    vae = type(pipe.vae).from_config(config)
    vae.load_state_dict(pipe.vae.state_dict())
    for precision in ({}, {"autocast": torch.float16}):
        half = vae if precision else vae.half()
        generator = SdxlGenerator(
            StableDiffusionXLPipeline(**{**pipe.components, "vae": half}), **precision
        )
        assert half.dtype == torch.float32
        torch.testing.assert_close(
            generator.decode(noise(1, 4, 8, 8)), expected, rtol=0, atol=2e-2 if not precision else 0
        )
        vae.load_state_dict(pipe.vae.state_dict())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_saved_generator_loads_equal(
    tiny: Generator, tmp_path: Path, variant: str | None
) -> None:
    copy.deepcopy(tiny).save(tmp_path / "saved")
    again = load_generator(tmp_path / "saved", variant=variant)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        old, new = (getattr(g.pipe, part).state_dict() for g in (tiny, again))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert again.fingerprint() == tiny.fingerprint()
    eps = noise(1, 4, 8, 8)
    with torch.no_grad():
        latents = [g.latents(eps, g.encode_prompts(PROMPTS[:1])) for g in (tiny, again)]
    assert torch.equal(*latents)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_the_fingerprint_changes_with_every_tensor(tiny: Generator, part: str) -> None:
    before = tiny.fingerprint()
    for parameter in (*getattr(tiny.pipe, part).parameters(),)[:: 1 if part == "unet" else 9]:
        kept = parameter.detach().clone()
        parameter.data[(0,) * parameter.ndim] += 1e-3
        assert tiny.fingerprint() != before
        parameter.data.copy_(kept)
    assert tiny.fingerprint() == before


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_text_encoder(folder: Path) -> None:
    path = folder / "model_index.json"
    index = {k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_2")}
    path.write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))


def drop_weight(path: Path) -> None:
    tensors = load_file(path)
    del tensors["conv_out.bias"]
    save_file(tensors, path, metadata={"format": "pt"})


def quantise(path: Path) -> None:
    tensors = load_file(path)
    tensors["conv_out.weight"] = tensors["conv_out.weight"].to(torch.int8)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, "no model_index.json"),
    "no model_index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "leading": (
        lambda f: edit(f / "scheduler/scheduler_config.json", timestep_spacing="leading"),
        'starts at timestep 0, .*set "timestep_spacing": "trailing"',
    ),
    "sample prediction": (
        lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="sample"),
        "whose single step cannot be taken: prediction_type not implemented yet: sample",
    ),
    "DDIM": (
        lambda f: edit(f / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        'DDIMScheduler, whose single step is not linear in noise and output \\("clip_sample": True',
    ),
    "SD1.5": (drop_text_encoder, "told of more than text"),
    "LCM": (
        lambda f: edit(f / "unet/config.json", time_cond_proj_dim=8),
        "incomplete: unet has no time_embedding.cond_proj.weight",
    ),
    "another class": (
        lambda f: edit(f / "model_index.json", _class_name="KandinskyPipeline"),
        "it is a KandinskyPipeline, and only these are known: .*StableDiffusionXLPipeline",
    ),
    "no text_time": (
        lambda f: edit(
            f / "unet/config.json", addition_embed_type=None, class_embed_type="identity"
        ),
        "no text_time conditioning",
    ),
    "corrupt weights": (
        lambda f: truncate(f / "unet/diffusion_pytorch_model.safetensors"), "safetensors|[Dd]eseri"
    ),
    "missing weight": (
        lambda f: drop_weight(f / "unet/diffusion_pytorch_model.safetensors"),
        "incomplete: unet has no conv_out.bias",
    ),
    "noise": (
        lambda f: (
            edit(f / "scheduler/scheduler_config.json", variance_type="fixed_large"),
            edit(f / "scheduler/scheduler_config.json", clip_sample=False),
            edit(f / "model_index.json", scheduler=["diffusers", "DDPMScheduler"]),
        ),
        'DDPMScheduler, whose single step adds noise at its end \\("variance_type": fixed_large',
    ),
    "git-lfs": (
        lambda f: (
            (f / "unet/diffusion_pytorch_model.safetensors").unlink(),
            (f / "unet/diffusion_pytorch_model.bin").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
            ),
        ),
        "diffusion_pytorch_model.bin is a git-lfs pointer, .*git lfs pull",
    ),
    "HTML": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_text("<!DOCTYPE html>\n"),
        "diffusion_pytorch_model.safetensors is a web page",
    ),
    "cut off": (
        lambda f: truncate(f / "vae/diffusion_pytorch_model.safetensors"), "cannot read .*vae/.*"
    ),
    "corrupt config": (
        lambda f: truncate(f / "unet/config.json"), "unet/config.json is damaged: [^/]*$"
    ),
    "config of a list": (
        lambda f: (f / "vae/config.json").write_text("[]"), "vae/config.json is damaged: 'list'"
    ),
    "HTML tokenizer": (
        lambda f: (f / "tokenizer/tokenizer.json").write_text("<!DOCTYPE html>"),
        "tokenizer/tokenizer.json is a web page, not the file",
    ),
    "git-lfs index": (
        lambda f: (f / "model_index.json").write_text("version https://git-lfs.github.com/spec/v1"),
        "model_index.json is a git-lfs pointer",
    ),
    "no class": (
        lambda f: edit(f / "model_index.json", _class_name=None), "model_index.json has no _class_n"
    ),
    "a flow's scheduler": (
        lambda f: edit(
            f / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]
        ),
        "FlowMatchEulerDiscreteScheduler, which a StableDiffusionXLPipeline does not take",
    ),
    "quantised": (
        lambda f: quantise(f / "unet/diffusion_pytorch_model.safetensors"),
        "unet is quantised: conv_out.weight is of I8; take its own weights",
    ),
    "a file": (
        lambda f: (shutil.rmtree(f), f.write_text("PK")), "of single files only .safetensors are re"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_models_are_refused_in_one_line(tmp_path: Path, call: Any, name: str) -> None:
    spoil, message = WRONG[name]
    folder = shutil.copytree(model_path(), tmp_path / "model")
    spoil(folder)
    image = tmp_path / "image.png"
    image.touch()
    ended = call(
        "assign", "--model_id", folder, "--output_dir", tmp_path / "out", "--prompt", "a digit",
        "--target_image_path", image,
    )  # fmt: skip
    assert ended.code == 2 and not (tmp_path / "out").exists()
    assert re.search(f"cannot use model {re.escape(str(folder))}: .*({message})", ended.error)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "xla", "meta"])
def test_a_missing_device_is_refused_in_one_line(device: str) -> None:
    with pytest.raises(ModelError, match=f"^cannot use device {device}; here are: cpu") as caught:
        load_generator("tiny", device=device)
    assert len(str(caught.value)) < 150


def test_cut_prompts_are_counted_once_and_the_first_is_named(
    tiny: Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    generator = copy.deepcopy(tiny)
    long = "a digit " * 200
    generator.warn_of_cut([PROMPTS[0], long, long + "two", long])
    said = capfd.readouterr().err
    assert said.startswith("warning: 2 prompts are longer than 77 tokens; cut off, the first of ")
    assert '"a digit a digit' in said and len(said) < 200
    generator.warn_of_cut([long, PROMPTS[0]])
    assert not capfd.readouterr().err
