"""Tiny random pipelines of every diffusers class that is read, and the schedulers of each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
)

from oneshot_fast.embedded.pipeline import build_tokenizer
from oneshot_fast.generators.loading import PIPELINES
from oneshot_fast.generators.pipeline import PipelineGenerator

WIDTH = 16  # of text and attention
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_DIFFUSION = {**_BETAS, "timestep_spacing": "trailing", "clip_sample": False, "steps_offset": 1}

# each family's schedulers: those of published models, and what else these networks are run with
SCHEDULERS: dict[str, tuple[tuple[Any, dict[str, Any]], ...]] = {
    "StableDiffusionPipeline": (
        (EulerDiscreteScheduler, {}),  # SD-Turbo
        (EulerDiscreteScheduler, {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
        (EulerDiscreteScheduler, {"prediction_type": "sample"}),
        (EulerAncestralDiscreteScheduler, {"prediction_type": "v_prediction"}),
        (LCMScheduler, {"original_inference_steps": 20}),
        (LCMScheduler, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        (TCDScheduler, {"prediction_type": "sample"}),
        (DDIMScheduler, {"set_alpha_to_one": False}),
        (DDIMScheduler, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        (DDPMScheduler, {}),
    ),
    "LatentConsistencyModelPipeline": ((LCMScheduler, {}),),
    "StableDiffusionXLPipeline": (
        (EulerAncestralDiscreteScheduler, {}),  # SDXL-Turbo
        (EulerDiscreteScheduler, {"prediction_type": "sample"}),  # SDXL-Lightning of one step
        (TCDScheduler, {}),  # Hyper-SD
        (LCMScheduler, {}),  # DMD2
        (DDIMScheduler, {}),
    ),
    "StableDiffusion3Pipeline": (
        (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
        (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}),
    ),
    "FluxPipeline": (
        (FlowMatchEulerDiscreteScheduler, {"shift": 1.0}),
        (FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "use_dynamic_shifting": True}),
    ),
    "SanaSprintPipeline": ((SCMScheduler, {"prediction_type": "trigflow", "sigma_data": 0.5}),),
    "PixArtAlphaPipeline": (
        (DDPMScheduler, {}),
        (LCMScheduler, {}),
        (EulerDiscreteScheduler, {}),
    ),
    "ZImagePipeline": ((FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),),
}
FAMILIES = tuple(SCHEDULERS)
# what a call of each needs beside prompts, noise and size to be one plain step
CALLS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"guidance_scale": 0.0},
    "LatentConsistencyModelPipeline": {},
    "StableDiffusionXLPipeline": {"guidance_scale": 0.0},
    "StableDiffusion3Pipeline": {"guidance_scale": 0.0},
    "FluxPipeline": {},
    "SanaSprintPipeline": {"intermediate_timesteps": None, "use_resolution_binning": False},
    "PixArtAlphaPipeline": {
        "guidance_scale": 1.0, "clean_caption": False, "use_resolution_binning": False
    },
    "ZImagePipeline": {"guidance_scale": 0.0},
}  # fmt: skip


def family(name: str) -> type[PipelineGenerator]:
    """The class that reads pipelines of the class ``name``."""
    module, kind = PIPELINES[name].split(".")
    return getattr(importlib.import_module(f"oneshot_fast.generators.{module}"), kind)


def side_of(name: str) -> int:
    """Pixels of the images that a tiny pipeline makes."""
    return 32 if name == "SanaSprintPipeline" else 16


def tiny_pipeline(name: str, scheduler: Any = None, **config: Any) -> Any:
    """A pipeline of the class ``name`` with random weights.

    Its scheduler is ``scheduler(**config)``, by default the first of the family.
    """
    if scheduler is None:
        scheduler, config = SCHEDULERS[name][0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = _PARTS[name]()
        usual = {} if scheduler in (FlowMatchEulerDiscreteScheduler, SCMScheduler) else _DIFFUSION
        parts["scheduler"] = scheduler.from_config({**usual, **config})
        for key in [key for key in parts if key.startswith("text_encoder")]:
            parts[key.replace("text_encoder", "tokenizer")] = build_tokenizer()
        pipe = getattr(diffusers, name)(**parts)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            for parameter in part.parameters():  # some begin as zeros
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
    if name == "ZImagePipeline":
        pipe.tokenizer.chat_template = "{% for m in messages %}ask {{ m['content'] }}{% endfor %}"
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _vae(channels: int, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        force_upcast=False,
        **config,
    )


def _flow_vae(channels: int) -> AutoencoderKL:
    return _vae(
        channels, scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip


def _clip(kind: Any = transformers.CLIPTextModel, width: int = WIDTH, **config: Any) -> Any:
    tokenizer = build_tokenizer()
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width,
            projection_dim=width, num_attention_heads=2, max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, **{"num_hidden_layers": 1, **config},
        )
    )  # fmt: skip


def _t5(width: int = WIDTH) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(build_tokenizer()), d_model=width, d_kv=8, d_ff=WIDTH, num_layers=1,
            num_heads=2, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def _decoder_only(config: Any, model: Any, **more: Any) -> Any:
    return model(
        config(
            vocab_size=len(build_tokenizer()), hidden_size=WIDTH, intermediate_size=WIDTH,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, **more,
        )
    )  # fmt: skip


def _unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **{"cross_attention_dim": WIDTH, **config},
    )


def sd2_pipeline() -> Any:
    """One of SD2's shape: its text encoder is OpenCLIP's, 23 layers of the 24 that it was."""
    pipe = tiny_pipeline("StableDiffusionPipeline")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.text_encoder = _clip(hidden_act="gelu", num_hidden_layers=23).eval()
    return pipe


def _sd(**unet: Any) -> dict[str, Any]:
    lacking = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {"vae": _vae(4), "text_encoder": _clip(), "unet": _unet(**unet), **lacking}


def _sdxl() -> dict[str, Any]:
    unet = _unet(
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )  # fmt: skip
    second = _clip(transformers.CLIPTextModelWithProjection)
    return {
        "vae": _vae(4), "unet": unet, "text_encoder": _clip(), "text_encoder_2": second,
        "add_watermarker": False,
    }  # fmt: skip


def _sd3() -> dict[str, Any]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=3 * WIDTH,
        caption_projection_dim=WIDTH, pooled_projection_dim=3 * WIDTH, pos_embed_max_size=16,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection
    first, second = _clip(kind), _clip(kind, 2 * WIDTH)  # told apart in one file by their widths
    torch.nn.init.eye_(first.text_projection.weight)  # as in the published ones
    return {
        "transformer": transformer, "vae": _flow_vae(4), "text_encoder": first,
        "text_encoder_2": second, "text_encoder_3": _t5(3 * WIDTH),
    }  # fmt: skip


def _flux() -> dict[str, Any]:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 2, 2), guidance_embeds=True,
    )  # fmt: skip
    return {
        "transformer": transformer, "vae": _flow_vae(4), "text_encoder": _clip(),
        "text_encoder_2": _t5(),
    }  # fmt: skip


def _sana() -> dict[str, Any]:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=WIDTH,
        caption_channels=WIDTH, sample_size=8, guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), downsample_block_type="conv", scaling_factor=0.4,
    )  # fmt: skip
    text = _decoder_only(transformers.Gemma2Config, transformers.Gemma2Model)
    return {"transformer": transformer, "vae": vae, "text_encoder": text}


def _pixart() -> dict[str, Any]:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1,
        num_attention_heads=2, attention_head_dim=8, cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
    )  # fmt: skip
    return {"transformer": transformer, "vae": _vae(4), "text_encoder": _t5()}


def _z_image() -> dict[str, Any]:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=WIDTH, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=WIDTH, axes_dims=[4, 2, 2], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    text = _decoder_only(transformers.Qwen3Config, transformers.Qwen3Model)
    return {"transformer": transformer, "vae": _flow_vae(4), "text_encoder": text}


_PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "StableDiffusionPipeline": _sd,
    "LatentConsistencyModelPipeline": lambda: _sd(time_cond_proj_dim=8),
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "SanaSprintPipeline": _sana,
    "PixArtAlphaPipeline": _pixart,
    "ZImagePipeline": _z_image,
}
