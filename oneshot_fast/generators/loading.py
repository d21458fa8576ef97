"""Load a one-step generator from a folder, the hub or a single file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderTiny,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
)

from oneshot_fast.embedded.pipeline import model_path
from oneshot_fast.errors import ModelError, one_line
from oneshot_fast.generators.decoder import Decoder
from oneshot_fast.generators.sdxl import OneStepGenerator
from oneshot_fast.generators.toy import ToyGenerator, is_toy
from oneshot_fast.runtime.processes import processes


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
) -> OneStepGenerator:
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
        ModelError: If it cannot be loaded or is not a one-step model of SDXL's shape.
    """
    device = _usable_device(device or _default_device())
    if is_toy(Path(model_id)):
        if dtype not in (None, torch.float32) or model_config is not None:
            raise ModelError(f"model {model_id} takes no --dtype and no --model_config")
        # it has the same interface
        return cast(OneStepGenerator, ToyGenerator.load(Path(model_id), device))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    weights = torch.float32 if master_weights else dtype
    options = {"dtype": weights, "local_files_only": local_files_only}
    source = str(model_path()) if model_id == "tiny" else str(model_id)
    try:
        if source.endswith(".safetensors"):
            pipe = _load_single_file(Path(source), model_config, options)
        else:
            pipe = _load_folder(source, variant, options | {"revision": revision})
        generator = OneStepGenerator(pipe, autocast=None if weights == dtype else dtype)
        _check_complete(pipe)
        pipe.to(device)
        return generator
    except ModelError as error:
        raise ModelError(f"cannot use model {model_id}: {error}") from None


def load_tiny_decoder(
    decoder_id: str, device: torch.device, dtype: torch.dtype, latent_channels: int
) -> Decoder:
    """Load a tiny autoencoder (diffusers' AutoencoderTiny, such as madebyollin/taesdxl).

    Raises:
        ModelError: If it cannot be loaded or is for other latents.
    """
    try:
        vae = AutoencoderTiny.from_pretrained(decoder_id, torch_dtype=dtype)
    except Exception as error:  # diffusers raises many types for a broken or absent model
        raise ModelError(f"cannot use decoder {decoder_id}: {one_line(error)}") from None
    if vae.config.latent_channels != latent_channels:
        raise ModelError(
            f"cannot use decoder {decoder_id}: it is for {vae.config.latent_channels} latent "
            f"channels, the model has {latent_channels}"
        )
    return Decoder(vae.to(device).requires_grad_(False).eval())


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


def _check_complete(pipe: StableDiffusionXLPipeline) -> None:
    """Raise ModelError if the files had no values for some weights; those are left on "meta"."""
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for name, parameter in getattr(pipe, part).named_parameters():
            if parameter.is_meta:
                raise ModelError(f"its weights are incomplete: {part} has no {name}")


def _load_folder(
    source: str, variant: str | None, options: dict[str, Any]
) -> StableDiffusionXLPipeline:
    folder = Path(source)
    is_local = folder.is_absolute() or source.startswith(".") or folder.exists()
    if is_local and not (folder / "model_index.json").is_file():
        raise ModelError("no model_index.json there; give a diffusers folder, a hub id or a file")
    errors: list[Exception] = []
    for choice in dict.fromkeys((variant, None)):  # a checkpoint of ours has no variant files
        try:
            return StableDiffusionXLPipeline.from_pretrained(source, variant=choice, **options)
        except Exception as error:  # diffusers raises many types for a broken or absent model
            errors.append(error)
    if is_local:
        raise ModelError(one_line(errors[0]))
    raise ModelError(
        "it is no local folder, and the hub did not give it; download it first, or check the "
        f"name and the network ({one_line(errors[0]):.150})"
    )


def _load_single_file(
    path: Path, model_config: str | None, options: dict[str, Any]
) -> StableDiffusionXLPipeline:
    if not path.is_file():
        raise ModelError("no such file")
    try:
        pipe = StableDiffusionXLPipeline.from_single_file(str(path), config=model_config, **options)
    except Exception as error:  # diffusers raises many types here, bare Exception among them
        hint = "" if model_config else " (offline? name a folder of configs with --model_config)"
        raise ModelError(one_line(error) + hint) from error
    # A single file carries no scheduler: diffusers then takes SDXL base's, which has leading
    # spacing. SDXL-Turbo's own scheduler is this one.
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    return pipe
