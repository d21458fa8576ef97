"""Which family of generators reads a model."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from oneshot_fast.errors import ModelError, one_line
from oneshot_fast.generators.base import Generator, LoadOptions
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.generators.toy import ToyGenerator
from oneshot_fast.runtime.processes import processes

Family = TypeVar("Family", bound=type[Generator])

# the first one that says so reads a model; the last one says why it cannot
_FAMILIES: list[type[Generator]] = [ToyGenerator, SdxlGenerator]


def register_family(family: Family) -> Family:
    """Let ``family`` load the models that it ``reads``, before all others; a class decorator."""
    _FAMILIES.insert(0, family)
    return family


def family_of(model_id: str | Path) -> type[Generator]:
    """The class that loads ``model_id``."""
    return next((f for f in _FAMILIES if f.reads(str(model_id))), _FAMILIES[-1])


def load_generator(
    model_id: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    master_weights: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    model_config: str | None = None,
    local_files_only: bool = False,
) -> Generator:
    """Load a one-step generator.

    Args:
        model_id: Folder in diffusers layout, hub id, a single .safetensors file, "tiny" for the
            embedded model, or a folder of oneshot_fast.toy; these compute in float32.
        device: Default: cuda where there is one, else cpu.
        dtype: Compute type; default bfloat16 on cuda, float32 on cpu.
        master_weights: Keep the weights in float32, for training.
        variant: Weight variant such as "fp16"; where the model has none, the plain files serve.
        revision: Hub revision.
        model_config: For a single file: folder or hub id with the pipeline's configs.
        local_files_only: Never ask the hub.

    Raises:
        ModelError: If it cannot be loaded or is not a one-step model of a family that is known.
    """
    options = LoadOptions(
        _usable_device(device or _default_device()),
        dtype, master_weights, variant, revision, model_config, local_files_only,
    )  # fmt: skip
    return family_of(model_id).load(str(model_id), options)


class OneStepGenerator:
    """Any one-step generator: loads a ``Generator`` of the family that a model belongs to."""

    from_pretrained = staticmethod(load_generator)


def _default_device() -> str | torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return processes().device if processes().num_processes > 1 else "cuda"


def _usable_device(name: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # torch raises either
        raise ModelError(f"cannot use device {name}: {one_line(error)}") from None
