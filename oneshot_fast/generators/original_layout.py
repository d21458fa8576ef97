"""The names that weights have in SDXL's and SD1's own release, in which programs read one file.

diffusers converts from these names, not to them. So the names are made here, and diffusers' own
conversion has to give every weight back, or the file is not written.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor

from oneshot_fast.errors import ModelError
from oneshot_fast.generators.single_file import Layout, scheduler_of_file
from oneshot_fast.runtime.files import replacing

_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
}
_CLIP = {
    "encoder.layers": "resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
}


def unet_name(name: str, unet: Any) -> str:
    """Name of a UNet's module or weight there: its blocks are numbered through.

    Args:
        name: In diffusers.
        unet: The UNet.

    Raises:
        ModelError: For a module that SDXL and SD1 do not have.
    """
    per = unet.config.layers_per_block + 1
    for old, new in _TOP.items():
        if re.match(rf"{re.escape(old)}(\.|$)", name):
            return _renamed(name.replace(old, new, 1), _RESNET if ".resnets." in name else {})
    found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if found is None:
        raise ModelError(f"the release's own layout has no place for its UNet's {name}")
    side, block, kind, place, inner = found.groups()
    at, last = int(block) * per + int(place), int(block) * per + per - 1
    if kind == "downsamplers":
        return f"input_blocks.{last + 1}.0.{inner.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        has_attention = hasattr(unet.up_blocks[int(block)], "attentions")
        return f"output_blocks.{last}.{2 if has_attention else 1}.{inner}"
    start = f"input_blocks.{at + 1}" if side == "down" else f"output_blocks.{at}"
    if kind == "resnets":
        return f"{start}.0.{_renamed(inner, _RESNET)}"
    return f"{start}.1.{inner}"


def write_single_file(pipe: Any, path: Path, layout: Layout) -> None:
    """Write a pipeline of SDXL's or SD1's shape as one .safetensors file, atomically.

    The header says what the model is, as modelspec does, and the marks ``v_pred`` and ``ztsnr`` say
    what its scheduler is set to.

    Args:
        pipe: Of diffusers, each network in the type to write.
        path: The file.
        layout: Of its family.

    Raises:
        ModelError: If diffusers' own conversion does not give back the same weights.
    """
    first = pipe.text_encoder.state_dict().items()
    networks = {
        "unet": {unet_name(k, pipe.unet): v for k, v in pipe.unet.state_dict().items()},
        "vae": _vae(pipe.vae),
        "text_encoder": {
            f"transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in first
        },
    }
    if "text_encoder_2" in layout.prefixes:
        second = _open_clip(pipe.text_encoder_2.state_dict())
        networks["text_encoder_2"] = {f"model.{k}": v for k, v in second.items()}
    tensors = {
        layout.prefixes[part] + name: value
        for part, weights in networks.items()
        for name, value in weights.items()
    }
    _check(pipe, tensors, layout)
    header, marks = _words(pipe.scheduler.config, layout)
    tensors |= {name: torch.zeros(0) for name in marks}
    with replacing(path) as temporary:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, header)


def _words(config: Mapping[str, Any], layout: Layout) -> tuple[dict[str, str], list[str]]:
    """What a file's header says of a scheduler, and the names of its marks."""
    is_v = config.get("prediction_type") == "v_prediction"
    header = {
        "format": "pt",
        "modelspec.architecture": layout.base,
        "modelspec.prediction_type": "v" if is_v else "epsilon",
    }
    marks = ["v_pred", *(["ztsnr"] if config.get("rescale_betas_zero_snr") else [])]
    return header, marks if is_v else []


def scheduler_written(scheduler: Any, layout: Layout) -> Any:
    """The scheduler that a reader makes of what ``write_single_file`` says of ``scheduler``."""
    header, marks = _words(scheduler.config, layout)
    said: Any = SimpleNamespace(
        name="", tensors=marks, metadata=header, model_config=None, layout=layout
    )
    base = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )  # of the base models
    return scheduler_of_file(said, base)


def _vae(vae: Any) -> dict[str, Tensor]:
    blocks = len(vae.config.down_block_types)
    names = dict(_VAE)
    for b in range(blocks):
        names[f"down_blocks.{b}.resnets"] = f"down.{b}.block"
        names[f"down_blocks.{b}.downsamplers.0"] = f"down.{b}.downsample"
        names[f"up_blocks.{b}.resnets"] = f"up.{blocks - 1 - b}.block"
        names[f"up_blocks.{b}.upsamplers.0"] = f"up.{blocks - 1 - b}.upsample"
    return {  # attention was written as 1 x 1 convolutions
        _renamed(name, names): value[..., None, None] if value.ndim == 2 else value
        for name, value in vae.state_dict().items()
    }


def _open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    left = {name.removeprefix("text_model."): value for name, value in weights.items()}
    found = {
        "text_projection": left.pop("text_projection.weight").T,
        "positional_embedding": left.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": left.pop("embeddings.token_embedding.weight"),
    }
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = left.pop(f"final_layer_norm.{kind}")
        for name in [name for name in left if name.endswith(f".q_proj.{kind}")]:
            rows = [left.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            place = _renamed(name.removesuffix(f".q_proj.{kind}"), _CLIP)
            found[f"transformer.{place}.in_proj_{kind}"] = torch.cat(rows)
    return found | {f"transformer.{_renamed(k, _CLIP)}": v for k, v in left.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """``name`` with whole parts of it, between points, replaced."""
    for old, new in names.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?=\.|$)", new, name)
    return name


def _check(pipe: Any, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Raise ModelError unless diffusers gives back UNet, VAE and second text encoder."""
    from diffusers.loaders import single_file_utils as theirs

    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(tensors), pipe.unet.config),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(tensors), pipe.vae.config),
    }
    if prefix := layout.prefixes.get("text_encoder_2"):
        found["text_encoder_2"] = theirs.convert_open_clip_checkpoint(
            pipe.text_encoder_2, dict(tensors), f"{prefix}model."
        )
    for part, weights in found.items():
        expected = getattr(pipe, part).state_dict()
        for name, value in expected.items():
            other = weights.get(name, weights.get(f"text_model.{name}"))
            if other is None or not torch.equal(other, value):
                raise ModelError(f"the release's own layout has no place for its {part}'s {name}")
