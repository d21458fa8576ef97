"""What an evaluation and a verification of published models cost: the table of docs/scale.md.

    python -m benchmarks.jobs.flops

TFLOP of one image, 2 for a multiply-add, attention included, counted on networks of the published
sizes without weights; nothing is downloaded. `scale run --dry_run` counts a model that is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from oneshot_fast.planning.costs import counted

SIDES = (512, 1024)


def sdxl() -> Any:
    """The UNet of SDXL, 77 text tokens."""
    from diffusers import UNet2DConditionModel

    blocks = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    net = UNet2DConditionModel(
        down_block_types=blocks,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip

    def run(side: int) -> Any:
        more = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        x, text = torch.zeros(1, 4, side // 8, side // 8), torch.zeros(1, 77, 2048)
        return net(x, torch.zeros(1), text, added_cond_kwargs=more)

    return run


def sd3(tokens: int, dual: int = 0) -> Any:
    """The transformer of SD3-medium; of SD3.5-medium with 13 layers of dual attention."""
    from diffusers import SD3Transformer2DModel

    more: Any = {"dual_attention_layers": tuple(range(dual)), "qk_norm": "rms_norm"} if dual else {}
    net = SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
        pos_embed_max_size=384 if dual else 192, **more,
    )  # fmt: skip

    def run(side: int) -> Any:
        x, text = torch.zeros(1, 16, side // 8, side // 8), torch.zeros(1, tokens, 4096)
        return net(x, text, torch.zeros(1, 2048), torch.zeros(1))

    return run


def flux(tokens: int) -> Any:
    """The transformer of FLUX.1."""
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(guidance_embeds=True)

    def run(side: int) -> Any:
        patches = (side // 16) ** 2
        return net(
            torch.zeros(1, patches, 64), torch.zeros(1, tokens, 4096), torch.zeros(1, 768),
            torch.zeros(1), torch.zeros(patches, 3), torch.zeros(tokens, 3), torch.zeros(1),
        )  # fmt: skip

    return run


def vae(channels: int) -> Any:
    """The decoder of SDXL (4 channels), SD3 and FLUX.1 (16)."""
    from diffusers import AutoencoderKL

    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels,
    )  # fmt: skip
    return lambda side: net.decode(torch.zeros(1, channels, side // 8, side // 8))


def tiny_vae(channels: int) -> Any:
    """The decoder of TAESD: TAESDXL (4 channels), TAESD3 and TAEF1 (16)."""
    from diffusers import AutoencoderTiny

    net = AutoencoderTiny(latent_channels=channels)
    return lambda side: net.decode(torch.zeros(1, channels, side // 8, side // 8))


def clip(width: int, layers: int, heads: int, patch: int, hidden: int) -> Any:
    """A CLIP image tower at 224 pixels, whatever the image's side."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    net = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, patch_size=patch,
        intermediate_size=hidden,
    ))  # fmt: skip
    return lambda side: net(torch.zeros(1, 3, 224, 224))


def imagereward() -> Any:
    """BLIP's ViT-L, and a BERT of 35 tokens that sees the image."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionModel(BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=224,
    ))  # fmt: skip
    text = BlipTextModel(
        BlipTextConfig(encoder_hidden_size=1024, is_decoder=True, num_attention_heads=12),
        add_pooling_layer=False,
    )

    def run(side: int) -> Any:
        seen = vision(torch.zeros(1, 3, 224, 224)).last_hidden_state
        return text(torch.zeros(1, 35, dtype=torch.long), encoder_hidden_states=seen)

    return run


MODELS: dict[str, Callable[[], Any]] = {
    "evaluation: SDXL UNet (with guidance: twice)": sdxl,
    "evaluation: SD3-medium, 333 text tokens": lambda: sd3(333),
    "evaluation: SD3.5-medium, 333 text tokens": lambda: sd3(333, dual=13),
    "evaluation: SD3.5-medium, 154 text tokens": lambda: sd3(154, dual=13),
    "evaluation: FLUX.1, 512 text tokens": lambda: flux(512),
    "evaluation: FLUX.1, 256 text tokens": lambda: flux(256),
    "decoding: SDXL VAE": lambda: vae(4),
    "decoding: SD3 and FLUX.1 VAE": lambda: vae(16),
    "decoding: TAESDXL": lambda: tiny_vae(4),
    "decoding: TAESD3, TAEF1": lambda: tiny_vae(16),
    "scoring: CLIP ViT-L/14 image tower (clip, aesthetic)": lambda: clip(1024, 24, 16, 14, 4096),
    "scoring: CLIP ViT-H/14 image tower (hpsv2, pickscore)": lambda: clip(1280, 32, 16, 14, 5120),
    "scoring: ImageReward": imagereward,
}


def main() -> None:
    """Print the table."""
    print(f"| part | {' | '.join(f'{side} px' for side in SIDES)} |\n| --- | --- | --- |")
    for name, make in MODELS.items():
        with torch.device("meta"), torch.no_grad():
            run = make()
            found = [counted(lambda side=side, run=run: run(side))[0] / 1e12 for side in SIDES]
        print(f"| {name} | {' | '.join(f'{value:.4g}' for value in found)} |")


if __name__ == "__main__":
    main()
