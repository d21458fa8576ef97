"""Generators of the shape of FLUX.1: a transformer of packed latents, and a flow."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from oneshot_fast.errors import ModelError
from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.layouts import FLUX, Layout
from oneshot_fast.generators.pipeline import TransformerGenerator

_FLOW_STEPS = 1000  # the pipeline's own number, whatever the scheduler says
_SCHNELL_TOKENS = 256  # the most that a model without guidance takes, by diffusers' documentation


class FluxGenerator(TransformerGenerator):
    """FLUX.1-schnell and its like, with a guidance embedding or without.

    Noise is what the pipeline draws, [B, C, h, w], before it packs 2 x 2 latent pixels into one:
    ``pipe(latents=...)`` takes it packed.
    """

    pipeline = FluxPipeline
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    is_flow = True

    @property
    def layout(self) -> Layout:
        """That of the transformer alone."""
        return FLUX

    @property
    def patch(self) -> int:
        return 2

    @property
    def tokenizer(self) -> str:
        """T5's, which reads most."""
        return "tokenizer_2"

    @property
    def embeds_guidance(self) -> bool:
        return bool(self.denoiser.config.guidance_embeds)

    @classmethod
    def check(cls, pipe: Any) -> None:
        """Raise ModelError unless the transformer takes packed latents of the VAE's."""
        super().check(pipe)
        taken, made = pipe.transformer.config.in_channels, pipe.vae.config.latent_channels
        if taken != 4 * made:
            raise ModelError(f"its transformer takes {taken} channels, not 4 x {made} of its VAE")

    def check_kohya(self) -> None:
        """Its names are among those that the converter of diffusers knows."""

    def _tokens_read(self) -> int:
        return super()._tokens_read() if self.embeds_guidance else _SCHNELL_TOKENS

    @staticmethod
    def _sigmas(count: int) -> list[float]:
        return torch.linspace(1, 1 / count, count).tolist()

    def blank_prompts(self, count: int) -> Conditioning:
        config = self.denoiser.config
        return Conditioning(
            torch.zeros(count, self.prompt_tokens, config.joint_attention_dim),
            torch.zeros(count, config.pooled_projection_dim),
        )

    def _encode_prompt(self, prompt: str) -> Conditioning:
        embeds, pooled, _ = self._told_by_pipeline(prompt, max_sequence_length=self.prompt_tokens)
        return Conditioning(embeds, pooled)

    def _arguments(
        self, eps: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Text, where each token stands, and guidance [B]."""
        assert conditioning.pooled is not None
        h, w, tokens = eps.shape[-2] // 2, eps.shape[-1] // 2, conditioning.embeds.shape[1]
        image_ids = self._constant(
            ("ids", h, w, eps.device, dtype),
            lambda: self.pipe._prepare_latent_image_ids(1, h, w, eps.device, dtype),
        )
        text_ids = self._constant(
            ("ids", tokens, eps.device, dtype),
            lambda: torch.zeros(tokens, 3, device=eps.device, dtype=dtype),
        )
        return {
            "encoder_hidden_states": conditioning.embeds.to(dtype),
            "pooled_projections": conditioning.pooled.to(dtype),
            "img_ids": image_ids,
            "txt_ids": text_ids,
            "guidance": self._guidance(eps, conditioning) if self.embeds_guidance else None,
        }

    def _evaluate(
        self, run: Callable[..., Any], x: Tensor, timestep: Tensor, arguments: Mapping[str, Any]
    ) -> Tensor:
        B, C, h, w = x.shape
        packed = self.pipe._pack_latents(x.contiguous(), B, C, h, w)
        time = (timestep / _FLOW_STEPS).to(x.dtype)
        output = super()._evaluate(run, packed, time, arguments)
        return self.pipe._unpack_latents(output, h, w, 1)
