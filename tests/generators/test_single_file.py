"""Single files in the layouts of models' own releases: what is written, read and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    EulerDiscreteScheduler,
    FluxTransformer2DModel,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    ZImageTransformer2DModel,
)
from family_samples import WIDTH, family, sd2_pipeline, tiny_pipeline
from safetensors.torch import load_file, save_file
from single_files import narrow_flux
from torch import Tensor

from oneshot_fast.errors import ModelError, UserError
from oneshot_fast.generators.base import LoadOptions
from oneshot_fast.generators.layouts import FLUX, SD1, Z_IMAGE
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.lora_files import LoraFile
from oneshot_fast.generators.original_layout import check_writable, unet_name
from oneshot_fast.generators.sd import SdGenerator
from oneshot_fast.generators.single_file import PipelineFile, scheduler_of_file
from oneshot_fast.runtime.tensor_files import read_header

SD2, SD3 = "StableDiffusionPipeline", "StableDiffusion3Pipeline"
ALONE = {"FluxPipeline": FluxTransformer2DModel, "ZImagePipeline": ZImageTransformer2DModel}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow_flux(monkeypatch)


def written(pipe: Any, root: Path) -> tuple[Path, Path]:
    """A pipeline as diffusers saves it, and as the one file that is written of it."""
    folder = root / type(pipe).__name__
    pipe.save_pretrained(folder)
    generator: Any = load_generator(folder)
    generator.save_single_file(folder)
    return folder, folder.with_suffix(".safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """One of each family, by its pipeline's name; SD2's by that of SD."""
    root = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        narrow_flux(patch)
        pipes = [sd2_pipeline(), *map(tiny_pipeline, (SD3, *ALONE))]
        return {type(pipe).__name__: written(pipe, root) for pipe in pipes}


def spoiled(file: Path, place: Path, *without: str, header: Any = None, **more: Tensor) -> Path:
    """A copy of a file without some tensors, by how they begin, and with others."""
    kept = {k: v for k, v in load_file(file).items() if not (without and k.startswith(without))}
    save_file(kept | {k.replace("__", "."): v for k, v in more.items()}, place, header)
    return place


def without_t5(folder: Path, place: Path) -> Path:
    less = {"text_encoder_3": None, "tokenizer_3": None}
    StableDiffusion3Pipeline.from_pretrained(folder, **less).save_pretrained(place)
    return place


def assert_equal(one: Any, other: Any) -> None:
    old, new = one.state_dict(), other.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_sd1_and_sd2_are_one_file_that_diffusers_reads(files: Any, tmp_path: Path) -> None:
    for (folder, file), begin in (
        (written(tiny_pipeline("StableDiffusionPipeline"), tmp_path), ".transformer."),
        (files[SD2], ".model."),
    ):
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        single = StableDiffusionPipeline.from_single_file(str(file), config=str(folder))
        for part in ("unet", "vae", "text_encoder"):
            assert_equal(getattr(pipe, part), getattr(single, part))
        assert any(name.startswith(f"cond_stage_model{begin}") for name in load_file(file))
        read = load_generator(file, model_config=str(folder))
        assert read.fingerprint() == load_generator(folder).fingerprint()


def test_sd2_has_a_last_layer_that_nothing_uses(files: Any) -> None:
    tensors = load_file(files[SD2][1])
    begin = "cond_stage_model.model.transformer.resblocks."
    layers = {int(k.removeprefix(begin).split(".")[0]) for k in tensors if k.startswith(begin)}
    assert layers == {*range(24)}
    for name in [name for name in tensors if name.startswith(f"{begin}23.")]:
        assert torch.equal(tensors[name], tensors[name.replace("s.23.", "s.22.")])


def test_sd_turbo_is_read_with_the_names_of_its_release(files: Any, tmp_path: Path) -> None:
    folder, file = files[SD2]
    names = {"cond_stage_model": "conditioner.embedders.0"}
    begin = next(iter(names))
    turbo = {k.replace(begin, names[begin], 1): v for k, v in load_file(file).items()}
    save_file(turbo, tmp_path / "sd_turbo.safetensors")
    read = load_generator(tmp_path / "sd_turbo.safetensors", model_config=str(folder))
    assert read.fingerprint() == load_generator(folder).fingerprint()


def test_sd2_that_does_not_say_what_it_predicts_is_refused(files: Any, tmp_path: Path) -> None:
    for header, said in (({}, None), ({"modelspec.prediction_type": "v"}, "v_prediction")):
        file = spoiled(files[SD2][1], tmp_path / "file.safetensors", header=header)
        source = PipelineFile(SdGenerator, file, LoadOptions())
        if said is None:
            with pytest.raises(ModelError, match=r"whether it predicts epsilon .*--model_config"):
                scheduler_of_file(source, EulerDiscreteScheduler())
        else:
            found = scheduler_of_file(source, EulerDiscreteScheduler())
            assert found.config.prediction_type == said


def test_sd3_is_one_file_that_diffusers_reads(files: Any) -> None:
    folder, file = files[SD3]
    single = StableDiffusion3Pipeline.from_single_file(str(file), config=str(folder))
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        assert_equal(getattr(pipe, part), getattr(single, part))
    read = load_generator(file, model_config=str(folder))
    assert read.fingerprint() == load_generator(folder).fingerprint()


def test_a_file_of_halves_is_written_as_it_was(files: Any, tmp_path: Path) -> None:
    folder, file = files[SD3]  # whose transformer has a buffer, too
    halves = {name: value.half() for name, value in load_file(file).items()}
    read = load_generator(
        saved(halves, tmp_path / "half.safetensors"), model_config=str(folder), master_weights=True
    )
    read.save(tmp_path / "saved")
    read.save_single_file(tmp_path / "saved")
    found = load_file(tmp_path / "saved.safetensors")
    assert found.keys() == halves.keys()
    for name, value in found.items():
        assert value.dtype == torch.float16 and torch.equal(value, halves[name])


def test_what_a_file_lacks_comes_from_the_folder(files: Any, tmp_path: Path) -> None:
    folder, file = files[SD3]
    expected, rest = load_generator(folder).fingerprint(), shutil.copytree(folder, tmp_path / "all")
    # as sd3_medium_incl_clips and sd3.5_large are published, and the transformer alone
    for begins in (("text_encoders.t5",), ("text_encoders.",), ("text_encoders.", "first_stage_")):
        less = spoiled(file, tmp_path / "less.safetensors", *begins)
        found: Any = load_generator(less, model_config=str(rest))
        assert found.fingerprint() == expected
    with pytest.raises(ModelError, match=r"has no text_encoder, .*the folder of a whole pipeline"):
        load_generator(less)
    for weights in rest.glob("transformer/*.safetensors"):
        weights.unlink()  # that of the file counts
    half: Any = load_generator(less, model_config=str(rest), dtype=torch.bfloat16)
    half.save(tmp_path / "saved")
    for part in ("vae", "text_encoder_3"):
        (old,), (new,) = (f.glob(f"{part}/*.safetensors") for f in (folder, tmp_path / "saved"))
        assert old.read_bytes() == new.read_bytes()
    bare = load_generator(without_t5(folder, tmp_path / "two"))
    bare.save_single_file(tmp_path / "two")
    read = load_generator(tmp_path / "two.safetensors", model_config=str(tmp_path / "two"))
    assert read.fingerprint() == bare.fingerprint() != expected
    (rest / "transformer/config.json").unlink()
    with pytest.raises(ModelError, match=r"^cannot use model [^\n]+$"):
        load_generator(less, model_config=str(rest))


@pytest.mark.parametrize("name", ALONE)
def test_a_transformer_alone_is_a_file_that_diffusers_reads(
    files: Any, tmp_path: Path, name: str
) -> None:
    folder, file = files[name]
    kept = ALONE[name].from_pretrained(folder, subfolder="transformer")
    single = ALONE[name].from_single_file(str(file), config=str(folder), subfolder="transformer")
    assert_equal(kept, single)
    joined = "layers.0.attention.qkv.weight", "double_blocks.0.img_attn.qkv.weight"
    assert load_file(file).keys() & {*joined} and not {*joined} & kept.state_dict().keys()
    # prefixed, as ComfyUI saves it, and as diffusers names it
    expected = load_generator(folder).fingerprint()
    prefixed = {f"model.diffusion_model.{k}": v for k, v in load_file(file).items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    (own,) = (folder / "transformer").glob("*.safetensors")
    for form in (file, tmp_path / "prefixed.safetensors", own):
        assert load_generator(form, model_config=str(folder)).fingerprint() == expected


def test_a_denoiser_alone_is_read_with_diffusers_names(tmp_path: Path) -> None:
    several = {"several_steps": True}
    for name in (
        "StableDiffusionXLPipeline",
        "LatentConsistencyModelPipeline",
        "SanaSprintPipeline",
    ):
        folder = tmp_path / name
        tiny_pipeline(name).save_pretrained(folder)
        expected: Any = load_generator(folder, **several)
        (own,) = (folder / expected.parts[0]).glob("*.safetensors")
        read = load_generator(own, model_config=str(folder), **several)
        assert read.fingerprint() == expected.fingerprint()
        if name == "StableDiffusionXLPipeline":  # and with those of its release
            unet = {unet_name(k, expected.denoiser): v for k, v in load_file(own).items()}
            save_file(unet, tmp_path / "unet.safetensors")
            other = load_generator(tmp_path / "unet.safetensors", model_config=str(folder))
            assert other.fingerprint() == expected.fingerprint()


def test_a_pixart_alone_is_refused(tmp_path: Path) -> None:
    tiny_pipeline("PixArtAlphaPipeline").save_pretrained(tmp_path / "all")
    (own,) = (tmp_path / "all/transformer").glob("*.safetensors")
    with pytest.raises(ModelError, match="no single file of a PixArtTransformer2DModel; put it in"):
        load_generator(own, model_config=str(tmp_path / "all"))


def test_a_lora_is_merged_into_a_transformer_alone(files: Any, tmp_path: Path) -> None:
    folder, file = files["FluxPipeline"]
    rows = {"lora_A": torch.ones(2, WIDTH), "lora_B": torch.ones(WIDTH, 2)}
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    save_file({f"{name}.{k}.weight": v for k, v in rows.items()}, tmp_path / "lora.safetensors")
    lora = (LoraFile(tmp_path / "lora.safetensors"),)
    one = load_generator(file, model_config=str(folder), lora=lora)
    assert one.fingerprint() == load_generator(folder, lora=lora).fingerprint()
    assert one.fingerprint() != load_generator(folder).fingerprint()


def test_models_of_the_released_widths_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # diffusers' converter as it is
    with torch.device("meta"):  # so that shapes are compared
        flux = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
        z_image = ZImageTransformer2DModel(n_layers=2)
    check_writable({"transformer": flux}, FLUX)
    check_writable({"transformer": z_image}, Z_IMAGE)
    flux.transformer_blocks[0].attn.norm_q = torch.nn.Identity()
    with pytest.raises(ModelError, match="cannot read its transformer back from one file"):
        check_writable({"transformer": flux}, FLUX)


def test_other_tensors_of_a_file_are_told_of(
    files: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, file = files["FluxPipeline"]
    whole = {f"model.diffusion_model.{k}": v for k, v in load_file(file).items()}
    save_file({**whole, "vae.conv.bias": torch.ones(1)}, tmp_path / "all.safetensors")
    load_generator(tmp_path / "all.safetensors", model_config=str(folder))
    assert "1 of its tensors, such as vae.conv.bias, are not read; " in capfd.readouterr().err
    folder, file = files[SD2]
    averaged = {"model_ema.conv_in.bias": torch.ones(1), "betas": torch.ones(1)}
    save_file(load_file(file) | averaged, tmp_path / "sd2.safetensors", read_header(file)[1])
    load_generator(tmp_path / "sd2.safetensors", model_config=str(folder))
    assert (
        "1 of its tensors, such as model_ema.conv_in.bias, are not read" in capfd.readouterr().err
    )


def saved(tensors: dict[str, Tensor], place: Path) -> Path:
    save_file(tensors, place)
    return place


ONES = torch.ones(8, 8)
Spoil = Callable[[Path, Path], Path]
REFUSED: dict[str, tuple[str, Spoil, str]] = {
    "lora": (
        "FluxPipeline", lambda f, p: spoiled(f, p, lora_unet_double_blocks_0__lora_up__weight=ONES),
        "it is a LoRA: give it by --lora, and its base model by --model_id",
    ),
    "fp8": (
        "FluxPipeline",
        lambda f, p: spoiled(f, p, img_in__weight=ONES.to(torch.float8_e4m3fn)),
        "it is quantised: img_in.weight is of F8_E4M3",
    ),
    "architecture": (
        SD3, lambda f, p: spoiled(f, p, header={"modelspec.architecture": "flux-1-dev"}),
        "modelspec.architecture is flux-1-dev, but stable-diffusion-3... is needed",
    ),
    "no guidance": (
        "FluxPipeline", lambda f, p: spoiled(f, p, "guidance_in."),
        r"incomplete: transformer has no time_text_embed.guidance_embedder.linear_1",
    ),
    "missing": (
        "FluxPipeline", lambda f, p: spoiled(f, p, "single_blocks.0.linear1.bias"),
        "incomplete, or of another model: it has no single_blocks.0.linear1.bias",
    ),
    "left over": (
        "ZImagePipeline", lambda f, p: spoiled(f, p, layers__0__extra__weight=ONES),
        "of another model: transformer has an unknown layers.0.extra.weight",
    ),
    "unused": (
        "FluxPipeline", lambda f, p: spoiled(f, p, extra__weight=ONES),
        "of another model: transformer has no use for extra.weight",
    ),
    "another width": (
        SD3, lambda f, p: spoiled(f, p, model__diffusion_model__context_embedder__bias=ONES[0]),
        r"context_embedder.bias.*shape",
    ),
    "compiled": (
        "FluxPipeline",
        lambda f, p: saved({f"_orig_mod.{k}": v for k, v in load_file(f).items()}, p),
        "of another model: transformer has an unknown _orig_mod.double_blocks.0.img_attn.norm",
    ),
    "empty": (SD2, lambda f, p: saved({}, p), "it is empty: it has no tensors"),
    "names of none": (
        SD3, lambda f, p: saved({"a.weight": ONES}, p),
        "its weights are incomplete, or of another model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_fit_is_refused(files: Any, tmp_path: Path, case: str) -> None:
    name, spoil, message = REFUSED[case]
    folder, file = files[name]
    bad = spoil(file, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        load_generator(bad, model_config=str(folder))
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


def test_the_folder_of_a_whole_file_counts(files: Any, tmp_path: Path) -> None:
    folder, file = files[SD2]
    rest = shutil.copytree(folder, tmp_path / "rest")
    (rest / "scheduler/oneshot_fast.json").write_text('{"timestep": 500}')
    scheduler: Any = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.save_pretrained(rest / "scheduler")
    index = json.loads((rest / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (rest / "model_index.json").write_text(json.dumps(index))
    found: Any = load_generator(file, model_config=str(rest))
    assert found.start == 500 and found.fingerprint() == load_generator(rest).fingerprint()
    (rest / "tokenizer/tokenizer.json").unlink()  # transformers would make one of no words
    with pytest.raises(ModelError, match=r"there is no tokenizer/tokenizer\.json"):
        load_generator(file, model_config=str(rest))
    for place in (rest / "model_index.json", rest / "vae", tmp_path / "none"):
        with pytest.raises(ModelError, match=f"--model_config {place}: no model_index.json there"):
            load_generator(file, model_config=str(place))


def test_a_file_and_a_folder_that_do_not_agree_are_refused(files: Any, tmp_path: Path) -> None:
    flux, z_image = files["FluxPipeline"], files["ZImagePipeline"]
    with pytest.raises(ModelError, match="is of a ZImagePipeline, the file is read as a FluxPipe"):
        load_generator(flux[1], model_config=str(z_image[0]))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(flux[1].read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"^cannot use model [^\n]+$"):
        load_generator(cut, model_config=str(flux[0]))
    save_file({"a.weight": ONES}, tmp_path / "none.safetensors")
    with pytest.raises(
        ModelError, match=r"not those of a whole file of FluxPipeline, .*--model_co"
    ):
        load_generator(tmp_path / "none.safetensors")


def test_a_network_of_another_kind_has_no_place_in_one_file() -> None:
    with pytest.raises(ModelError, match="has no place for AutoencoderTiny"):
        check_writable({"vae": AutoencoderTiny()}, SD1)


def test_one_file_is_refused_where_diffusers_would_not_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, message in (
        ("SanaSprintPipeline", "SD3, FLUX and Z-Image alone; leave --save_single_file out"),
        ("PixArtAlphaPipeline", "SD3, FLUX and Z-Image alone; leave --save_single_file out"),
        ("LatentConsistencyModelPipeline", "no place for its UNet's time_embedding.cond_proj"),
        (SD3, "its first text encoder has a projection, which diffusers does not read"),
        (SD3, f"its text encoders are both {WIDTH} wide"),
        ("FluxPipeline", "diffusers cannot read its transformer back.*; leave --save_single"),
    ):
        pipe = tiny_pipeline(name)
        if "projection" in message:
            pipe.text_encoder.text_projection.weight.data.mul_(2)
        if "wide" in message:
            pipe.text_encoder_2 = pipe.text_encoder
        generator = family(name)(pipe)
        if name == "FluxPipeline":
            monkeypatch.undo()  # of another width than the released ones
        with pytest.raises(UserError, match=message):
            generator.check_single_file()
