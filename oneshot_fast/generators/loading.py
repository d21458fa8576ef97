"""Which family of generators reads a model."""

from pathlib import Path
from typing import Any

import torch

from oneshot_fast.errors import ModelError
from oneshot_fast.generators.base import Generator, LoadOptions
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.generators.toy import ToyGenerator
from oneshot_fast.runtime.processes import processes
from oneshot_fast.runtime.user_functions import import_function

# the first one that says so reads a model; the last one reads all others, or says why it cannot
FAMILIES: tuple[type[Generator], ...] = (ToyGenerator, SdxlGenerator)


def find_family(model_id: str) -> tuple[type[Generator], str]:
    """The class that loads ``model_id``, and what it is to load.

    Raises:
        UserError: If ``model_id`` is python:module.Class[:MODEL], and there is no such generator.
    """
    if not model_id.startswith("python:"):
        return next((f for f in FAMILIES if f.reads(model_id)), FAMILIES[-1]), model_id
    _, name, *model = model_id.split(":", 2)
    family: Any = import_function(f"python:{name}", "generator")
    if not (isinstance(family, type) and issubclass(family, Generator)):
        raise ModelError(f"cannot use model {model_id}: {name} is no subclass of Generator")
    return family, "".join(model)


def load_generator(
    model_id: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **more: Any,
) -> Generator:
    """Load a one-step generator.

    Args:
        model_id: Folder in diffusers layout, hub id, a single .safetensors file, "tiny" for the
            embedded model, a folder of oneshot_fast.toy, which computes in float32, or
            python:module.Class[:MODEL] for a subclass of ``Generator`` of your own.
        device: Default: cuda where there is one, else cpu.
        dtype: Compute type; default bfloat16 on cuda, float32 on cpu.
        **more: As in ``LoadOptions``: master_weights, variant, revision, ...

    Raises:
        ModelError: If it cannot be loaded or is not a one-step model of a family that is known.
    """
    options = LoadOptions(_usable_device(device or _default_device()), dtype, **more)
    family, source = find_family(str(model_id))
    return family.load(source, options)


class OneStepGenerator:
    """Any one-step generator: loads a ``Generator`` of the family that a model belongs to."""

    from_pretrained = staticmethod(load_generator)


def _default_device() -> str | torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return processes().device if processes().num_processes > 1 else "cuda"


def _usable_device(name: str | torch.device) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator else "cpu"
    try:
        if torch.device(name).type in ("cpu", kind):
            return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError):  # torch raises either, and says much
        pass
    others = (f", {kind}:{k}" for k in range(torch.accelerator.device_count()))
    raise ModelError(f"cannot use device {name}; here are: cpu{''.join(others)}")
