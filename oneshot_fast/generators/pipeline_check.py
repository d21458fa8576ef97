"""Whether a diffusers pipeline is of SDXL's shape."""

from __future__ import annotations

from diffusers import StableDiffusionXLPipeline

from oneshot_fast.errors import ModelError


def check_shape(pipe: object) -> None:
    """Raise ModelError unless ``pipe`` has the modules and the conditioning of SDXL."""
    if not isinstance(pipe, StableDiffusionXLPipeline):
        raise ModelError(f"it is a {type(pipe).__name__}, not a StableDiffusionXLPipeline")
    missing = [
        name
        for name in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler")
        if getattr(pipe, name, None) is None
    ]
    if missing:
        raise ModelError(f"the pipeline has no {', '.join(missing)}")
    config = pipe.unet.config
    if config.addition_embed_type != "text_time":
        raise ModelError("its UNet has no text_time conditioning, so it is not of SDXL's shape")
    if config.time_cond_proj_dim is not None:
        raise ModelError("its UNet takes a guidance embedding, as LCMs do; that is not supported")
    if config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(
            f"its UNet takes {config.in_channels} channels, its VAE has "
            f"{pipe.vae.config.latent_channels}: inpainting and refiner models are not supported"
        )
