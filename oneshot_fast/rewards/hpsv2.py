"""``hpsv2``: Human Preference Score v2, which of several images for a prompt people prefer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.errors import ModelError
from oneshot_fast.rewards.base import Setup
from oneshot_fast.rewards.clip_encoder import ClipEncoder, CosineReward, load_tokenizer
from oneshot_fast.rewards.preprocess import preprocess_padded
from oneshot_fast.rewards.weights import build, depth
from oneshot_fast.runtime.tensor_files import read_pickle

MODEL = "HPSv2"
FILES = {
    "hpsv2": "HPS_v2.1_compressed.pt",
    "hpsv2.0": "HPS_v2_compressed.pt",
    "hpsv2.1": "HPS_v2.1_compressed.pt",
}
# width of one attention head in ViT-H/14; the shapes of weights do not tell it
VISION_HEAD, TEXT_HEAD = 80, 64

_BLOCK_NAMES = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelled so in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}


class HpsReward(CosineReward):
    """Cosine, without a scale, of a CLIP ViT-H/14 trained on people's choices.

    Wu et al. 2023, arXiv 2306.09341. Version 2.1, unless the name says 2.0.
    """

    @classmethod
    def load(cls, name: str, setup: Setup) -> "HpsReward":
        path = setup.find(MODEL, FILES[name])
        tokenizer = load_tokenizer(setup, MODEL)
        model = load_open_clip(path, tokenizer.eos_token_id, setup.dtype).to(setup.device)
        return cls(name, ClipEncoder(model, tokenizer, preprocess_padded), 1.0)


def load_open_clip(path: Path, eos_token_id: int, dtype: torch.dtype) -> Any:
    """Transformers' CLIPModel with the weights of an open_clip ViT-H/14 checkpoint, a .pt file.

    Depths and widths are those of the tensors, so that a smaller model of this layout loads too.
    ``eos_token_id`` is of the token whose output stands for the text.

    Raises:
        ModelError: If a tensor is missing, left over or of another shape.
    """
    from transformers import CLIPModel

    tensors = read_pickle(path)
    try:
        config = config_of(tensors, eos_token_id)
    except KeyError as error:
        raise ModelError(f"{path} has another layout: no {error.args[0]}") from None
    return build(CLIPModel, config, renamed(tensors), path, dtype)


def config_of(tensors: Mapping[str, Tensor], eos_token_id: int) -> Any:
    """Transformers' CLIPConfig of open_clip's tensors; KeyError if a needed one is missing."""
    from transformers import CLIPConfig

    text = _tower(tensors, "", TEXT_HEAD) | {
        "vocab_size": tensors["token_embedding.weight"].shape[0],
        "max_position_embeddings": tensors["positional_embedding"].shape[0],
        "eos_token_id": eos_token_id,
    }
    patch = tensors["visual.conv1.weight"].shape[-1]
    cells = tensors["visual.positional_embedding"].shape[0] - 1
    vision = _tower(tensors, "visual.", VISION_HEAD) | {
        "patch_size": patch,
        "image_size": patch * round(cells**0.5),
    }
    width = tensors["text_projection"].shape[1]
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under transformers' names; unknown ones keep theirs."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key in _TRANSPOSED:
            found[_TRANSPOSED[key]] = value.T.contiguous()
        elif "resblocks." in key:
            found |= _block(key, value)
        else:
            found[_NAMES.get(key, key)] = value
    return found


def _tower(tensors: Mapping[str, Tensor], prefix: str, head: int) -> dict[str, Any]:
    """What the shapes of one transformer say of its configuration."""
    before = f"{prefix}transformer.resblocks."
    hidden, width = tensors[f"{before}0.mlp.c_fc.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": depth(tensors, before),
        "num_attention_heads": width // head,
        "hidden_act": "gelu",
    }


def _block(key: str, value: Tensor) -> dict[str, Tensor]:
    """One tensor of a transformer block; queries, keys and values are stacked in open_clip."""
    before, _, rest = key.partition("transformer.resblocks.")
    number, _, part = rest.partition(".")
    place = f"{'vision' if before else 'text'}_model.encoder.layers.{number}."
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        names = (f"{place}self_attn.{letter}_proj.{kind}" for letter in "qkv")
        return dict(zip(names, value.chunk(3), strict=True))
    for old, new in _BLOCK_NAMES:
        if part.startswith(old):
            return {place + new + part.removeprefix(old): value}
    return {key: value}
