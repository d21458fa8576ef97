"""Activations that the backward pass recomputes, so that the forward pass need not keep them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from oneshot_fast.training.batch import SftOptions

_COSTLY = (
    "convolution",
    "mm",
    "addmm",
    "bmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)  # aten ops whose results selective checkpointing keeps


def checkpoint_activations(unet: Any, options: SftOptions) -> None:
    """Let ``unet``, of diffusers or with the same method, recompute what ``options`` say."""
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    elif options.selective_checkpointing:
        unet.enable_gradient_checkpointing(_run_selectively)


def _run_selectively(module: nn.Module, *args: Any) -> Any:
    """Call a block that keeps its costly results, and recomputes norms and activation functions."""
    costly = [getattr(torch.ops.aten, name).default for name in _COSTLY]
    contexts = partial(create_selective_checkpoint_contexts, costly)
    return checkpoint(
        module.__call__,
        *args,
        use_reentrant=False,
        context_fn=contexts,
        preserve_rng_state=False,  # nothing here is random: the networks have no dropout
    )
