"""The names that weights have in a model's own release, in which programs read one file.

diffusers converts from these names, not to them. So the names are made here, and diffusers' own
conversion has to give every weight back, or the file is not written.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from oneshot_fast.errors import ModelError, refused, require
from oneshot_fast.generators.adapters import base_weights
from oneshot_fast.generators.layouts import CLIP_L, OPEN_CLIP, Layout
from oneshot_fast.generators.single_file import scheduler_of_file
from oneshot_fast.generators.transformer_names import TRANSFORMERS, transformer_weights
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


def write_single_file(
    networks: Mapping[str, nn.Module], path: Path, layout: Layout, scheduler: Any = None
) -> None:
    """Write networks as one .safetensors file, atomically.

    The header says what the model is, as modelspec does, and the marks ``v_pred`` and ``ztsnr`` say
    what its scheduler is set to.

    Args:
        networks: By name, each in the type to write; those that ``layout`` has are written.
        path: The file.
        layout: Of its family.
        scheduler: That of a model of SDXL's, SD1's or SD2's shape.

    Raises:
        ModelError: If diffusers' own conversion does not give back the same weights.
    """
    weights = {name: network.state_dict() for name, network in networks.items()}
    tensors = _original(networks, weights, layout)
    header, marks = _words(scheduler.config if scheduler else {}, layout)
    tensors |= {name: torch.zeros(0) for name in marks}
    # safetensors writes no two names of one tensor, which T5's embedding has
    places = Counter(value.data_ptr() for value in tensors.values())
    written = {
        name: value.cpu().contiguous() if places[value.data_ptr()] == 1 else value.cpu().clone()
        for name, value in tensors.items()
    }
    with replacing(path) as temporary:
        save_file(written, temporary, header)


def check_widths(pipe: Any) -> None:
    """Raise UserError if diffusers could not tell a pipeline's two CLIPs apart in one file."""
    one, two = (e.config.hidden_size for e in (pipe.text_encoder, pipe.text_encoder_2))
    require(
        one != two,
        f"its text encoders are both {one} wide, by which those of one file are told apart; leave "
        "--save_single_file out",
    )


def check_writable(networks: Mapping[str, nn.Module], layout: Layout) -> None:
    """Raise ModelError unless ``write_single_file`` can write them; values are not looked at."""
    weights = {
        name: {k: v.to("meta") for k, v in base_weights(network.state_dict().items()).items()}
        for name, network in networks.items()
    }
    _original(networks, weights, layout)


def _original(
    networks: Mapping[str, Any], weights: Mapping[str, Mapping[str, Tensor]], layout: Layout
) -> dict[str, Tensor]:
    """Weights of networks as they are called in one file, and diffusers gives them back."""
    tensors = dict[str, Tensor]()
    for part, prefix in layout.prefixes.items():
        if part not in networks:
            continue
        named = _named(networks[part], weights[part], prefix)
        found = {prefix + name: value for name, value in named.items()}
        with refused(ModelError, f"diffusers cannot read its {part} back from one file: "):
            read = _read_back(networks[part], found, prefix)
        for name, value in weights[part].items():
            other = read.get(name, read.get(f"text_model.{name}"))
            if other is None or not _is_same(other, value):
                raise ModelError(f"the release's own layout has no place for its {part}'s {name}")
        tensors |= found
    return tensors


def _named(network: Any, weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        return {unet_name(name, network): value for name, value in weights.items()}
    if kind == "AutoencoderKL":
        return _vae(network, weights)
    if kind in TRANSFORMERS:
        return transformer_weights(network, weights)
    if kind == "T5EncoderModel":
        return dict(weights)
    if not kind.startswith("CLIPText"):
        raise ModelError(f"the release's own layout has no place for {kind}")
    if prefix.endswith(OPEN_CLIP):
        return _open_clip(weights)
    named = {name.removeprefix("text_model."): value for name, value in weights.items()}
    projection = {k: named.pop(k) for k in [*named] if k == "text_projection.weight"}
    named = {f"text_model.{name}": value for name, value in named.items()}
    return named if prefix == CLIP_L else named | projection


def _read_back(network: Any, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What diffusers makes of one network's tensors in a file, by its own names."""
    from diffusers.loaders import single_file_utils as theirs
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    kind, given = type(network).__name__, dict(tensors)
    if kind in SINGLE_FILE_LOADABLE_CLASSES:
        convert = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
        return dict(convert(checkpoint=given, config=network.config))
    if kind == "T5EncoderModel":
        return dict(theirs.convert_sd3_t5_checkpoint_to_diffusers(given))
    if prefix.endswith(OPEN_CLIP):
        return dict(theirs.convert_open_clip_checkpoint(network, given, prefix))
    found = dict(theirs.convert_ldm_clip_checkpoint(given, prefix))
    if prefix == CLIP_L:  # as it does for SD3 afterwards
        first = next(iter(tensors.values()))
        width = network.config.hidden_size
        found["text_projection.weight"] = torch.eye(width, dtype=first.dtype, device=first.device)
    return found


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.is_meta or torch.equal(one, other))


def _words(config: Mapping[str, Any], layout: Layout) -> tuple[dict[str, str], list[str]]:
    """What a file's header says of a scheduler, and the names of its marks."""
    is_v = config.get("prediction_type") == "v_prediction"
    header = {"format": "pt", "modelspec.architecture": layout.architecture}
    if "unet" in layout.prefixes:
        header["modelspec.prediction_type"] = "v" if is_v else "epsilon"
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


def _vae(vae: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    blocks = len(vae.config.down_block_types)
    names = dict(_VAE)
    for b in range(blocks):
        names[f"down_blocks.{b}.resnets"] = f"down.{b}.block"
        names[f"down_blocks.{b}.downsamplers.0"] = f"down.{b}.downsample"
        names[f"up_blocks.{b}.resnets"] = f"up.{blocks - 1 - b}.block"
        names[f"up_blocks.{b}.upsamplers.0"] = f"up.{blocks - 1 - b}.upsample"
    return {  # attention was written as 1 x 1 convolutions
        _renamed(name, names): value[..., None, None] if value.ndim == 2 else value
        for name, value in weights.items()
    }


def _open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    left = {name.removeprefix("text_model."): value for name, value in weights.items()}
    found = {
        "positional_embedding": left.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": left.pop("embeddings.token_embedding.weight"),
    }
    if (projection := left.pop("text_projection.weight", None)) is not None:
        found["text_projection"] = projection.T
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = left.pop(f"final_layer_norm.{kind}")
        for name in [name for name in left if name.endswith(f".q_proj.{kind}")]:
            rows = [left.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            place = _renamed(name.removesuffix(f".q_proj.{kind}"), _CLIP)
            found[f"transformer.{place}.in_proj_{kind}"] = torch.cat(rows)
    found |= {f"transformer.{_renamed(k, _CLIP)}": v for k, v in left.items()}
    return found | _unused(found) if projection is None else found


def _unused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What SD2's release has more of OpenCLIP than diffusers keeps, which nothing uses.

    Its text is read before the last of 24 layers. As in the files of kohya's scripts that is a copy
    of the one before it, and the projection is ones.
    """
    last = {
        name.replace(".22.", ".23."): value.clone()
        for name, value in weights.items()
        if name.startswith("transformer.resblocks.22.")
    }
    width = weights["ln_final.weight"]
    return last and {
        **last, "text_projection": width.new_ones(len(width), len(width)),
        "logit_scale": width.new_ones(()),
    }  # fmt: skip


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """``name`` with whole parts of it, between points, replaced."""
    for old, new in names.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?=\.|$)", new, name)
    return name
