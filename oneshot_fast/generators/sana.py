"""Generators of the shape of SANA-Sprint: a transformer that is told of trigonometric flow."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SanaSprintPipeline
from torch import Tensor

from oneshot_fast.errors import ModelError
from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.pipeline import TransformerGenerator
from oneshot_fast.generators.step import Sampler, Step


class _TrigFlow(Sampler):
    """Angles on the scheduler's side, a flow's time s on the denoiser's, which is kept.

    With r = sqrt(s^2 + (1 - s)^2) its input is r x, and the scheduler is given sigma_data x and
    sigma_data ((1 - 2 s) r x + r^2 output) / r.
    """

    def _begin(self, timesteps: Tensor) -> Tensor:
        t = timesteps[:-1]
        return torch.sin(t) / (torch.cos(t) + torch.sin(t))

    def __call__(self, k: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, unit = float(self.timesteps[k]), self.config["sigma_data"]
        r = math.sqrt(s**2 + (1 - s) ** 2)
        flow = ((1 - 2 * s) * (x * r) + r**2 * output) / r
        _, found, estimate = super().__call__(k, x * unit, flow * unit)
        return x * r, found / unit, estimate / unit


class SanaSprintGenerator(TransformerGenerator):
    """SANA-Sprint (Chen et al. 2025, arXiv 2503.09641).

    Prompts follow the pipeline's own instruction.
    """

    pipeline = SanaSprintPipeline
    parts = ("transformer", "vae", "text_encoder")

    @property
    def embeds_guidance(self) -> bool:
        return True

    def _schedule(self, count: int, shape: Sequence[int]) -> dict[str, Any]:
        given = {"max_timesteps": self._defaults["max_timesteps"], "intermediate_timesteps": None}
        if count == 2:  # its default is for two steps alone
            given["intermediate_timesteps"] = self._defaults["intermediate_timesteps"]
        return {"num_inference_steps": count, **given}

    def _schedule_at(self, starts: Sequence[float], shape: Sequence[int]) -> dict[str, Any]:
        given = {"max_timesteps": None, "intermediate_timesteps": None}
        return {"num_inference_steps": len(starts), "timesteps": [*starts, 0.0], **given}

    def _set(
        self, scheduler: Any, count: int, schedule: Mapping[str, Any], eta: float = 0.0
    ) -> Sampler:
        return _TrigFlow(scheduler, count, schedule, by_estimate=True)

    @property
    def last_timestep(self) -> float:
        """An angle, pi / 2 as the pipeline rounds it."""
        return self._defaults["max_timesteps"]

    def _read_step(self) -> Step:
        if self.start is None:
            schedule = self._schedule(1, ())
        elif not 0 < self.start <= self.last_timestep:
            raise ModelError(f"--timestep {self.start:g} is no angle between 0 and pi / 2")
        else:
            schedule = self._schedule_at([self.start], ())
        return self._set(self.pipe.scheduler, 1, schedule).single()

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
        guidance = self._guidance(eps, conditioning) * self.denoiser.config.guidance_embeds_scale
        return {
            "encoder_hidden_states": conditioning.embeds.to(dtype),
            "encoder_attention_mask": conditioning.mask,
            "guidance": guidance.to(dtype),
        }
