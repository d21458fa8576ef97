"""Generators of the shape of Stable Diffusion 1 and 2: a UNet that one text encoder tells."""

import math
from typing import Any

import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline
from torch import Tensor

from oneshot_fast.errors import ModelError, require
from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.layouts import SD1, SD2, Layout
from oneshot_fast.generators.original_layout import scheduler_written
from oneshot_fast.generators.pipeline import PipelineGenerator
from oneshot_fast.generators.pretrained import PipelineFolder
from oneshot_fast.generators.single_file import PipelineFile, scheduler_of_file
from oneshot_fast.generators.step import single_step


class UNetGenerator(PipelineGenerator):
    """What the families with a UNet share."""

    @classmethod
    def check(cls, pipe: Any) -> None:
        """Raise ModelError unless the UNet makes latents of the VAE's shape."""
        super().check(pipe)
        taken, made = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
        if taken != made:
            raise ModelError(
                f"its UNet takes {taken} channels, its VAE has {made}: inpainting and refiner "
                "models are not supported"
            )

    @classmethod
    def adapt(cls, pipe: Any, source: PipelineFolder | PipelineFile) -> None:
        if isinstance(source, PipelineFile):
            pipe.scheduler = scheduler_of_file(source, pipe.scheduler)

    def check_kohya(self) -> None:
        """Its names are those of kohya's scripts."""

    def check_single_file(self) -> None:
        super().check_single_file()
        assert self.layout is not None
        read = single_step(scheduler_written(self.pipe.scheduler, self.layout))
        require(
            self.step.is_close(read),
            f"one file has no scheduler, and is read with Euler's step from the noisiest timestep, "
            f"not with that of its {type(self.pipe.scheduler).__name__} from "
            f"{float(self.step.timestep):g}; leave --save_single_file out",
        )

    @property
    def embeds_guidance(self) -> bool:
        return self.pipe.unet.config.time_cond_proj_dim is not None

    def _guidance_embedding(
        self, eps: Tensor, told: Conditioning, dtype: torch.dtype
    ) -> Tensor | None:
        """Embedding [B, E] of the guidance, which the UNets of LCMs take."""
        if not self.embeds_guidance:
            return None
        width = self.pipe.unet.config.time_cond_proj_dim

        def embedded(scale: Tensor) -> Tensor:
            made = self.pipe.get_guidance_scale_embedding(scale.cpu() - 1, width)
            return made.to(eps.device, dtype)

        if told.guidance is not None:
            return embedded(told.guidance)
        key = ("guidance", self.embedded_guidance, eps.device, dtype)
        row = self._constant(key, lambda: embedded(self._guidance(eps[:1], told)))
        return row.expand(len(eps), -1)


class SdGenerator(UNetGenerator):
    """SD-Turbo, Hyper-SD of SD1.5, and their like; prediction by epsilon or v."""

    pipeline = StableDiffusionPipeline
    parts = ("unet", "vae", "text_encoder")

    @classmethod
    def check(cls, pipe: Any) -> None:
        """Raise ModelError if the UNet needs more than text."""
        super().check(pipe)
        config = pipe.unet.config
        if config.addition_embed_type or config.class_embed_type:
            raise ModelError("its UNet is told of more than text, so it is not of SD's shape")

    @property
    def layout(self) -> Layout:
        """SD2's where the text encoder is OpenCLIP's."""
        return SD1 if self.pipe.text_encoder.config.hidden_act == "quick_gelu" else SD2

    def blank_prompts(self, count: int) -> Conditioning:
        width = self.pipe.unet.config.cross_attention_dim
        return Conditioning(torch.zeros(count, self.prompt_tokens, width))

    def _encode_prompt(self, prompt: str) -> Conditioning:
        embeds, _ = self._told_by_pipeline(
            prompt, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning(embeds)

    def _arguments(
        self, eps: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Any]:
        return {
            "encoder_hidden_states": conditioning.embeds.to(dtype),
            "timestep_cond": self._guidance_embedding(eps, conditioning, dtype),
        }


class LcmGenerator(SdGenerator):
    """Latent consistency models (Luo et al. 2023, arXiv 2310.04378) in a pipeline of their own."""

    pipeline = LatentConsistencyModelPipeline
    by_estimate = math.inf
