"""Memory that a training can do without: activations are recomputed, networks wait on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from oneshot_fast.generators.base import Generator
from oneshot_fast.training.options import TrainOptions

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


def checkpoint_activations(module: Any, options: TrainOptions) -> None:
    """Let ``module``, of diffusers or with the same method, recompute what ``options`` say."""
    if options.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    elif options.selective_checkpointing:
        module.enable_gradient_checkpointing(_run_selectively)


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


@contextmanager
def offloaded(
    generator: Generator, keep_decoder: bool, device: str | torch.device = "cpu"
) -> Iterator[None]:
    """Keep what only encodes, and the decoder unless ``keep_decoder``, on ``device`` meanwhile."""
    home = generator.device
    parts = [module for part in generator.encoders(keep_decoder).values() for module in part]
    try:
        for module in parts:
            module.to(device)
        if home.type == "cuda":
            torch.cuda.empty_cache()
        yield
    finally:
        for module in parts:
            module.to(home)
