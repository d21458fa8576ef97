"""LoRA files of diffusers, peft and kohya's scripts: what is merged, and what is refused."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin
from family_samples import FAMILIES, tiny_pipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from oneshot_fast.embedded.pipeline import model_path
from oneshot_fast.errors import ModelError, UserError
from oneshot_fast.generators.adapters import add_adapter
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.loading import PIPELINES, load_generator
from oneshot_fast.generators.lora_files import Adapters, LoraFile, adopt
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.runtime.seeds import gaussian

NAME, PROMPT = "pytorch_lora_weights.safetensors", "a handwritten digit one"
TEXT = [f"{name}_proj" for name in ("q", "k", "v", "out")] + ["fc1", "fc2"]
CONFIGS = {
    "unet": (4, 2, ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj"]),
    "text_encoder": (2, 6, TEXT),
    "text_encoder_2": (3, 3, TEXT),
}
Changes = dict[str, Tensor]


def changes(networks: dict[str, Any]) -> Changes:
    """What peft's own layers add to each weight."""
    return {
        f"{part}.{name.removeprefix('base_model.model.')}.weight": layer.get_delta_weight("default")
        for part, network in networks.items()
        for name, layer in copy.deepcopy(network).double().named_modules()
        if isinstance(layer, LoraLayer)
    }


def drawn(network: Any) -> dict[str, Tensor]:
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return get_peft_model_state_dict(network)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Changes]:
    """A file that diffusers saved, of three networks with an alpha each, and what it changes."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path())
    given: dict[str, Any] = {}
    for part, (rank, alpha, targets) in CONFIGS.items():
        network = getattr(pipe, part)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
        given[f"{part}_lora_layers"] = drawn(network)
        given[f"{part}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    folder = tmp_path_factory.mktemp("lora")
    pipe.save_lora_weights(folder, **given)
    return folder, changes({part: getattr(pipe, part) for part in CONFIGS})


def of(generator: Generator, path: Path) -> Changes:
    pipe: Any = generator.pipe  # type: ignore[attr-defined]
    read = Adapters(pipe, SdxlGenerator.parts, [path], "--lora")
    return {f"{part}.{k}": v for part in SdxlGenerator.parts for k, v in read.change(part, [1.0])}


def kohya(path: Path, alpha: Callable[[int], float]) -> dict[str, Tensor]:
    """The same file as kohya's scripts name it, with other alphas."""
    found: dict[str, Tensor] = {}
    starts = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    for n, (key, value) in enumerate(sorted(load_file(path).items())):
        part, rest = key.split(".", 1)
        module, kind = rest.removesuffix(".weight").rsplit(".", 1)
        if part != "unet":
            module = f"text_model.{module.removeprefix('text_model.')}"
        name = f"{starts[part]}_{module}".replace(".", "_")
        found[f"{name}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = value
        found.setdefault(f"{name}.alpha", torch.tensor(alpha(n)))
    return found


def test_the_file_of_diffusers_is_read_with_its_alphas(
    tiny: Generator, adapted: tuple[Path, Changes]
) -> None:
    folder, expected = adapted
    weights = {k: v.clone() for n in tiny.networks.values() for k, v in n.state_dict().items()}
    have = of(tiny, folder / NAME)
    assert have.keys() == expected.keys() and len(have) > 40
    assert all(torch.equal(have[k], expected[k]) for k in have)
    after = {k: v for n in tiny.networks.values() for k, v in n.state_dict().items()}
    assert all(torch.equal(v, weights[k]) for k, v in after.items()) and len(after) == len(weights)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "XL" not in name])
def test_every_family_reads_what_its_pipeline_saves(name: str, tmp_path: Path) -> None:
    module, kind = PIPELINES[name].split(".")
    family = getattr(importlib.import_module(f"oneshot_fast.generators.{module}"), kind)
    parts = family.parts
    pipe = tiny_pipeline(name)
    network = getattr(pipe, parts[0])
    if name == "PixArtAlphaPipeline":  # diffusers' has no way to
        adopt(pipe, SanaLoraLoaderMixin)
        adopt(network, PeftAdapterMixin)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    network.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    given = {f"{parts[0]}_lora_layers": drawn(network)}
    given[f"{parts[0]}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, **given)
    expected = changes({parts[0]: network})
    read = Adapters(tiny_pipeline(name), parts, [tmp_path / NAME], "--lora")
    have = {f"{parts[0]}.{k}": v for k, v in read.change(parts[0], [1.0])}
    assert have.keys() == expected.keys() and have
    assert all(torch.equal(have[k], expected[k]) for k in have)
    adapter = read.trainable(parts[0])
    assert (adapter.rank, adapter.alpha) == (2, 3)
    other = tiny_pipeline(name)
    family.adapt(other, None)
    add_adapter(getattr(other, parts[0]), 2, 3, start=adapter)
    again = changes({parts[0]: getattr(other, parts[0])})
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[k], expected[k]) for k in again)
    # kohya's names are written where they are read
    generator = family(other)
    try:
        generator.check_kohya()
    except UserError:
        kinds = ("StableDiffusion3", "SanaSprint", "ZImage", "PixArtAlpha")
        assert name in [f"{kind}Pipeline" for kind in kinds]
        return
    generator.save_adapter(adapter.weights, tmp_path / "kohya", kohya=True)
    back = Adapters(tiny_pipeline(name), parts, [tmp_path / "kohya" / NAME], "--lora")
    have = {f"{parts[0]}.{k}": v for k, v in back.change(parts[0], [1.0])}
    assert have.keys() == expected.keys()
    for k, v in have.items():
        torch.testing.assert_close(v, expected[k])


def test_a_new_adapter_is_on_the_projections_of_the_text_too() -> None:
    network = tiny_pipeline("FluxPipeline").transformer
    add_adapter(network, 2, None)
    adapted = {k.partition(".attn.")[2].partition(".lora_")[0] for k in drawn(network)}
    text = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert adapted == {"to_q", "to_k", "to_v", "to_out.0"} | text


def test_an_adapter_goes_on_with_its_own_modules_alone(tmp_path: Path) -> None:
    rows = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(16, 2)}
    tensors = {f"transformer.proj_out.{k}.weight": v for k, v in rows.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    pipe = tiny_pipeline("FluxPipeline")
    read = Adapters(pipe, ["transformer"], [tmp_path / "lora.safetensors"], "--lora_from")
    add_adapter(pipe.transformer, 2, 2, start=read.trainable("transformer"))
    assert changes({"transformer": pipe.transformer}).keys() == {"transformer.proj_out.weight"}
    assert any(k.endswith("0.proj_out") for k, _ in pipe.transformer.named_modules())


def test_equal_downs_keep_their_own_alphas(
    tiny: Generator, adapted: tuple[Path, Changes], tmp_path: Path
) -> None:
    tensors = kohya(adapted[0] / NAME, lambda n: 2.0)
    one, two = [k.split(".")[0] for k in tensors if "attn1_to_q.lora_down" in k][:2]
    tensors[f"{two}.lora_down.weight"] = tensors[f"{one}.lora_down.weight"].clone()
    tensors[f"{one}.alpha"], tensors[f"{two}.alpha"] = torch.tensor(1.0), torch.tensor(4.0)
    path = tmp_path / "kohya.safetensors"
    save_file(tensors, path)
    found = of(tiny, path).items()
    have = {f"lora_{k.removesuffix('.weight')}".replace(".", "_"): v for k, v in found}
    for name, alpha in ((one, 1.0), (two, 4.0)):
        down, up = (tensors[f"{name}.lora_{kind}.weight"] for kind in ("down", "up"))
        torch.testing.assert_close(have[name].float(), alpha / len(down) * up @ down)
    tensors[f"{two}.lora_up.weight"] = tensors[f"{one}.lora_up.weight"].clone()
    save_file(tensors, path)
    with pytest.raises(ModelError, match=f"{two}.alpha differs from that of another module"):
        of(tiny, path)


@pytest.mark.parametrize("alpha", [lambda n: 2.0, lambda n: 1.0 + n % 5], ids=["one", "many"])
def test_kohyas_file_is_read_with_its_alphas(
    tiny: Generator,
    adapted: tuple[Path, Changes],
    tmp_path: Path,
    alpha: Callable[[int], float],
) -> None:
    tensors = kohya(adapted[0] / NAME, alpha)
    save_file(tensors, tmp_path / "kohya.safetensors")
    have = of(tiny, tmp_path / "kohya.safetensors")
    raw = load_file(adapted[0] / NAME)
    alphas = iter([tensors[k].item() for k in tensors if k.endswith(".alpha")])
    stems = dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in sorted(raw))
    for stem in stems:
        A, B = (raw[f"{stem}.lora_{x}.weight"] for x in "AB")
        name = f"{stem}.weight"
        product = (B.flatten(1) @ A.flatten(1)).view(have[name].shape)
        torch.testing.assert_close(have[name].float(), next(alphas) / len(A) * product)
    assert len(have) == len(stems)


def test_pefts_folder_is_read(tiny: Generator, tmp_path: Path) -> None:
    network = copy.deepcopy(tiny.denoiser)
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["to_q", "conv1"])
    model = get_peft_model(network, config)
    drawn(model)
    model.save_pretrained(tmp_path)
    have, expected = of(tiny, LoraFile.parse(f"{tmp_path}").path), changes({"unet": model})
    assert have.keys() == expected.keys()
    assert all(torch.equal(have[k], expected[k]) for k in have)
    noted, config = LoraFile.parse(f"{tmp_path}").settings, tmp_path / "adapter_config.json"
    assert SftOptions(lora_from=tmp_path).settings()["lora_from"] == noted["sha256"]
    config.write_text(config.read_text().replace('"lora_alpha": 3', '"lora_alpha": 5'))
    assert LoraFile.parse(f"{tmp_path}").settings != noted
    config.unlink()
    with pytest.raises(ModelError, match=r"adapter_config\.json is not beside it"):
        of(tiny, tmp_path / "adapter_model.safetensors")


def test_merged_in_float64_and_rounded_once(adapted: tuple[Path, Changes], tmp_path: Path) -> None:
    stored = torch.float16
    base = StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=stored)
    base.save_pretrained(tmp_path / "base")
    folder, change = adapted
    loras = (LoraFile(folder / NAME), LoraFile(folder / NAME, -0.25))
    generator = load_generator(tmp_path / "base", lora=loras)
    changed = 0
    for part, network in generator.networks.items():
        for key, value in getattr(base, part).state_dict().items():
            delta = change.get(f"{part}.{key}")
            changed += delta is not None
            if delta is not None:
                value = (value.double() + (delta + -0.25 * delta)).to(stored)
            assert torch.equal(network.state_dict()[key], value.float()), key
    assert changed == len(change)
    noted = generator.settings((64, 64))["lora"]
    assert [(row["file"], row["weight"]) for row in noted] == [(NAME, 1.0), (NAME, -0.25)]
    assert {len(row["sha256"]) for row in noted} == {64}
    # what is saved is the same in its files' type, and loads as the same generator
    generator.save(tmp_path / "saved")
    again = load_generator(tmp_path / "saved")
    assert again.fingerprint() == generator.fingerprint() != load_generator("tiny").fingerprint()
    (kept,) = (tmp_path / "saved/text_encoder_2").glob("*.safetensors")
    assert {v.dtype for k, v in load_file(kept).items() if "position" not in k} == {stored}


def test_makes_what_diffusers_makes(adapted: tuple[Path, Changes], tmp_path: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path(), dtype=torch.float32)
    pipe.save_pretrained(tmp_path / "base")
    pipe.load_lora_weights(adapted[0])
    pipe.set_progress_bar_config(disable=True)
    noise = gaussian([3], (4, 8, 8))
    theirs = pipe(PROMPT, num_inference_steps=1, guidance_scale=0.0, output_type="latent",
                  latents=noise).images  # fmt: skip
    generator = load_generator(tmp_path / "base", lora=(LoraFile.parse(f"{adapted[0]}:1"),))
    with torch.no_grad():
        ours = generator.latents(noise, generator.encode_prompts([PROMPT]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def broken(path: Path) -> Iterator[tuple[str, dict[str, Tensor], str]]:
    """Files that are not for this model, and what is said of them."""
    raw, scripts = load_file(path / NAME), kohya(path / NAME, lambda n: 2.0)
    yield "NaN", scripts | {"a": torch.tensor([1.0, torch.nan])}, "a has values that are NaN"
    first = next(k for k in raw if "unet" in k and "lora_A" in k)
    down = next(k for k in scripts if "unet" in k and "down" in k)
    yield (
        "another network",
        {k.replace("unet.", "transformer."): v for k, v in raw.items()},
        ("no use for transformer"),
    )
    yield (
        "a third encoder",
        {k.replace("encoder_2", "encoder_3"): v for k, v in raw.items()},
        ("no use for text_encoder_3"),
    )
    yield (
        "an unknown module",
        raw | {"unet.no.lora_A.weight": torch.ones(4, 8)},
        ("no use for unet.no.lora_A.weight"),
    )
    yield "a shape", raw | {first: torch.ones(4, 7)}, f"{first[5:-7]}.0.weight has another shape"
    yield (
        "no lora_up",
        {k: v for k, v in scripts.items() if k != down.replace("down", "up")},
        (down.replace("down", "up")),
    )
    yield "a kohya module", scripts | {
        "lora_unet_down_blocks_9_attentions_0_proj_in.lora_down.weight": torch.ones(2, 96),
        "lora_unet_down_blocks_9_attentions_0_proj_in.lora_up.weight": torch.ones(96, 2),
    }, "no use for lora_unet_down_blocks_9_attentions_0_proj_in.lora_down.weight"  # fmt: skip
    yield "LoHa", scripts | {"lora_unet_x.hada_w1_a": torch.ones(2, 96)}, "lora_unet_x.hada_w1_a"
    yield "FLUX", {
        f"lora_unet_double_blocks_0_img_attn_proj.lora_{x}.weight": torch.ones(4, 4)
        for x in ("down", "up")
    }, "double_blocks_0_img_attn_proj"  # fmt: skip
    yield "no LoRA", {"model.weight": torch.ones(4, 4)}, "model.weight"
    yield "DoRA", scripts | {f"{down.split('.')[0]}.dora_scale": torch.ones(4)}, "DoRA"


def test_what_does_not_fit_is_refused_by_its_first_key(
    tiny: Generator, adapted: tuple[Path, Changes], tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    for what, tensors, message in broken(adapted[0]):
        save_file(tensors, path)
        with pytest.raises(ModelError, match=re.escape(message)) as caught:
            of(tiny, path)
        said = str(caught.value)
        assert said.startswith(f"--lora {path}: ") and "\n" not in said, what
        assert len(said) < 420, said


def test_files_that_cannot_be_read_are_refused(tmp_path: Path, call: Callable[..., Any]) -> None:
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "a.bin").touch()
    (tmp_path / "empty").mkdir()
    flags = ["--model_id", "tiny", "--output_dir", tmp_path / "run", "--prompt", "x"]
    for name, message in {
        "none.safetensors": "no such file",
        "a.safetensors:x": "no such file",
        "a.safetensors:0": "the weight is 0",
        "a.safetensors:nan": "the weight is nan",
        "a.bin": "no .safetensors file, nor .pt",
        "empty": "no .safetensors file",
        "a.safetensors": "is a git-lfs pointer",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            load_generator("tiny", lora=(LoraFile.parse(f"{tmp_path / name}"),))
        assert "\n" not in str(caught.value)
    ended = call("optimize", *flags, "--reward", "thickness", "--lora", tmp_path / "a.safetensors")
    assert ended.code == 2 and "--lora" in ended.error and "a.safetensors" in ended.error
