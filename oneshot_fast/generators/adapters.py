"""Low-rank adapters of attention (LoRA, Hu et al. 2021, arXiv 2106.09685), by peft."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.generators.lora_files import Adapter
from oneshot_fast.runtime.files import write_folder

# attention projections; those that diffusers' training scripts for SD and SDXL adapt, and where the
# text has a stream of its own (SD3, FLUX) its own, as their DreamBooth scripts
_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", *_TEXT)
_KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}


def add_adapter(
    denoiser: Any,
    rank: int,
    alpha: float | None,
    seed: int = 0,
    start: Adapter | None = None,
    name: str = "default",
) -> None:
    """Put a float32 adapter, the only trained part, on the attention projections of ``denoiser``.

    Its output is alpha / rank * B(A(x)); A is Gaussian and B zero, so that it begins as nothing.
    One named "default" computes beside those of ``stack_adapters``; another waits for its ``role``.

    Args:
        denoiser: A frozen network of diffusers.
        rank: Rows of A.
        alpha: Its scale; None takes ``rank``.
        seed: Of A.
        start: Instead: an adapter to go on with, on the modules that it adapts.
        name: The adapter's.

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
    before = active_adapters(denoiser)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of a second adapter
        torch.manual_seed(seed)
        denoiser.add_adapter(config if start is None else start.config, name)
    cast_training_params(denoiser, torch.float32)
    own = {key: p for key, p in denoiser.named_parameters() if f".{name}." in key}
    with torch.no_grad():
        for key, value in {} if start is None else start.weights.items():
            own[key.replace(".default.", f".{name}.")].copy_(value)
    denoiser.set_adapter([*before, name] if name == "default" else before or [name])
    denoiser.requires_grad_(False)
    for parameter in own.values():
        parameter.requires_grad_()


def stack_adapters(denoiser: Any, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Put frozen float32 adapters on ``denoiser``, each with a factor, which all compute."""
    names = [f"stacked_{k}" for k in range(len(adapters))]
    for name, (adapter, weight) in zip(names, adapters, strict=True):
        add_adapter(denoiser, adapter.rank, None, start=adapter, name=name)
        for module in denoiser.modules():
            if weight != 1 and name in getattr(module, "scaling", {}):
                module.scaling[name] *= weight
    denoiser.set_adapter(names)
    denoiser.requires_grad_(False)


def active_adapters(denoiser: Any) -> list[str]:
    """Names of the adapters that compute."""
    return [*denoiser.active_adapters()] if getattr(denoiser, "peft_config", None) else []


def base_weights(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Those of a network without its adapters, by their names there."""
    return {k.replace(".base_layer.", "."): v for k, v in weights if ".lora_" not in k}


def cast_base(denoiser: Any, dtype: torch.dtype) -> None:
    """Cast the weights, but for those of adapters."""
    kept = {key: p.data for key, p in denoiser.named_parameters() if ".lora_" in key}
    denoiser.to(dtype)
    for key, parameter in denoiser.named_parameters():
        parameter.data = kept.get(key, parameter.data)


@contextmanager
def role(denoiser: Any, names: Sequence[str]) -> Iterator[None]:
    """Meanwhile ``denoiser`` computes with the adapters ``names``, and no other.

    That is all that changes: which weights have gradients stays as it is, although peft's own
    switches set it. A backward pass that computes activations again has to be in the same role as
    its forward pass.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: Any = [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]
    wanted = [p for layer in layers for p in layer.parameters()]

    def switch(states: Sequence[tuple[bool, Any]]) -> None:
        flags = [p.requires_grad for p in wanted]
        for layer, (disabled, active) in zip(layers, states, strict=True):
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
        for parameter, flag in zip(wanted, flags, strict=True):
            parameter.requires_grad_(flag)

    before = [(layer.disable_adapters, [*layer.active_adapters]) for layer in layers]
    switch([(not names, [*names] or active) for _, active in before])
    try:
        yield
    finally:
        switch(before)


def write_adapter(
    part: str,
    weights: Mapping[str, Tensor],
    scales: Mapping[str, float],
    folder: Path,
    kohya_name: Callable[[str], str] | None = None,
) -> None:
    """Write an adapter that diffusers' ``pipe.load_lora_weights(folder)`` reads, atomically.

    Args:
        part: Name of the pipeline's network that it adapts.
        weights: The adapter's weights, by peft's names in the network.
        scales: Factor of B A, alpha / rank, of every module. A file in peft's names has it in B:
            what else it may lie in, peft's and ours, not all read.
        folder: Where pytorch_lora_weights.safetensors is written.
        kohya_name: Names an adapted module for kohya's format, which has the scale in a tensor
            ``alpha``; None writes peft's names.
    """
    named: dict[str, Tensor] = {}
    for key, value in sorted(weights.items()):
        module, kind = key.removesuffix(".default.weight").rsplit(".", 1)
        value, scale = value.detach().cpu(), scales[module]
        if kohya_name is None:
            value = value * scale if kind == "lora_B" and scale != 1 else value
            named[f"{part}.{module}.{kind}.weight"] = value.contiguous()
            continue
        module = f"lora_{part}_{kohya_name(module)}".replace(".", "_")
        named[f"{module}.{_KOHYA[kind]}.weight"] = value.contiguous()
        if kind == "lora_A":
            named[f"{module}.alpha"] = torch.tensor(scale * len(value))
    with write_folder(folder) as temporary:
        save_file(named, temporary / "pytorch_lora_weights.safetensors")


@torch.no_grad()
def merge_adapter(
    denoiser: Any, originals: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Take the adapters off, and put weights with those that compute merged in on the CPU.

    Args:
        denoiser: A network of diffusers with adapters.
        originals: Its weights before it was adapted, by name, and before they were rounded. The sum
            is formed in float32 and rounded once, to their type.
        dtype: Instead of their type.
    """
    from peft.tuners.lora import LoraLayer

    added = dict[str, Tensor]()
    for module, layer in denoiser.to("cpu").named_modules():
        if isinstance(layer, LoraLayer):
            own: Any = layer
            names = [name for name in own.active_adapters if name in own.scaling]
            changes = [own.get_delta_weight(name).float() for name in names]
            added |= {f"{module}.weight": sum(changes)} if changes else {}
    denoiser.unload_lora()
    for name, parameter in denoiser.named_parameters():
        value = originals[name]
        if name in added:
            value = (value.float() + added[name]).to(dtype or value.dtype)
        parameter.data = torch.empty_like(parameter, dtype=dtype or value.dtype).copy_(value)
