"""The names that the weights of SD3's, FLUX's and Z-Image's transformers have in their releases."""

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

# by the first part of a name, else of "": parts of names, between points, in diffusers and there;
# what gets one name is joined in this order
Names: TypeAlias = Mapping[str, Mapping[str, str]]

_SD3: Names = {
    "": {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    "transformer_blocks": {
        "transformer_blocks": "joint_blocks",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        **{
            f"{attention}.{old}": f"x_block.{attention}.{new}"
            for attention in ("attn", "attn2")
            for old, new in (
                ("to_q", "qkv"), ("to_k", "qkv"), ("to_v", "qkv"), ("norm_q", "ln_q"),
                ("norm_k", "ln_k"), ("to_out.0", "proj"),
            )
        },
        "attn.add_q_proj": "context_block.attn.qkv",
        "attn.add_k_proj": "context_block.attn.qkv",
        "attn.add_v_proj": "context_block.attn.qkv",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn.to_add_out": "context_block.attn.proj",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    },
}  # fmt: skip
_FLUX: Names = {
    "": {
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    "transformer_blocks": {
        "transformer_blocks": "double_blocks",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.to_q": "img_attn.qkv",
        "attn.to_k": "img_attn.qkv",
        "attn.to_v": "img_attn.qkv",
        "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
        "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
        "attn.to_out.0": "img_attn.proj",
        "attn.add_q_proj": "txt_attn.qkv",
        "attn.add_k_proj": "txt_attn.qkv",
        "attn.add_v_proj": "txt_attn.qkv",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    },
    "single_transformer_blocks": {
        "single_transformer_blocks": "single_blocks",
        "norm.linear": "modulation.lin",
        "attn.to_q": "linear1",
        "attn.to_k": "linear1",
        "attn.to_v": "linear1",
        "proj_mlp": "linear1",
        "attn.norm_q.weight": "norm.query_norm.scale",
        "attn.norm_k.weight": "norm.key_norm.scale",
        "proj_out": "linear2",
    },
}
_Z_IMAGE: Names = {
    "": {
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1": "final_layer",
        "attention.to_q": "attention.qkv",
        "attention.to_k": "attention.qkv",
        "attention.to_v": "attention.qkv",
        "attention.norm_q": "attention.q_norm",
        "attention.norm_k": "attention.k_norm",
        "attention.to_out.0": "attention.out",
    }
}
TRANSFORMERS = {
    "SD3Transformer2DModel": _SD3,
    "FluxTransformer2DModel": _FLUX,
    "ZImageTransformer2DModel": _Z_IMAGE,
}


def transformer_weights(network: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of one of these transformers of diffusers, named and joined as in its release."""
    names = TRANSFORMERS[type(network).__name__]
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for name, value in weights.items():
        table, place = names.get(name.split(".")[0], names[""]), 0
        for k, (old, new) in enumerate(table.items()):
            name, count = re.subn(rf"(?<![^.]){re.escape(old)}(?=\.|$)", new, name)
            place = k if count else place
        found.setdefault(name, []).append((place, value))
    joined = {
        name: torch.cat([value for _, value in sorted(rows, key=lambda row: row[0])])
        if rows[1:]
        else rows[0][1]
        for name, rows in found.items()
    }
    return joined | {name: _swapped(joined[name]) for name in _shifts(network) & joined.keys()}


def _shifts(network: Any) -> set[str]:
    """Weights there of a shift and a scale, which in diffusers are a scale and a shift."""
    kind, modules = type(network).__name__, list[str]()
    if kind in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        modules.append("final_layer.adaLN_modulation.1")
    if kind == "SD3Transformer2DModel":
        last = len(network.transformer_blocks) - 1
        modules.append(f"joint_blocks.{last}.context_block.adaLN_modulation.1")
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def _swapped(value: Tensor) -> Tensor:
    return torch.cat(value.chunk(2)[::-1])
