"""Which family of generators reads a model."""

import importlib
from pathlib import Path
from typing import Any

import torch

from oneshot_fast.errors import ModelError, refused
from oneshot_fast.generators.base import Generator, LoadOptions
from oneshot_fast.generators.pretrained import PACKAGED, pipeline_of
from oneshot_fast.generators.single_file import pipeline_of_file
from oneshot_fast.generators.toy import ToyGenerator
from oneshot_fast.runtime.processes import processes
from oneshot_fast.runtime.user_functions import import_function

# pipelines of diffusers, and the class in a file here that reads each
PIPELINES = {
    "StableDiffusionXLPipeline": "sdxl.SdxlGenerator",
    "StableDiffusionPipeline": "sd.SdGenerator",
    "LatentConsistencyModelPipeline": "sd.LcmGenerator",
    "StableDiffusion3Pipeline": "sd3.Sd3Generator",
    "FluxPipeline": "flux.FluxGenerator",
    "SanaSprintPipeline": "sana.SanaSprintGenerator",
    "PixArtAlphaPipeline": "pixart.PixartGenerator",
    "ZImagePipeline": "z_image.ZImageGenerator",
}


def find_family(model_id: str, options: LoadOptions) -> tuple[type[Generator], str]:
    """The class that loads ``model_id``, and what it is to load.

    Raises:
        UserError: If ``model_id`` is of a pipeline that no class reads, or is
            python:module.Class[:MODEL], and there is no such generator.
    """
    if model_id.startswith("python:"):
        _, name, *model = model_id.split(":", 2)
        family: Any = import_function(f"python:{name}", "generator")
        if not (isinstance(family, type) and issubclass(family, Generator)):
            raise ModelError(f"cannot use model {model_id}: {name} is no subclass of Generator")
        return family, "".join(model)
    if ToyGenerator.reads(model_id):
        return ToyGenerator, model_id
    named = "StableDiffusionXLPipeline"
    if model_id.endswith(".safetensors"):
        named = pipeline_of_file(Path(model_id), options) or named
    elif model_id not in PACKAGED:
        named = pipeline_of(model_id, options) or named  # no pipeline: refused where it is opened
    if named not in PIPELINES:
        raise ModelError(
            f"cannot use model {model_id}: it is a {named}, and only these are known: "
            + ", ".join(sorted(PIPELINES))
        )
    module, kind = PIPELINES[named].split(".")
    with refused(ModelError, f"cannot use model {model_id}: this diffusers lacks what it needs: "):
        found = getattr(importlib.import_module(f"oneshot_fast.generators.{module}"), kind)
    return found, model_id


def load_generator(
    model_id: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **more: Any,
) -> Generator:
    """Load a one-step generator.

    Args:
        model_id: Folder in diffusers layout, hub id, a single .safetensors file, "tiny" or
            "tiny-teacher" for the embedded models, a folder of oneshot_fast.toy, which computes in
            float32, or python:module.Class[:MODEL] for a subclass of ``Generator`` of your own.
        device: Default: cuda where there is one, else cpu.
        dtype: Compute type; default bfloat16 on cuda, float32 on cpu.
        **more: As in ``LoadOptions``: master_weights, variant, revision, ...

    Raises:
        ModelError: If it cannot be loaded or is not a one-step model of a family that is known.
    """
    options = LoadOptions(_usable_device(device or _default_device()), dtype, **more)
    family, source = find_family(str(model_id), options)
    if options.lora and not family.takes_lora:
        raise ModelError(f"model {model_id} takes no LoRA; leave --lora out")
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
