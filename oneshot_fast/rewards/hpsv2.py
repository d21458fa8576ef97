"""``hpsv2``: Human Preference Score v2, which of several images for a prompt people prefer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.errors import ModelError
from oneshot_fast.rewards.base import Setup
from oneshot_fast.rewards.clip_encoder import TOKENIZER, ClipEncoder, CosineReward
from oneshot_fast.rewards.preprocess import preprocess_padded
from oneshot_fast.rewards.weights import build, depth, read_tokenizer, renamed
from oneshot_fast.runtime.tensor_files import read_pickle

MODEL = "HPSv2"
# width of one attention head in ViT-H/14; the shapes of weights do not tell it
VISION_HEAD, TEXT_HEAD = 80, 64

_NAMES = (  # of open_clip, in transformers
    (r"^(visual\.)?transformer\.resblocks", r"\1encoder.layers"),
    (r"^(encoder|token_embedding|positional_embedding|ln_final)", r"text_model.\1"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.", "vision_model."),
    (r"\.(class|token)_embedding", r".embeddings.\1_embedding"),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.ln_pre\.", ".pre_layrnorm."),  # spelled so in transformers
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.ln_final\.", ".final_layer_norm."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)


class HpsReward(CosineReward):
    """Cosine, without a scale, of a CLIP ViT-H/14 trained on people's choices.

    Wu et al. 2023, arXiv 2306.09341. Version 2.1, unless the name says 2.0.
    """

    @classmethod
    def load(cls, name: str, setup: Setup) -> "HpsReward":
        version = "2" if name == "hpsv2.0" else "2.1"
        path = setup.find(MODEL, f"HPS_v{version}_compressed.pt")
        tokenizer = read_tokenizer(setup, MODEL, *TOKENIZER)
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
    return build(CLIPModel, config, converted(tensors), path, dtype)


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


def converted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors as transformers has them; unknown ones keep their names."""
    found: dict[str, Tensor] = {}
    for key, value in renamed(tensors, _NAMES).items():
        if key in ("text_projection.weight", "visual_projection.weight"):
            found[key] = value.T.contiguous()
        elif ".in_proj_" in key:  # queries, keys and values, stacked
            names = (key.replace(".in_proj_", f".{letter}_proj.") for letter in "qkv")
            found.update(zip(names, value.chunk(3), strict=True))
        else:
            found[key] = value
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
