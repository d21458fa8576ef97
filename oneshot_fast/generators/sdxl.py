"""Generators of SDXL's shape: a UNet that is told of text by two encoders, and of sizes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from oneshot_fast.data.sizes import Frame
from oneshot_fast.errors import ModelError
from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.layouts import SDXL, Layout
from oneshot_fast.generators.original_layout import check_widths, unet_name
from oneshot_fast.generators.sd import UNetGenerator


class SdxlGenerator(UNetGenerator):
    """SDXL-Turbo and its like: noise in, latent out, in one evaluation of the UNet."""

    pipeline = StableDiffusionXLPipeline
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    upcasts_vae = True  # its VAE overflows in float16

    @classmethod
    def check(cls, pipe: Any) -> None:
        """Raise ModelError unless ``pipe`` has the modules and the conditioning of SDXL."""
        super().check(pipe)
        config = pipe.unet.config
        if config.addition_embed_type != "text_time":
            raise ModelError("its UNet has no text_time conditioning, so it is not of SDXL's shape")

    def blank_prompts(self, count: int) -> Conditioning:
        width = self.pipe.unet.config.cross_attention_dim
        pooled = self.pipe.text_encoder_2.config.projection_dim
        return Conditioning(torch.zeros(count, 77, width), torch.zeros(count, pooled))

    def _encode_prompt(self, prompt: str) -> Conditioning:
        embeds, _, pooled, _ = self._told_by_pipeline(prompt, do_classifier_free_guidance=False)
        return Conditioning(embeds, pooled)

    def _encode_blank(self) -> Conditioning:
        if self.pipe.config.force_zeros_for_empty_prompt:
            return self.blank_prompts(1)
        return super()._encode_blank()

    def framed(self, conditioning: Conditioning, frames: Sequence[Frame]) -> Conditioning:
        rows = torch.tensor([[*frame.original, *frame.corner] for frame in frames])
        return replace(conditioning, frames=rows.to(conditioning.embeds.device))

    def _arguments(
        self, eps: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Text, and original size, crop and target size of the images [B, 6]."""
        assert conditioning.pooled is not None
        h, w = (side * self.latent_factor for side in eps.shape[-2:])
        time_ids = self._constant(
            (h, w, eps.device, dtype),
            lambda: torch.tensor([[h, w, 0, 0, h, w]], device=eps.device, dtype=dtype),
        ).expand(len(eps), -1)
        if conditioning.frames is not None:
            time_ids = torch.cat((conditioning.frames.to(dtype), time_ids[:, 4:]), 1)
        return {
            "encoder_hidden_states": conditioning.embeds.to(dtype),
            "timestep_cond": self._guidance_embedding(eps, conditioning, dtype),
            "added_cond_kwargs": {
                "text_embeds": conditioning.pooled.to(dtype),
                "time_ids": time_ids,
            },
        }

    def _kohya_name(self, module: str) -> str:
        """Those of SDXL's own release."""
        return unet_name(module, self.denoiser)

    @property
    def layout(self) -> Layout:
        """SDXL's."""
        return SDXL

    def check_single_file(self) -> None:
        check_widths(self.pipe)
        super().check_single_file()
