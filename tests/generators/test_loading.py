"""Generators from folders and from single files in the layout of SDXL's own release."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from oneshot_fast.embedded.pipeline import model_path
from oneshot_fast.errors import ModelError, UserError
from oneshot_fast.generators import original_layout
from oneshot_fast.generators.layouts import SDXL
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.run import SftRun


def in_original_layout(pipe: StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """Weights under the names of SDXL's single-file release (generative-models, open_clip)."""
    unet = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip
    vae: dict[str, str] = {}
    per = pipe.unet.config.layers_per_block + 1
    for b in range(len(pipe.unet.config.down_block_types)):
        for j in range(per):
            for kind, place in (("resnets", 0), ("attentions", 1)):
                unet[f"down_blocks.{b}.{kind}.{j}"] = f"input_blocks.{b * per + 1 + j}.{place}"
                unet[f"up_blocks.{b}.{kind}.{j}"] = f"output_blocks.{b * per + j}.{place}"
        unet[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{b * per + per}.0.op"
        place = 2 if hasattr(pipe.unet.up_blocks[b], "attentions") else 1
        unet[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{b * per + per - 1}.{place}.conv"
    blocks = len(pipe.vae.config.down_block_types)
    for b in range(blocks):
        vae[f"down_blocks.{b}.resnets"] = f"down.{b}.block"
        vae[f"down_blocks.{b}.downsamplers.0"] = f"down.{b}.downsample"
        vae[f"up_blocks.{b}.resnets"] = f"up.{blocks - 1 - b}.block"
        vae[f"up_blocks.{b}.upsamplers.0"] = f"up.{blocks - 1 - b}.upsample"
    vae |= {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1", "conv_norm_out": "norm_out", ".group_norm": ".norm",
        "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
        "conv_shortcut": "nin_shortcut",
    }  # fmt: skip
    resnet = {".norm1": ".in_layers.0", ".conv1": ".in_layers.2", ".norm2": ".out_layers.0",
        ".conv2": ".out_layers.3", ".time_emb_proj": ".emb_layers.1",
        ".conv_shortcut": ".skip_connection",
    }  # fmt: skip
    clip = {"encoder.layers": "resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
        ".fc1": ".c_fc", ".fc2": ".c_proj", "self_attn": "attn",
    }  # fmt: skip

    def renamed(name: str, names: dict[str, str]) -> str:
        for old, new in names.items():
            name = re.sub(rf"{re.escape(old)}(?=\.|$)", new, name)
        return name

    tensors = {}
    for name, value in pipe.unet.state_dict().items():
        is_resnet = ".resnets." in name
        name = renamed(name, {**unet, **(resnet if is_resnet else {})})
        tensors[f"model.diffusion_model.{name}"] = value
    for name, value in pipe.vae.state_dict().items():
        is_projection = value.ndim == 2  # the attention was written as 1 x 1 convolutions
        tensors[f"first_stage_model.{renamed(name, vae)}"] = (
            value[..., None, None] if is_projection else value
        )
    for name, value in pipe.text_encoder.state_dict().items():
        name = name.removeprefix("text_model.")
        tensors[f"conditioner.embedders.0.transformer.text_model.{name}"] = value
    second = {k.removeprefix("text_model."): v for k, v in pipe.text_encoder_2.state_dict().items()}
    start = "conditioner.embedders.1.model."
    tensors[start + "text_projection"] = second.pop("text_projection.weight").T
    tensors[start + "positional_embedding"] = second.pop("embeddings.position_embedding.weight")
    tensors[start + "token_embedding.weight"] = second.pop("embeddings.token_embedding.weight")
    for kind in ("weight", "bias"):
        tensors[f"{start}ln_final.{kind}"] = second.pop(f"final_layer_norm.{kind}")
        for i in range(pipe.text_encoder_2.config.num_hidden_layers):
            rows = [second.pop(f"encoder.layers.{i}.self_attn.{x}_proj.{kind}") for x in "qkv"]
            tensors[f"{start}transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(rows)
    for name, value in second.items():
        tensors[f"{start}transformer.{renamed(name, clip)}"] = value
    return {name: value.contiguous() for name, value in tensors.items()}


@dataclass(frozen=True)
class Forms:
    """One model as a folder and as a single file."""

    folder: Path
    file: Path

    def spoiled(self, place: Path, metadata: dict[str, str] | None = None, **more: Any) -> Path:
        """A copy of the file with another header, and tensors added, or taken away by None."""
        tensors = load_file(self.file) | {k.replace("__", "."): v for k, v in more.items()}
        save_file({k: v for k, v in tensors.items() if v is not None}, place, metadata)
        return place

    def config(self, place: Path, **scheduler: Any) -> str:
        """A copy of the folder, for --model_config, whose scheduler says other things."""
        path = shutil.copytree(self.folder, place) / "scheduler/scheduler_config.json"
        said = {**json.loads(path.read_text()), **scheduler}
        path.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
        index = place / "model_index.json"
        named = {"scheduler": ["diffusers", said["_class_name"]]}
        index.write_text(json.dumps({**json.loads(index.read_text()), **named}))
        return str(place)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """The embedded model with a second text encoder that diffusers tells from the first."""
    place = tmp_path_factory.mktemp("forms")
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=torch.float32)
    # diffusers tells the two text encoders of a single file apart by their widths.
    width = 2 * pipe.text_encoder.config.hidden_size
    config = {"hidden_size": width, "projection_dim": width, "intermediate_size": width}
    second = CLIPTextModelWithProjection(
        type(pipe.text_encoder_2.config)(**{**pipe.text_encoder_2.config.to_dict(), **config})
    )
    widths = {
        "cross_attention_dim": pipe.text_encoder.config.hidden_size + width,
        "projection_class_embeddings_input_dim": 6 * pipe.unet.config.addition_time_embed_dim
        + width,
    }
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, **widths})
    wide = StableDiffusionXLPipeline(
        **{**pipe.components, "unet": unet, "text_encoder_2": second.eval()}
    )
    wide.save_pretrained(place / "folder")
    save_file(in_original_layout(wide), place / "model.safetensors")
    return Forms(place / "folder", place / "model.safetensors")


def test_a_single_file_loads_like_the_folder(forms: Forms, tmp_path: Path) -> None:
    single = load_generator(forms.file, model_config=str(forms.folder))
    folder = load_generator(forms.folder)
    prompts = ["a handwritten digit three", "the number 7 in blue ink"]
    eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = [g.latents(eps, g.encode_prompts(prompts)) for g in (single, folder)]
        images = [g.decode(latents[1]) for g in (single, folder)]
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)
    assert single.fingerprint() == folder.fingerprint()
    with pytest.raises(ModelError, match="no such file"):
        load_generator(tmp_path / "other.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(forms.file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"^cannot use model [^\n]+$"):
        load_generator(cut, model_config=str(forms.folder))


def test_one_file_is_written_that_diffusers_reads_bit_by_bit(
    forms: Forms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator: Any = load_generator(forms.folder)
    generator.save_dtype = torch.float16
    generator.save(tmp_path / "saved")
    generator.save_single_file(tmp_path / "saved")
    path = tmp_path / "saved.safetensors"
    pipe = StableDiffusionXLPipeline.from_pretrained(forms.folder)
    single = StableDiffusionXLPipeline.from_single_file(str(path), config=str(forms.folder))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        old, new = (getattr(p, part).state_dict() for p in (pipe, single))
        assert old.keys() == new.keys()
        kind = torch.float16 if part == "unet" else torch.float32
        assert all(torch.equal(old[k].to(kind).float(), new[k].float()) for k in old), part
    tensors = load_file(path)
    assert tensors.keys() == load_file(forms.file).keys()
    assert {v.dtype for k, v in tensors.items() if "diffusion_model" in k} == {torch.float16}
    assert {v.dtype for k, v in tensors.items() if "first_stage" in k} == {torch.float32}
    ours = load_generator(path, model_config=str(forms.folder))
    assert ours.fingerprint() == load_generator(tmp_path / "saved").fingerprint()
    # it is not written where diffusers would read other weights
    monkeypatch.setitem(original_layout._RESNET, "conv1", "in_layers.3")
    with pytest.raises(ModelError, match=r"no place for its unet's .*conv1"):
        generator.save_single_file(tmp_path / "saved")


def test_v_prediction_is_written_in_the_one_file(forms: Forms, tmp_path: Path) -> None:
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    folder = Path(forms.config(tmp_path / "v", **said, timestep_spacing="trailing"))
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    networks = {part: getattr(pipe, part) for part in SDXL.prefixes}
    original_layout.write_single_file(networks, tmp_path / "v.safetensors", SDXL, pipe.scheduler)
    silent = forms.config(tmp_path / "silent", prediction_type=None, rescale_betas_zero_snr=None)
    read = load_generator(tmp_path / "v.safetensors", model_config=silent)
    found: Any = read.pipe.scheduler.config  # type: ignore[attr-defined]
    assert {key: found[key] for key in said} == said


def test_one_file_is_refused_where_it_would_be_read_as_another_model(
    forms: Forms, tmp_path: Path, tiny: Any
) -> None:
    with pytest.raises(UserError, match="encoders are both 32 wide"):
        tiny.check_single_file()
    before = load_generator(forms.folder)
    before.check_single_file()
    for kind, config, start in (
        (EulerDiscreteScheduler, {"prediction_type": "sample"}, None),
        (EulerDiscreteScheduler, {"rescale_betas_zero_snr": True}, None),
        (LCMScheduler, {}, None),
        (LCMScheduler, {}, 399.0),
    ):
        pipe = copy.copy(before.pipe)  # type: ignore[attr-defined]
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **config)
        generator = SdxlGenerator(pipe, start=start)
        target = TargetImages(generator, 64)
        with pytest.raises(UserError, match=f"with that of its {kind.__name__}.*leave --save_sing"):
            SftRun(generator, [], tmp_path, SftOptions(save_single_file=True), targets=target)


def test_training_writes_the_one_file(
    forms: Forms, assigned: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    flags = ["--manifest_path", assigned / "manifest.jsonl", "--epochs", 1, "--save_single_file"]
    flags += ["--preserve_pool_size", 4, "--output_dir", tmp_path / "run", "--model_id"]
    assert call("sft", *flags, forms.folder).code == 0
    for name in ("checkpoint-best", "checkpoint-final"):
        one = load_generator(tmp_path / f"run/{name}.safetensors", model_config=str(forms.folder))
        assert one.fingerprint() == load_generator(tmp_path / "run" / name).fingerprint()


MARK = torch.tensor([])
V = {"modelspec.prediction_type": "v"}


@pytest.mark.parametrize("marks", [{"v_pred": MARK}, {"v_pred": MARK, "ztsnr": MARK}, V], ids=str)
def test_what_a_file_says_of_itself_is_used(
    forms: Forms, tmp_path: Path, marks: dict[str, Any]
) -> None:
    tensors = {key: value for key, value in marks.items() if key not in V}
    metadata = {key: value for key, value in marks.items() if key in V}
    file = forms.spoiled(tmp_path / "v.safetensors", metadata, **tensors)
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in marks}
    silent = dict.fromkeys(said)  # a config that says nothing
    made = []
    for name, config in (("silent", silent), ("agreeing", said)):
        generator = load_generator(file, model_config=forms.config(tmp_path / name, **config))
        eps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made.append(generator.latents(eps, generator.encode_prompts(["a digit"])))
    folder = load_generator(forms.config(tmp_path / "folder", **said))
    with torch.no_grad():
        expected = folder.latents(eps, folder.encode_prompts(["a digit"]))
    for latents in made:
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_a_file_that_predicts_the_image_is_known_by_its_name(forms: Forms, tmp_path: Path) -> None:
    file = forms.spoiled(tmp_path / "sdxl_lightning_1step_x0.safetensors", {})
    euler = {"_class_name": "EulerDiscreteScheduler", "prediction_type": None}
    silent = forms.config(tmp_path / "config", **euler)
    step = load_generator(file, model_config=silent).step  # type: ignore[attr-defined]
    assert (step.skip, step.sigma) == (0, -1)


def test_a_scheduler_that_was_given_stays(forms: Forms, tmp_path: Path) -> None:
    for kind in ("EulerDiscreteScheduler", "LCMScheduler"):
        config = forms.config(tmp_path / kind, _class_name=kind)
        file, folder = (
            load_generator(place, several_steps=True, **more).pipe.scheduler  # type: ignore[attr-defined]
            for place, more in ((forms.file, {"model_config": config}), (config, {}))
        )
        assert type(file).__name__ == kind and dict(file.config) == dict(folder.config)
    leading = forms.config(tmp_path / "leading", timestep_spacing="leading")
    said = []
    for place, more in ((forms.file, {"model_config": leading}), (leading, {})):
        with pytest.raises(ModelError, match=r'starts at timestep 0, .*"trailing"') as caught:
            load_generator(place, **more)
        said.append(str(caught.value).replace(str(place), ""))
    assert said[0] == said[1]


CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "v_pred": ({"v_pred": MARK}, {}, "tensor v_pred says .*v_prediction, and --model_config"),
    "header": ({"metadata": V}, {}, r"modelspec.prediction_type\) says .*, and --model_config "),
    "ztsnr": ({"ztsnr": MARK}, {"prediction_type": None}, "ztsnr says .*True, and --model_config"),
    "ztsnr epsilon": ({"ztsnr": MARK}, {"rescale_betas_zero_snr": None}, "ztsnr says .*v_pred"),
    "epsilon": (
        {"metadata": {"modelspec.prediction_type": "epsilon"}},
        {"prediction_type": "v_prediction"},
        "says prediction_type epsilon, and --model_config .* says v_prediction",
    ),
    "both": (
        {"v_pred": MARK, "metadata": {"modelspec.prediction_type": "epsilon"}}, {},
        "tensor v_pred says .* and its header",
    ),
    "edm": ({"edm_mean": MARK}, {}, "edm_.*not of this form"),
    "flux": ({"metadata": {"modelspec.architecture": "flux-1-dev"}}, {}, "is flux-1-dev, but"),
    "lora": (
        {"metadata": {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}}, {}, "/lora"
    ),
    "DDIM": ({}, {"_class_name": "DDIMScheduler", "clip_sample": True}, "DDIM.*clip_sample"),
    "missing": (
        {"conditioner__embedders__1__model__text_projection": None}, {},
        "incomplete: text_encoder_2 has no text_projection.weight",
    ),
    "left over": (
        {"model__diffusion_model__time_embed__cond_proj__weight": torch.ones(64, 8)}, {},
        "unet has no use for model.diffusion_model.time_embed.cond_proj.weight",
    ),
    "left over, of a known size": (
        {"first_stage_model__extra": torch.ones(16)}, {}, "vae has no use for first_stage_model.e"
    ),
    "shape": ({"model__diffusion_model__out__2__bias": torch.ones(5)}, {}, "conv_out.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_file_that_contradicts_is_refused(forms: Forms, tmp_path: Path, name: str) -> None:
    changes, scheduler, message = CONTRADICTIONS[name]
    config = forms.config(tmp_path / "config", **scheduler)
    file = forms.spoiled(tmp_path / "model.safetensors", **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_generator(file, model_config=config)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_configs_of_another_pipeline_are_refused(forms: Forms, tmp_path: Path) -> None:
    config = Path(forms.config(tmp_path / "config"))
    said = json.loads((config / "model_index.json").read_text())
    said["_class_name"] = "StableDiffusionPipeline"
    (config / "model_index.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="is of a StableDiffusionPipeline, the file is read as a"):
        load_generator(forms.file, model_config=str(config))


def test_configs_are_those_of_the_file_among_several_models(
    forms: Forms, small_data: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    flags = ["--data_root", small_data, "--output_dir", tmp_path / "run", "--eval_samples", 10]
    flags += ["--model_config", forms.folder, "--model_id", forms.folder]
    ended = call("evaluate", *flags)
    assert ended.code == 2 and "--model_config is for a .safetensors file" in ended.error
    assert call("evaluate", *flags, forms.file).code == 0


def change(path: Path, key: str, value: Tensor | None) -> None:
    tensors = load_file(path) | {key: value}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, {"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_weights_that_do_not_fit_a_folder_are_named(tmp_path: Path, part: str) -> None:
    for number, (value, message) in enumerate((
        (None, "incomplete: {0} has no {1}"),
        (torch.ones(3, 3), r"another model: {0} has {1} of shape \[3, 3\], not \["),
    )):  # fmt: skip
        folder = shutil.copytree(model_path(), tmp_path / f"{number}")
        (path,) = (folder / part).glob("*.safetensors")
        key = sorted(load_file(path))[-1]
        change(path, key, value)
        with pytest.raises(ModelError, match=message.format(part, key)):
            load_generator(folder)
    (path,) = (shutil.copytree(model_path(), tmp_path / "more") / part).glob("*.safetensors")
    change(path, "more.weight", torch.ones(3))
    with pytest.raises(ModelError, match=f"another model: {part} has an unknown more.weight"):
        load_generator(tmp_path / "more")


def test_a_folder_that_has_only_fp16_files_is_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16")
    generator = load_generator(tmp_path / "fp16")
    assert "only" in (said := capfd.readouterr().err) or "no other files of" in said
    assert "unet (fp16)" in said and "vae (fp16)" in said
    load_generator(tmp_path / "fp16", variant="fp16")
    assert "other files" not in capfd.readouterr().err
    expected = load_generator("tiny").denoiser.state_dict()
    found = generator.denoiser.state_dict()
    assert all(torch.equal(v.half().float(), found[k]) for k, v in expected.items())
    generator.save(tmp_path / "saved")  # the untrained parts leave as they came
    for part in ("vae", "text_encoder", "text_encoder_2"):
        (old,) = (tmp_path / "fp16" / part).glob("*.safetensors")
        (new,) = (tmp_path / "saved" / part).glob("*.safetensors")
        assert old.read_bytes() == new.read_bytes()


def test_dangling_links_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-final").symlink_to("cycle-02/sft/checkpoint-final")
    with pytest.raises(ModelError, match=r"checkpoint-final is a link to cycle-02/.*not there"):
        load_generator(tmp_path / "checkpoint-final")
    folder = shutil.copytree(model_path(), tmp_path / "hub")
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.unlink()
    path.symlink_to("../../blobs/0a1b")
    with pytest.raises(ModelError, match=r"is a link to .*blobs/0a1b"):
        load_generator(folder)
    (tmp_path / "file.safetensors").symlink_to("nowhere")
    with pytest.raises(ModelError, match="is a link to nowhere"):
        load_generator(tmp_path / "file.safetensors")
