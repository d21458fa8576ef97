"""Estimated peak memory of distilling SDXL-base and SD3.5-medium, from tensors without data.

python -m benchmarks.jobs.student_memory [--output benchmarks/results/student_memory.md]
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextModelWithProjection

from benchmarks.common import print_table
from benchmarks.sdxl.models import clip_config
from benchmarks.sdxl.training_memory import full_generator
from oneshot_fast.embedded.pipeline import build_tokenizer
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.pipeline import PipelineGenerator
from oneshot_fast.generators.sd3 import Sd3Generator
from oneshot_fast.jobs.distill.options import DistillOptions
from oneshot_fast.jobs.distill.plan import distill_memory
from oneshot_fast.jobs.distill.run import losses_of
from oneshot_fast.planning.memory import StepMemory

RESOLUTION, BATCH, STEPS = 1024, 4, 4
COMMON: dict[str, Any] = {"batch_size": BATCH, "gradient_checkpointing": True}
CASES: dict[str, dict[str, Any]] = {
    "LoRA of rank 32, bfloat16 base": {"lora_rank": 32, "weights_dtype": "bfloat16"},
    "all weights, bfloat16, adamw8bit": {"weights_dtype": "bfloat16", "optimizer": "adamw8bit"},
    "all weights, float32, AdamW": {},
}
# of stabilityai/stable-diffusion-3.5-medium
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
    "dual_attention_layers": (*range(13),), "qk_norm": "rms_norm",
}  # fmt: skip


def sd35_medium(dtype: torch.dtype) -> PipelineGenerator:
    """The transformer's sizes; the text encoders, which are off the GPU, are small."""
    tokenizer, usual = build_tokenizer(), torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(dtype)
        transformer = SD3Transformer2DModel(**SD35_MEDIUM)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        torch.set_default_dtype(usual)
        texts = [
            CLIPTextModelWithProjection(clip_config(tokenizer, 32, 1, 1, "gelu")) for _ in range(2)
        ]
    pipe = StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, texts[0], tokenizer,
        texts[1], tokenizer, None, None,
    )  # fmt: skip
    return Sd3Generator(pipe, torch.bfloat16, None, True)


def estimates() -> dict[str, StepMemory]:
    """Memory of each case."""
    found = {}
    for model, make in (("SDXL-base", full_generator), ("SD3.5-medium", sd35_medium)):
        for name, flags in CASES.items():
            options = DistillOptions(**COMMON, **flags)
            made: Any = make(getattr(torch, options.weights_dtype))  # as the command loads it
            generator = FewStepGenerator.over(made, STEPS, eta=0.9, student=True)
            for offload in (False,) if options.lora_rank else (False, True):
                case = f"{model}, {name}{', `--offload`' if offload else ''}"
                found[case] = distill_memory(
                    generator, options,
                    lambda roles, model, shape, options=options: losses_of(
                        roles, model, shape, options
                    ),
                    RESOLUTION, offloads=True, offload=offload,
                )  # fmt: skip
    return found


def markdown(found: dict[str, StepMemory]) -> str:
    """The table."""
    lines = [
        "Estimate, not measured on a GPU. Peak memory in GB (1e9 bytes) of `distill` (AC-DMD) at "
        f"{RESOLUTION} x {RESOLUTION} pixels, {BATCH} images per step, {STEPS} steps, gradient "
        "checkpointing, computed in bfloat16, text encoders and VAE's encoder off the GPU: "
        "`python -m benchmarks.jobs.student_memory`. `networks` are the student's, the fake's and "
        "the teacher's, one base for all three with a LoRA, and with `--offload`, as the moments, "
        "those on the GPU at the peak. Left out: what the allocator wastes, the CUDA context, "
        "workspaces of cuDNN and cuBLAS.",
        "",
        "| case | networks | VAE | moments and average | step | peak |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, memory in found.items():
        vae = memory.weights.get("vae", 0)
        networks = sum(memory.weights.values()) - vae
        sizes = networks, vae, sum(memory.kept.values()), memory.step, memory.peak
        lines.append(f"| {name} | {' | '.join(f'{size / 1e9:.2f}' for size in sizes)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print_table(__doc__, lambda: markdown(estimates()))
