"""One-step SDXL pipelines of any size with random weights, built without a download."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from oneshot_fast.data.pairs import write_pairs
from oneshot_fast.embedded.pipeline import build_tokenizer, random_pipeline

# The published sizes of SDXL-Turbo, and a model of the same shape for a CPU.
SIZES = {
    "full": {
        "image": 512,
        "unet": {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        },
        "vae": (128, 256, 512, 512),
        "text": ((768, 12, 12), (1280, 32, 20)),  # width, layers, heads
    },
    "small": {
        "image": 256,
        "unet": {
            "block_out_channels": (96, 192, 384),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (3, 6, 12),
            "cross_attention_dim": 256,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 6 * 32 + 128,
        },
        "vae": (32, 64, 128, 128),
        "text": ((128, 4, 4), (128, 4, 4)),
    },
}


def build_unet(arch: str) -> UNet2DConditionModel:
    """The UNet of ``full`` or ``small``."""
    size = SIZES[arch]
    return UNet2DConditionModel(
        sample_size=size["image"] // 8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        **size["unet"],
    )


def build_pipeline(arch: str, device: str, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """A pipeline with random weights; its VAE is float32, as SDXL-Turbo's is used.

    Args:
        arch: "full", "small" or "tiny" (the embedded model's sizes).
        device: Where it is built and lives.
        dtype: Of the UNet and the text encoders.
    """
    torch.manual_seed(0)
    if arch == "tiny":
        pipe = random_pipeline(0)
    else:
        size, tokenizer = SIZES[arch], build_tokenizer()
        with torch.device(device):
            pipe = StableDiffusionXLPipeline(
                vae=AutoencoderKL(
                    sample_size=size["image"],
                    block_out_channels=size["vae"],
                    layers_per_block=2,
                    down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4,
                    latent_channels=4,
                    force_upcast=True,
                ),
                text_encoder=CLIPTextModel(clip_config(tokenizer, *size["text"][0], "quick_gelu")),
                text_encoder_2=CLIPTextModelWithProjection(
                    clip_config(tokenizer, *size["text"][1], "gelu")
                ),
                tokenizer=tokenizer,
                tokenizer_2=build_tokenizer(),
                unet=build_unet(arch),
                scheduler=EulerAncestralDiscreteScheduler(
                    beta_start=0.00085,
                    beta_end=0.012,
                    beta_schedule="scaled_linear",
                    timestep_spacing="trailing",
                ),
                add_watermarker=False,
            )
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        module.to(device, dtype).eval()
    pipe.vae.to(device, torch.float32).eval()
    return pipe


def clip_config(
    tokenizer: CLIPTokenizer, width: int, layers: int, heads: int, activation: str
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def write_data(folder: Path, count: int, side: int) -> None:
    """A data set of ``count`` smooth random pictures of ``side`` pixels, with a prompt each."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=draw)
    pictures = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    prompts = [f"the digit {k % 10}" for k in range(count)]
    write_pairs(folder, prompts, [f"{k:04d}.png" for k in range(count)], pictures)
