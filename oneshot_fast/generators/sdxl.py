"""Generators of SDXL's shape: a UNet that is told of text by two encoders, and of sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor

from oneshot_fast.errors import ModelError
from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.pipeline import PipelineGenerator, quietly


class SdxlGenerator(PipelineGenerator):
    """SDXL-Turbo and its like: noise in, latent out, in one evaluation of the UNet."""

    pipeline = StableDiffusionXLPipeline
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")

    @classmethod
    def check(cls, pipe: Any) -> None:
        """Raise ModelError unless ``pipe`` has the modules and the conditioning of SDXL."""
        super().check(pipe)
        config = pipe.unet.config
        if config.addition_embed_type != "text_time":
            raise ModelError("its UNet has no text_time conditioning, so it is not of SDXL's shape")
        if config.time_cond_proj_dim is not None:
            raise ModelError(
                "its UNet takes a guidance embedding, as LCMs do; that is not supported"
            )
        if config.in_channels != pipe.vae.config.latent_channels:
            raise ModelError(
                f"its UNet takes {config.in_channels} channels, its VAE has "
                f"{pipe.vae.config.latent_channels}: inpainting and refiner models are not "
                "supported"
            )

    @classmethod
    def _load_file(cls, path: Path, model_config: str | None, known: dict[str, Any]) -> Any:
        pipe = super()._load_file(path, model_config, known)
        # A single file carries no scheduler: diffusers then takes SDXL base's, which has leading
        # spacing. SDXL-Turbo's own scheduler is this one.
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
        return pipe

    def blank_prompts(self, count: int) -> Conditioning:
        """Zeros of the shape of ``count`` prompts' conditioning, on torch's default device."""
        width = self.pipe.unet.config.cross_attention_dim
        pooled = self.pipe.text_encoder_2.config.projection_dim
        return Conditioning(torch.zeros(count, 77, width), torch.zeros(count, pooled))

    @torch.no_grad()
    def _encode_prompt(self, prompt: str) -> Conditioning:
        embeds, _, pooled, _ = quietly(
            lambda: self.pipe.encode_prompt(
                prompt, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
            ),
            "stable_diffusion_xl.pipeline_stable_diffusion_xl",
        )
        return Conditioning(embeds.cpu(), pooled.cpu())

    def _arguments(
        self, eps: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Text, and original and target size of the images [B, 6]."""
        assert conditioning.pooled is not None
        h, w = (side * self.latent_factor for side in eps.shape[-2:])
        time_ids = self._constant(
            (h, w, eps.device, dtype),
            lambda: torch.tensor([[h, w, 0, 0, h, w]], device=eps.device, dtype=dtype),
        )
        return {
            "encoder_hidden_states": conditioning.embeds.to(dtype),
            "added_cond_kwargs": {
                "text_embeds": conditioning.pooled.to(dtype),
                "time_ids": time_ids.expand(len(eps), -1),
            },
        }
