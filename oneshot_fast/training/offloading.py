"""Networks that a stage does not use wait on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator


def offloads_by_default(generator: Generator) -> bool:
    """Whether there is memory to free: on a GPU."""
    return generator.device.type != "cpu"


@contextmanager
def offloaded(
    generator: Generator, keep_decoder: bool, device: str | torch.device = "cpu"
) -> Iterator[None]:
    """Keep text encoders and image encoder on ``device``; they still encode, there.

    Args:
        generator: Its denoiser stays where it is.
        keep_decoder: Leave the VAE's decoder where it is, too.
        device: Where the others wait.
    """
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
