"""Networks that a stage does not use wait on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from oneshot_fast.generators.sdxl import OneStepGenerator


def offloads_by_default(generator: OneStepGenerator) -> bool:
    """Whether there is memory to free: on a GPU."""
    return generator.device.type != "cpu"


def encoders(generator: OneStepGenerator, keep_decoder: bool) -> dict[str, list[nn.Module]]:
    """What only encodes, by the name of its network; the whole VAE without ``keep_decoder``."""
    networks = dict(generator.networks)
    del networks["unet"]
    parts = {name: [network] for name, network in networks.items()}
    vae = networks.get("vae")
    if vae is not None and keep_decoder:
        parts["vae"] = [m for name in ("encoder", "quant_conv") if (m := getattr(vae, name, None))]
    return parts


@contextmanager
def offloaded(
    generator: OneStepGenerator, keep_decoder: bool, device: str | torch.device = "cpu"
) -> Iterator[None]:
    """Keep text encoders and image encoder on ``device``; they still encode, there.

    Args:
        generator: Its UNet stays where it is.
        keep_decoder: Leave the VAE's decoder where it is, too.
        device: Where the others wait.
    """
    home = generator.device
    parts = [module for part in encoders(generator, keep_decoder).values() for module in part]
    try:
        for module in parts:
            module.to(device)
        if home.type == "cuda":
            torch.cuda.empty_cache()
        yield
    finally:
        for module in parts:
            module.to(home)
