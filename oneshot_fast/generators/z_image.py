"""Generators of the shape of Z-Image: one transformer of text and image together, and a flow."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.layouts import Z_IMAGE, Layout
from oneshot_fast.generators.pipeline import TransformerGenerator

_FLOW_STEPS = 1000  # the pipeline's own number, whatever the scheduler says


class ZImageGenerator(TransformerGenerator):
    """Z-Image-Turbo and its like; without guidance, as ``pipe(guidance_scale=0)``."""

    pipeline = ZImagePipeline
    parts = ("transformer", "vae", "text_encoder")
    is_flow = True
    guidance_from = 1.0  # the pipeline's formula is on + scale (on - off)

    def compile(self, mode: str = "default") -> None:
        """Raise UserError: each length of a prompt, which is not padded, would be compiled anew."""
        raise UserError("Z-Image is compiled anew for each length of a prompt; leave --compile out")

    @property
    def layout(self) -> Layout:
        """That of the transformer alone."""
        return Z_IMAGE

    @property
    def patch(self) -> int:
        return 2

    @property
    def image_size(self) -> int:
        return 1024  # what the pipeline makes unless it is told otherwise

    def _templated(self, prompt: str) -> str:
        """``prompt`` as the text encoder is asked it."""
        chat = [{"role": "user", "content": prompt}]
        return self.pipe.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def is_truncated(self, prompt: str) -> bool:
        return super().is_truncated(self._templated(prompt))

    @staticmethod
    def _sigmas(count: int) -> list[float]:
        return torch.linspace(1, 1 / count, count).tolist()

    def blank_prompts(self, count: int) -> Conditioning:
        width = self.denoiser.config.cap_feat_dim
        return Conditioning(torch.zeros(count, self.prompt_tokens, width))

    def _encode_prompt(self, prompt: str) -> Conditioning:
        (found,), _ = self._told_by_pipeline(prompt, do_classifier_free_guidance=False)
        padding = self.prompt_tokens - len(found)
        mask = torch.tensor([[1] * len(found) + [0] * padding])
        embeds = torch.nn.functional.pad(found.cpu(), (0, 0, 0, padding))
        return Conditioning(embeds[None], mask=mask)

    def _arguments(
        self, eps: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Any]:
        """The tokens of each prompt, without padding."""
        embeds, mask = conditioning.embeds.to(dtype), conditioning.mask
        lengths = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
        return {"cap_feats": [row[:n] for row, n in zip(embeds, lengths, strict=True)]}

    def _evaluate(
        self, run: Callable[..., Any], x: Tensor, timestep: Tensor, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Its time runs from 0 at the noise to 1, and its output points from the noise."""
        images = [*x[:, :, None].unbind()]  # each of one frame
        time = ((_FLOW_STEPS - timestep) / _FLOW_STEPS).expand(len(x))
        found = run(images, time, **arguments, return_dict=False)[0]
        return -torch.stack(found)[:, :, 0]
