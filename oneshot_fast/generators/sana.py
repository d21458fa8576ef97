"""Generators of the shape of SANA-Sprint: a transformer that is told of trigonometric flow."""

import math
from typing import Any

import torch
from diffusers import SanaSprintPipeline
from torch import Tensor

from oneshot_fast.errors import ModelError
from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.pipeline import TransformerGenerator
from oneshot_fast.generators.step import Step, Trial


class SanaSprintGenerator(TransformerGenerator):
    """SANA-Sprint (Chen et al. 2025, arXiv 2503.09641).

    Prompts follow the pipeline's own instruction, and the guidance embedding is its default.
    """

    pipeline = SanaSprintPipeline
    parts = ("transformer", "vae", "text_encoder")

    def _read_step(self) -> Step:
        """An angle on the scheduler's side, a flow's time s on the denoiser's, which is kept.

        With r = sqrt(s^2 + (1 - s)^2) its input is r eps, and the scheduler is given sigma_data
        ((1 - 2 s) r eps + r^2 output) / r.
        """
        schedule: dict[str, Any] = {"num_inference_steps": 1, "intermediate_timesteps": None}
        if self.start is None:
            schedule["max_timesteps"] = self._defaults["max_timesteps"]
        elif not 0 < self.start < 1.6:
            raise ModelError(f"--timestep {self.start:g} is no angle between 0 and pi / 2")
        else:
            schedule |= {"timesteps": [self.start, 0.0], "max_timesteps": None}
        trial = Trial(self.pipe.scheduler, schedule)
        t, unit = trial.timestep, trial.config["sigma_data"]
        time = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        s = float(time)
        r = math.sqrt(s**2 + (1 - s) ** 2)

        def evaluate(eps: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
            given = eps * r
            flow = ((1 - 2 * s) * given + r**2 * output) / r
            return given, trial(eps * unit, flow * unit)[2] / unit

        return trial.step(time, evaluate)

    def blank_prompts(self, count: int) -> Conditioning:
        width, tokens = self.denoiser.config.caption_channels, self._defaults["max_sequence_length"]
        return Conditioning(torch.zeros(count, tokens, width), mask=torch.ones(count, tokens))

    def is_truncated(self, prompt: str) -> bool:
        """As the pipeline counts, which sets two tokens aside beside those of its instruction."""
        before = "\n".join(self._defaults["complex_human_instruction"])
        own, whole = (
            len(self.pipe.tokenizer(text, verbose=False).input_ids)
            for text in (before, before + prompt)
        )
        return whole > own + self.prompt_tokens - 2

    def _encode_prompt(self, prompt: str) -> Conditioning:
        instruction = self._defaults["complex_human_instruction"]
        embeds, mask = self._told_by_pipeline(prompt, complex_human_instruction=instruction)
        return Conditioning(embeds, mask=mask)

    def _arguments(
        self, eps: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Any]:
        guidance = self._guidance(eps) * self.denoiser.config.guidance_embeds_scale
        return {
            "encoder_hidden_states": conditioning.embeds.to(dtype),
            "encoder_attention_mask": conditioning.mask,
            "guidance": guidance.to(dtype),
        }
