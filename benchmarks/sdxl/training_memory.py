"""Estimated peak memory of full-size SDXL-Turbo; builds it from fake tensors, which hold no data.

python -m benchmarks.sdxl.training_memory [--output benchmarks/results/training_memory.md]
"""

import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.common import print_table
from benchmarks.sdxl.models import SIZES, build_pipeline, build_unet, clip_config
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.decoder import Decoder
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.plan import assignment_memory
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.plan import training_memory
from oneshot_fast.planning.memory import StepMemory

RESOLUTION = 512
LATENT_ONLY = {"batch_size": 1, "preserve_pixel_weight": 0.0, "gradient_checkpointing": True}
SELECTIVE = {"gradient_checkpointing": False, "selective_checkpointing": True}
SMALL_STATE = {"weights_dtype": "bfloat16", "optimizer": "adamw8bit"}


def full_generator(dtype: torch.dtype) -> Generator:
    """SDXL-Turbo's sizes on fake tensors, computing in bfloat16.

    Args:
        dtype: Of all weights.
    """
    pipe = build_pipeline("tiny", "cpu", torch.float32)
    texts, tokenizer, channels = SIZES["full"]["text"], pipe.tokenizer, SIZES["full"]["vae"]
    previous = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(dtype)
        try:
            vae = AutoencoderKL(
                block_out_channels=channels,
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=4,
                force_upcast=True,
            )
            unet = build_unet("full")
            text = CLIPTextModel(clip_config(tokenizer, *texts[0], "quick_gelu"))
            text_2 = CLIPTextModelWithProjection(clip_config(tokenizer, *texts[1], "gelu"))
        finally:
            torch.set_default_dtype(previous)
    generator = SdxlGenerator(pipe, autocast=torch.bfloat16)
    pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2 = (
        module.requires_grad_(False).eval() for module in (unet, vae, text, text_2)
    )
    generator.decoder = Decoder(generator.pipe.vae)
    return generator


def estimates() -> dict[str, tuple[StepMemory, str]]:
    """Each case's memory and its target."""
    generator = full_generator(torch.float32)  # as the training loads it
    sft = {
        "SFT, all options for little memory": (
            {**LATENT_ONLY, **SMALL_STATE, "optimizer_in_backward": True}, "16",
        ),
        "SFT, without optimizer_in_backward": ({**LATENT_ONLY, **SMALL_STATE}, "-"),
        "SFT, float32 weights, AdamW, checkpointing": (LATENT_ONLY, "-"),
        "SFT, float32 weights, AdamW, no checkpointing": (
            {**LATENT_ONLY, "gradient_checkpointing": False}, "-",
        ),
        "SFT, all options for little memory, but selective checkpointing": (
            {**LATENT_ONLY, **SMALL_STATE, **SELECTIVE, "optimizer_in_backward": True}, "-",
        ),
        "LoRA rank 16, bfloat16 base, checkpointing": (
            {**LATENT_ONLY, **SMALL_STATE, "lora_rank": 16}, "9",
        ),
        "LoRA rank 16, bfloat16 base, no checkpointing": (
            {**LATENT_ONLY, **SMALL_STATE, "lora_rank": 16, "gradient_checkpointing": False}, "-",
        ),
        "LoRA rank 16, bfloat16 base, selective checkpointing": (
            {**LATENT_ONLY, **SMALL_STATE, **SELECTIVE, "lora_rank": 16}, "-",
        ),
    }  # fmt: skip
    found = {
        name: (training_memory(generator, SftOptions(**flags), RESOLUTION), target)
        for name, (flags, target) in sft.items()
    }
    found["assignment, bfloat16, latent loss"] = (
        assignment_memory(full_generator(torch.bfloat16), AssignOptions(), RESOLUTION, 1), "9",
    )  # fmt: skip
    return found


def markdown(found: dict[str, tuple[StepMemory, str]]) -> str:
    """The table."""
    names = "trained, 1e6|UNet|moments|gradients|activations|step|peak, UNet only|text encoders|VAE"
    lines = [
        "Estimate, not measured on a GPU. Peak memory in GB (1e9 bytes) of SDXL-Turbo at "
        f"{RESOLUTION} x {RESOLUTION} pixels, one pair and one preserve noise per step, computed "
        "in bfloat16, with latent losses: `python -m benchmarks.sdxl.training_memory`. "
        "`step` is the "
        "most that gradients, activations and temporary tensors take together; `peak, UNet only` "
        "is with the text encoders and the VAE off the GPU, as SFT on a GPU has them by default, "
        "`peak` with them on it (`--offload_encoders False`). Left out: what the allocator "
        "wastes, the CUDA context, workspaces of cuDNN and cuBLAS, the optimiser's temporary "
        "tensors but those of torch's AdamW.",
        "",
        f"| case | {names.replace('|', ' | ')} | peak | target |",
        "|" + " --- |" * (names.count("|") + 4),
    ]
    for name, (memory, target) in found.items():
        weights = memory.weights
        rest = sum(weights.values()) - weights["unet"]
        moments = memory.kept.get("optimiser's moments", 0)
        gradients, kept = memory.held.get("gradients", 0), memory.held["activations"]
        sizes = (
            weights["unet"], moments, gradients, kept, memory.step,
            memory.peak - rest, rest - weights["vae"], weights["vae"], memory.peak,
        )  # fmt: skip
        cells = [f"{memory.trained / 1e6:.1f}", *(f"{size / 1e9:.2f}" for size in sizes), target]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print_table(__doc__, lambda: markdown(estimates()))
