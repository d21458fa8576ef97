"""Generators of a user's own, named on the command line as python:generator_samples.Tinted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from oneshot_fast.generators.base import Conditioning, Generator, LoadOptions, Prediction
from oneshot_fast.generators.pipeline import PipelineGenerator


class Tinted(Generator):
    """Noise turned into colours, tinted by the length of the prompt; a latent is the image."""

    def __init__(self, side: int) -> None:
        self.image_side = side
        self._network = nn.Conv2d(3, 3, 1).requires_grad_(False)
        nn.init.eye_(self._network.weight[:, :, 0, 0])

    @classmethod
    def load(cls, model_id: str, options: LoadOptions) -> Tinted:
        return cls(int(model_id or 8))

    @property
    def denoiser(self) -> nn.Conv2d:
        return self._network

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"tint": self._network}

    @property
    def image_size(self) -> int:
        return self.image_side

    @property
    def latent_factor(self) -> int:
        return 1

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.tensor([len(prompt) / 100 for prompt in prompts]).view(-1, 1, 1))

    def blank_prompts(self, count: int) -> Conditioning:
        return Conditioning(torch.zeros(count, 1, 1))

    def encode_image(self, image: Tensor) -> Tensor:
        return image * 2 - 1

    def predict(self, eps: Tensor, conditioning: Conditioning) -> Prediction:
        output = self._network(0.5 * eps) + conditioning.embeds[..., None]
        return Prediction(output, torch.zeros_like(output), -1.0)

    def decode_raw(self, latents: Tensor) -> Tensor:
        return latents

    def save(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self._network.state_dict(), folder / "tint.pt")

    def load_weights(self, folder: Path) -> None:
        self._network.load_state_dict(torch.load(folder / "tint.pt"))

    def fingerprint(self) -> str:
        weights = self._network.weight.numpy().tobytes()
        return hashlib.sha256(weights).hexdigest()[:16]


class OneEncoder(PipelineGenerator):
    """Of the shape of Stable Diffusion 1.5: one text encoder, and nothing pooled."""

    pipeline = StableDiffusionPipeline
    parts = ("unet", "vae", "text_encoder")

    def blank_prompts(self, count: int) -> Conditioning:
        return Conditioning(torch.zeros(count, 77, self.denoiser.config.cross_attention_dim))

    def _encode_prompt(self, prompt: str) -> Conditioning:
        how = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        return Conditioning(self._told_by_pipeline(prompt, **how)[0])

    def _arguments(
        self, eps: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Any]:
        return {"encoder_hidden_states": conditioning.embeds.to(dtype)}
