"""Estimated peak memory of noise optimisation with SDXL-Turbo and ReNO's four rewards.

All models have their published sizes, in bfloat16, and are built from fake tensors, which hold no
data.

python -m benchmarks.sdxl.search_memory [--output benchmarks/results/search_memory.md]
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
)
from transformers.initialization import no_init_weights

from benchmarks.common import print_table
from benchmarks.sdxl.training_memory import full_generator
from oneshot_fast.generators.decoder import Decoder
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.jobs.optimize.plan import search_memory
from oneshot_fast.jobs.optimize.search import RewardSearch
from oneshot_fast.planning.memory import StepMemory
from oneshot_fast.rewards.base import Reward, WeightedRewards
from oneshot_fast.rewards.clip_encoder import ClipEncoder, CosineReward
from oneshot_fast.rewards.imagereward import ImageRewardReward
from oneshot_fast.search.samples import Sample

TARGET = 24e9
RESOLUTION = 512
PROMPT = Sample("0", 0, "a prompt", 0)
WEIGHTS = {"hpsv2": 5.0, "imagereward": 1.0, "clip": 0.01, "pickscore": 0.05}


def clip(large: bool) -> CLIPModel:
    """CLIP with ViT-L/14 or, ``large``, ViT-H/14."""
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    if not large:
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    text["num_attention_heads"] = text["hidden_size"] // 64
    vision |= {"num_attention_heads": 16, "patch_size": 14, "image_size": 224}
    width = 1024 if large else 768
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def cosine(name: str, model: Any, width: int) -> tuple[Reward, torch.Tensor]:
    """The reward, and what it knows of a prompt."""
    model.logit_scale = nn.Parameter(torch.zeros(()))
    return CosineReward(name, ClipEncoder(model, None), 1.0), torch.zeros(width)


def rewards_in(mode: FakeTensorMode, checkpointing: bool) -> WeightedRewards:
    """The four rewards on fake tensors, with the features of one prompt."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with mode, no_init_weights():
            clips = clip(large=False), clip(large=True), clip(large=True)
            see = BlipVisionModel(
                BlipVisionConfig(
                    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                    num_attention_heads=16, patch_size=16, image_size=224,
                )
            )  # fmt: skip
            read = BlipTextModel(
                BlipTextConfig(
                    vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, is_decoder=True
                ),
                add_pooling_layer=False,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    with mode:
        widths = (768, 1024, 128, 64, 16, 1)
        head = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    found = {
        "clip": cosine("clip", clips[0], 768),
        "hpsv2": cosine("hpsv2", clips[1], 1024),
        "pickscore": cosine("pickscore", clips[2], 1024),
        "imagereward": (
            ImageRewardReward(see, read, head, None), torch.ones(2, 35, dtype=torch.int64)
        ),
    }  # fmt: skip
    rewards = WeightedRewards(
        [(reward, WEIGHTS[name]) for name, (reward, _) in found.items()],
        checkpointing=checkpointing,
    )
    for name, (_, features) in found.items():
        rewards._features[name, PROMPT.prompt] = features
    return rewards.eval().requires_grad_(False)


def estimate(checkpointing: str, batch_size: int) -> StepMemory:
    """Memory of a step with ``--checkpointing`` none, rewards or full."""
    generator = full_generator(torch.bfloat16)
    generator.autocast = None
    generator.decoder = Decoder(generator.pipe.vae)
    if checkpointing != "none":
        generator.decoder.checkpoint()
    if checkpointing == "full":
        generator.denoiser.enable_gradient_checkpointing()
    mode = detect_fake_mode(list(generator.denoiser.parameters()))
    assert mode is not None
    rewards = rewards_in(mode, checkpointing != "none")
    search = RewardSearch(generator, rewards, OptimizeOptions(), resolution=RESOLUTION)
    return search_memory(search, PROMPT, batch_size)


def markdown() -> str:
    """A row per case, and the parts of the default."""
    cases = {(c, b): estimate(c, b) for c in ("none", "rewards", "full") for b in (1, 4)}
    lines = [
        f"Estimated for {RESOLUTION} x {RESOLUTION} pixels, SDXL-Turbo and the rewards "
        f"{', '.join(WEIGHTS)} in bfloat16, sphere; by running a step on tensors without data, "
        f"torch {torch.__version__}. What an allocator wastes and what CUDA takes for itself is "
        "not in it; nothing here was measured on a GPU.",
        "",
        "| --checkpointing | images at once | weights, GB | step, GB | peak, GB | within 24 GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (checkpointing, batch_size), memory in cases.items():
        weights = sum(memory.weights.values())
        lines.append(
            f"| {checkpointing} | {batch_size} | {weights / 1e9:.2f} | {memory.step / 1e9:.2f} | "
            f"{memory.peak / 1e9:.2f} | {'yes' if memory.peak < TARGET else 'no'} |"
        )
    part = cases["rewards", 1]
    lines += ["", "With --checkpointing rewards, one image:", "", "| part | GB |", "| --- | --- |"]
    lines += [f"| weights of {name} | {size / 1e9:.2f} |" for name, size in part.weights.items()]
    lines += [f"| {name} | {size / 1e9:.2f} |" for name, size in part.held.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print_table(__doc__, markdown)
