"""A generator from one .safetensors file in the layout of SDXL's own release."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from oneshot_fast.embedded.pipeline import model_path
from oneshot_fast.errors import ModelError
from oneshot_fast.generators.loading import load_generator


def original_layout(pipe: StableDiffusionXLPipeline) -> dict[str, Tensor]:
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


def test_a_single_file_loads_like_the_folder(tmp_path: Path) -> None:
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
    wide.save_pretrained(tmp_path / "folder")
    save_file(original_layout(wide), tmp_path / "model.safetensors")
    single = load_generator(tmp_path / "model.safetensors", model_config=str(tmp_path / "folder"))
    folder = load_generator(tmp_path / "folder")
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
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(ModelError, match=r"^cannot use model [^\n]+$"):
        load_generator(tmp_path / "model.safetensors", model_config=str(tmp_path / "folder"))
