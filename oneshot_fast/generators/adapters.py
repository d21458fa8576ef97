"""Low-rank adapters of attention (LoRA, Hu et al. 2021, arXiv 2106.09685), by peft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.runtime.files import write_folder

# the attention projections that diffusers' own training scripts adapt
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_adapter(denoiser: Any, rank: int, alpha: float | None, seed: int = 0) -> None:
    """Put a float32 adapter, the only trained part, on the attention projections of ``denoiser``.

    Its output is alpha / rank * B(A(x)); A is Gaussian and B zero, so that it begins as nothing.

    Args:
        denoiser: A frozen network of diffusers.
        rank: Rows of A.
        alpha: Its scale; None takes ``rank``.
        seed: Of A.

    Raises:
        UserError: If the module takes no adapter.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    if not hasattr(denoiser, "add_adapter"):
        raise UserError("this model takes no adapter; leave --lora_rank out")
    scale: Any = rank if alpha is None else alpha  # peft computes with floats, though it says int
    config = LoraConfig(
        r=rank, lora_alpha=scale, init_lora_weights="gaussian", target_modules=list(TARGETS)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser.add_adapter(config)
    cast_training_params(denoiser, torch.float32)


def write_adapter(pipe: Any, part: str, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter that diffusers' ``pipe.load_lora_weights(folder)`` reads, atomically.

    Args:
        pipe: A pipeline of diffusers.
        part: Name of its network with an adapter of this shape.
        weights: The adapter's weights, by their names in the network.
        folder: Where pytorch_lora_weights.safetensors is written.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    network: Any = getattr(pipe, part)
    state = get_peft_model_state_dict(network, state_dict=dict(weights))
    config = network.peft_config["default"]
    # what there is to know; peft's whole configuration would bind the file to its version
    metadata = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": list(TARGETS)}
    named = {
        f"{part}_lora_layers": convert_state_dict_to_diffusers(state),
        f"{part}_lora_adapter_metadata": metadata,
    }
    with write_folder(folder) as temporary:
        type(pipe).save_lora_weights(temporary, **named)


def merge_adapter(denoiser: Any) -> None:
    """Add the adapter to the weights it adapts, and take it off.

    Args:
        denoiser: A network of diffusers with an adapter; in float32 the sum is exact but for
            rounding.
    """
    denoiser.fuse_lora()
    denoiser.unload_lora()
