"""RTDMD's LoRA files: read without running code, stacked, converted, merged, and refused."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from family_samples import tiny_pipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from oneshot_fast.errors import ModelError
from oneshot_fast.generators.lora_files import Adapters, LoraFile
from oneshot_fast.generators.rtdmd_files import convert_rtdmds

SD3 = "StableDiffusion3Pipeline"
TARGETS = {
    SD3: ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"],
    "FluxPipeline": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"],
    "StableDiffusionXLPipeline": ["to_q", "to_k", "to_v", "to_out.0"],
}


def trained(name: str, path: Path, alpha: float = 8, seed: int = 0) -> dict[str, Tensor]:
    """Write what RTDMD leaves of a tiny pipeline's denoiser, of rank 4."""
    pipe = tiny_pipeline(name)
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=TARGETS[name])
    model = get_peft_model(pipe.unet if "XL" in name else pipe.transformer, config)
    torch.manual_seed(seed)
    state = {k: 0.3 * torch.randn_like(v) for k, v in model.state_dict().items() if ".lora_" in k}
    assert all(".default.weight" in k and k.startswith("base_model.model.") for k in state)
    torch.save({f"module.{k}": v for k, v in state.items()}, path)
    return {k.removeprefix("base_model.model."): v for k, v in state.items()}


def merged(base: Any, *states: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights of a network with these added, in float64."""
    found = {k: v.double() for k, v in base.state_dict().items()}
    for state in states:
        for key in (k for k in state if ".lora_A" in k):
            B = state[key.replace("lora_A", "lora_B")].double()
            found[key.split(".lora_A")[0] + ".weight"] += scale * B @ state[key].double()
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_converted_and_merged_alike(name: str, tmp_path: Path) -> None:
    state, part = trained(name, tmp_path / "a.pt"), "unet" if "XL" in name else "transformer"
    pipe = tiny_pipeline(name)
    base = getattr(pipe, part)
    expected = merged(base, state, scale=2.0)
    # diffusers
    assert convert_rtdmds(tmp_path / "a.pt", None, part, tmp_path / "out") == len(state) // 2
    with torch.no_grad():
        theirs = tiny_pipeline(name)
        getattr(theirs, part).load_state_dict(base.state_dict())
        theirs.load_lora_weights(tmp_path / "out")
        theirs.fuse_lora()
        theirs.unload_lora_weights()
        for key, value in getattr(theirs, part).state_dict().items():
            torch.testing.assert_close(value.double(), expected[key], rtol=0, atol=1e-6)
        # peft
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out" / "peft"))
        for key, value in model.merge_and_unload().state_dict().items():
            torch.testing.assert_close(value.double(), expected[key], rtol=0, atol=1e-6)
    # ours, of either file
    for file in (tmp_path / "a.pt", tmp_path / "out/pytorch_lora_weights.safetensors"):
        mine = copy.deepcopy(base)
        Adapters(pipe, [part], [file], "--lora").merge(part, mine, [1.0])
        changed = 0
        for key, value in mine.state_dict().items():
            torch.testing.assert_close(value.double(), expected[key], rtol=0, atol=1e-6)
            changed += not torch.equal(value, base.state_dict()[key])
        assert changed == len(state) // 2


def test_a_stack_has_no_order_and_is_rounded_once(tmp_path: Path) -> None:
    states = [trained(SD3, tmp_path / f"{k}.pt", seed=k) for k in range(2)]
    pipe = tiny_pipeline(SD3)
    pipe.transformer.to(torch.bfloat16)
    expected = merged(pipe.transformer, *states, scale=0.5)
    for order in ((0, 1), (1, 0)):
        loras = [LoraFile(tmp_path / f"{k}.pt", alpha=2.0) for k in order]
        mine = copy.deepcopy(pipe.transformer)
        Adapters(pipe, ["transformer"], loras, "--lora").merge("transformer", mine, [1.0, 1.0])
        for key, value in mine.state_dict().items():
            assert torch.equal(value, expected[key].to(torch.bfloat16)), key
    assert LoraFile(tmp_path / "0.pt", alpha=2.0).settings["alpha"] == 2.0
    LoraConfig(r=4, lora_alpha=6).save_pretrained(str(tmp_path))
    lora = LoraFile(tmp_path / "0.pt")
    assert lora.has_alpha and "alpha" not in lora.settings
    key, delta = next(Adapters(pipe, ["transformer"], [lora], "--lora").change("transformer", [1]))
    A, B = (states[0][f"{key[:-7]}.lora_{half}.default.weight"].double() for half in "AB")
    torch.testing.assert_close(delta, 1.5 * B @ A)


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran",)


def test_a_checkpoint_folder(tmp_path: Path, call: Callable[..., Any]) -> None:
    """RTDMD's own, whose keys have .default. in them and no prefix, with adapter_config.json."""
    state = trained(SD3, tmp_path / "a.pt")
    pipe, folder = tiny_pipeline(SD3), tmp_path / "checkpoint-7"
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[SD3])
    config.save_pretrained(str(folder / "transformer"))
    save_file(state, folder / "transformer/adapter_model.safetensors")
    (folder / "meta.pt").write_bytes(b"")
    lora = LoraFile.parse(f"{folder}")
    mine = copy.deepcopy(pipe.transformer)
    Adapters(pipe, ["transformer"], [lora], "--lora").merge("transformer", mine, [1.0])
    expected = merged(pipe.transformer, state, scale=1.5)
    for key, value in mine.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=0, atol=1e-6)
    noted = lora.settings
    assert call("lora", "convert", folder, tmp_path / "out").code == 0
    ended = call("lora", "convert", folder, tmp_path / "no", "--part", "unet")
    assert ended.code == 2 and "is of a transformer; give --part transformer" in ended.error, ended
    # the configuration beside counts, and has to be true
    LoraConfig(r=8, lora_alpha=6).save_pretrained(str(folder / "transformer"))
    ended = call("lora", "convert", folder, tmp_path / "no")
    assert ended.code == 2 and "has rank 4, but adapter_config.json beside it says 8" in ended.error
    first = next(iter(state)).split(".lora_")[0]
    other = {f"^{first}": 4}
    LoraConfig(r=8, lora_alpha=6, rank_pattern=other).save_pretrained(str(folder / "transformer"))
    with pytest.raises(ModelError, match="says 8") as caught:
        Adapters(pipe, ["transformer"], [lora], "--lora")
    assert first not in str(caught.value)
    assert lora.settings != noted and not (tmp_path / "no").exists()


def test_broken_files_are_refused_by_their_first_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    path, pipe = tmp_path / "a.pt", tiny_pipeline(SD3)
    trained(SD3, path)
    raw = torch.load(path)
    first = next(iter(raw))
    other = first.replace("lora_A", "lora_B")
    bad: dict[str, tuple[Any, str]] = {
        "no B": ({k: v for k, v in raw.items() if k != other}, "has lora_A alone"),
        "ranks": (raw | {first: torch.ones(3, 16)}, "lora_A and lora_B of shapes"),
        "shape": (raw | {first: torch.ones(4, 15)}, "another shape"),
        "extra": (raw | {"step": torch.ones(())}, "step is no MODULE.lora_A.default.weight"),
        "module": (raw | {"no.lora_A.default.weight": torch.ones(4, 16),
                          "no.lora_B.default.weight": torch.ones(16, 4)}, "no use for"),
        "number": (raw | {"step": 3}, "expected tensors by name"),
        "NaN": (raw | {first: torch.full((4, 16), torch.nan)}, "NaN"),
        "code": (Code(), "damaged or more than tensors"),
        "empty": ({}, "no tensors"),
    }  # fmt: skip
    for name, (content, message) in bad.items():
        torch.save(content, path)
        with pytest.raises(ModelError, match=message) as caught:
            Adapters(pipe, ["transformer"], [path], "--lora")
        assert str(caught.value).startswith(f"--lora {path}: "), name
    assert not Path("ran").exists()
    torch.save(raw, path)
    path.write_bytes(path.read_bytes()[:-300])
    ended = call("lora", "convert", path, tmp_path / "out")
    assert ended.code == 2 and "damaged" in ended.error and not (tmp_path / "out").exists()


def test_the_commands(tmp_path: Path, call: Callable[..., Any]) -> None:
    states = [trained(SD3, tmp_path / f"{k}.pt", seed=k) for k in range(2)]
    base = tiny_pipeline(SD3)
    base.transformer.to(torch.float16)
    base.save_pretrained(tmp_path / "base")
    ended = call("lora", "convert", tmp_path / "0.pt", tmp_path / "out", "--lora_alpha", 4)
    assert ended.code == 0 and "18 modules of transformer" in ended.out, ended
    assert all(
        ".default." not in k for k in load_file(tmp_path / "out/peft/adapter_model.safetensors")
    )
    flags = ["--model_id", tmp_path / "base", "--output_dir", tmp_path / "merged"]
    loras = ["--lora", tmp_path / "out", "--lora", f"{tmp_path / '1.pt'}:0.5"]
    ended = call("lora", "merge", *flags, *loras, "--lora_alpha", 8)
    assert ended.code == 0, ended
    halves = {k: 0.5 * v if ".lora_B" in k else v for k, v in states[1].items()}
    first = {k: 0.5 * v if ".lora_B" in k else v for k, v in states[0].items()}
    expected = merged(base.transformer, first, halves, scale=2.0)
    kind = diffusers.SD3Transformer2DModel
    for key, value in (
        kind.from_pretrained(
            tmp_path / "merged", subfolder="transformer", torch_dtype=torch.float16
        )
        .state_dict()
        .items()
    ):
        assert torch.equal(value, expected[key].half()), key
    # of another type the sum is rounded once, too
    exact = [*flags[:3], tmp_path / "exact", "--dtype", "float32"]
    assert call("lora", "merge", *exact, *loras, "--lora_alpha", 8).code == 0
    weights = load_file(tmp_path / "exact/transformer/diffusion_pytorch_model.safetensors")
    for key, value in weights.items():
        assert torch.equal(value, expected[key].float()), key
    for more, message in (
        ([*loras[:2], "--lora_alpha", 8], "has no effect"),
        ([*loras, "--lora", tmp_path / "none.pt"], "no such file"),
        (loras, "is there; name another"),
    ):
        place = tmp_path / ("merged" if "another" in message else "other")
        ended = call("lora", "merge", *flags[:3], place, *more)
        assert ended.code == 2 and message in ended.error, ended
    file = tmp_path / "merged/transformer/diffusion_pytorch_model.safetensors"
    ended = call("lora", "merge", "--model_id", file, *flags[2:3], tmp_path / "other", *loras)
    assert ended.code == 2 and "which merge needs; give one" in ended.error, ended
