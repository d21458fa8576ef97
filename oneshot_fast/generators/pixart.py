"""Generators of the shape of PixArt-alpha: a transformer that T5 tells."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor

from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.lora_files import adopt
from oneshot_fast.generators.pipeline import TransformerGenerator
from oneshot_fast.generators.pretrained import PipelineFolder
from oneshot_fast.generators.single_file import PipelineFile


class PixartGenerator(TransformerGenerator):
    """PixArt-alpha distilled to one step (DMD).

    Prompts are read as the pipeline does with ``clean_caption=False``, images are of the size that
    is asked for (``use_resolution_binning=False``).
    """

    pipeline = PixArtAlphaPipeline
    parts = ("transformer", "vae", "text_encoder")
    by_estimate = 1

    @classmethod
    def adapt(cls, pipe: Any, source: PipelineFolder | PipelineFile) -> None:
        adopt(pipe.transformer, PeftAdapterMixin)  # the only class here that takes no LoRA

    def blank_prompts(self, count: int) -> Conditioning:
        width = self.denoiser.config.caption_channels
        tokens = self.prompt_tokens
        return Conditioning(torch.zeros(count, tokens, width), mask=torch.ones(count, tokens))

    def _encode_prompt(self, prompt: str) -> Conditioning:
        embeds, mask, _, _ = self._told_by_pipeline(prompt, do_classifier_free_guidance=False)
        return Conditioning(embeds, mask=mask)

    def _arguments(
        self, eps: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Text and, for the model of 1024 pixels, the images' sizes."""
        h, w = (side * self.latent_factor for side in eps.shape[-2:])
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.config.sample_size == 128:
            for name, row in (("resolution", [h, w]), ("aspect_ratio", [h / w])):
                value = self._constant(
                    (name, h, w, eps.device, dtype),
                    lambda row=row: torch.tensor([row], device=eps.device, dtype=dtype),  # type: ignore[misc]
                )
                sizes[name] = value.expand(len(eps), -1)
        return {
            "encoder_hidden_states": conditioning.embeds.to(dtype),
            "encoder_attention_mask": conditioning.mask,
            "added_cond_kwargs": sizes,
        }

    def _evaluate(
        self, run: Callable[..., Any], x: Tensor, timestep: Tensor, arguments: Mapping[str, Any]
    ) -> Tensor:
        """The first half of the channels where the other half is a variance."""
        return super()._evaluate(run, x, timestep, arguments)[:, : x.shape[1]]
