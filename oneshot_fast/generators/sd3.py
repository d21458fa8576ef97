"""Generators of the shape of Stable Diffusion 3: a transformer, and a flow."""

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from oneshot_fast.errors import require
from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.layouts import SD3, Layout
from oneshot_fast.generators.original_layout import check_widths
from oneshot_fast.generators.pipeline import TransformerGenerator

_CLIP_TOKENS = 77


class Sd3Generator(TransformerGenerator):
    """SD3.5-Turbo and its like; without the third text encoder its tokens are zeros."""

    pipeline = StableDiffusion3Pipeline
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("text_encoder_3",)
    is_flow = True

    @property
    def tokenizer(self) -> str:
        """T5's, which reads most."""
        return "tokenizer" if self.pipe.text_encoder_3 is None else "tokenizer_3"

    @property
    def layout(self) -> Layout:
        """SD3's."""
        return SD3

    def check_single_file(self) -> None:
        check_widths(self.pipe)
        projection = self.pipe.text_encoder.text_projection.weight
        require(
            torch.equal(projection, torch.eye(len(projection)).to(projection)),
            "its first text encoder has a projection, which diffusers does not read from one file; "
            "leave --save_single_file out",
        )
        super().check_single_file()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        most = self.denoiser.config.pos_embed_max_size * self.size_multiple
        fits = max(height, width) <= most
        require(fits, f"a size of {width} x {height} pixels is above {most}, the model's largest")
        return super().latent_shape(height, width)

    def _tokens_read(self) -> int:
        return _CLIP_TOKENS if self.pipe.text_encoder_3 is None else super()._tokens_read()

    def blank_prompts(self, count: int) -> Conditioning:
        config, tokens = self.denoiser.config, _CLIP_TOKENS + super()._tokens_read()
        return Conditioning(
            torch.zeros(count, tokens, config.joint_attention_dim),
            torch.zeros(count, config.pooled_projection_dim),
        )

    def _encode_prompt(self, prompt: str) -> Conditioning:
        embeds, _, pooled, _ = self._told_by_pipeline(
            prompt, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
        )
        return Conditioning(embeds, pooled)

    def _arguments(
        self, eps: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Any]:
        assert conditioning.pooled is not None
        return {
            "encoder_hidden_states": conditioning.embeds.to(dtype),
            "pooled_projections": conditioning.pooled.to(dtype),
        }
