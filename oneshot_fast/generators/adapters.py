"""Low-rank adapters of the UNet's attention (LoRA, Hu et al. 2021, arXiv 2106.09685), by peft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.runtime.files import write_folder

if TYPE_CHECKING:
    from oneshot_fast.generators.sdxl import OneStepGenerator

# the attention projections that diffusers' own training scripts adapt
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_adapter(unet: Any, rank: int, alpha: float | None, seed: int = 0) -> None:
    """Put a float32 adapter, the only trained part, on the attention projections of ``unet``.

    Its output is alpha / rank * B(A(x)); A is Gaussian and B zero, so that it begins as nothing.

    Args:
        unet: A frozen UNet of diffusers.
        rank: Rows of A.
        alpha: Its scale; None takes ``rank``.
        seed: Of A.

    Raises:
        UserError: If the module takes no adapter.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    if not hasattr(unet, "add_adapter"):
        raise UserError("this model takes no adapter; leave --lora_rank out")
    config = LoraConfig(
        r=rank,
        # peft computes with floats, though it says int
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        init_lora_weights="gaussian",
        target_modules=list(TARGETS),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(config)
    cast_training_params(unet, torch.float32)


def save_adapter(generator: OneStepGenerator, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter that diffusers' ``pipe.load_lora_weights(folder)`` reads, atomically.

    Args:
        generator: Its UNet has an adapter of this shape.
        weights: The adapter's weights, by their names in the UNet.
        folder: Where pytorch_lora_weights.safetensors is written.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    unet: Any = generator.unet
    state = get_peft_model_state_dict(unet, state_dict=dict(weights))
    config = unet.peft_config["default"]
    # what there is to know; peft's whole configuration would bind the file to its version
    metadata = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": list(TARGETS)}
    with write_folder(folder) as temporary:
        type(generator.pipe).save_lora_weights(
            temporary,
            unet_lora_layers=convert_state_dict_to_diffusers(state),
            unet_lora_adapter_metadata=metadata,
        )


def merge_adapter(unet: Any) -> None:
    """Add the adapter to the weights it adapts, and take it off.

    Args:
        unet: A UNet of diffusers with an adapter; in float32 the sum loses nothing but rounding.
    """
    unet.fuse_lora()
    unet.unload_lora()
