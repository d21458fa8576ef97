"""The one-step generator over a diffusers SDXL pipeline.

This file and loading.py are the only ones that know diffusers' pipelines.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from oneshot_fast.errors import ModelError
from oneshot_fast.one_step import OneStep
from oneshot_fast.runs import write_folder


@dataclass(frozen=True)
class PromptEncoding:
    """What the UNet is told about a batch of prompts.

    Attributes:
        embeds: Hidden states of both text encoders, [B, 77, E].
        pooled: Pooled embedding of the second text encoder, [B, P].
    """

    embeds: Tensor
    pooled: Tensor


class OneStepGenerator:
    """Prompt and Gaussian noise in, latent and image out, in one UNet evaluation.

    Weights are frozen; SFT unfreezes ``unet``. Noise, latents and images are float32; the UNet and
    the VAE run in ``dtype``.
    """

    def __init__(
        self, pipe: StableDiffusionXLPipeline, autocast: torch.dtype | None = None
    ) -> None:
        """Wrap ``pipe``; its modules keep their device and dtype.

        Args:
            pipe: The pipeline.
            autocast: Compute in this type over float32 master weights.

        Raises:
            ModelError: If the pipeline is not a one-step generator of SDXL's shape.
        """
        _check_shape(pipe)
        self.pipe = pipe
        self.autocast = autocast
        self._vae_autocast = autocast
        if pipe.vae.config.force_upcast:  # as diffusers does: SDXL's VAE overflows in float16
            if pipe.vae.dtype == torch.float16:
                pipe.vae.to(torch.float32)
            if autocast == torch.float16:
                self._vae_autocast = None
        self.step = OneStep.from_scheduler(pipe.scheduler)
        for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            module.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)
        self._prompts: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @property
    def unet(self) -> nn.Module:
        """The trained part: UNet2DConditionModel."""
        return self.pipe.unet

    @property
    def device(self) -> torch.device:
        """Where the UNet lives."""
        return self.pipe.unet.device

    @property
    def image_size(self) -> int:
        """Native image side in pixels."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of the latent of a ``height`` x ``width`` pixel image."""
        factor = self.pipe.vae_scale_factor
        return self.pipe.unet.config.in_channels, height // factor, width // factor

    def encode_prompts(self, prompts: Sequence[str], cache_size: int = 4096) -> PromptEncoding:
        """Encode prompts as the pipeline does, each distinct one once.

        Prompts run one by one, so an encoding never depends on its neighbours' rounding.

        Returns:
            Encoding of B = len(prompts) prompts on the generator's device.
        """
        rows = []
        for prompt in prompts:
            if prompt not in self._prompts:
                self._prompts[prompt] = self._encode_prompt(prompt)
            self._prompts.move_to_end(prompt)
            rows.append(self._prompts[prompt])
        while len(self._prompts) > max(cache_size, len(prompts)):
            self._prompts.popitem(last=False)
        embeds, pooled = (torch.cat(parts).to(self.device) for parts in zip(*rows, strict=True))
        return PromptEncoding(embeds, pooled)

    @torch.no_grad()
    def _encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        logger = diffusers_logging.get_logger(
            "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl"
        )
        level = logger.level
        logger.setLevel("ERROR")  # truncation is reported once, through is_truncated
        try:
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                prompt, device=self.device, do_classifier_free_guidance=False
            )
        finally:
            logger.setLevel(level)
        return embeds.cpu(), pooled.cpu()

    def is_truncated(self, prompt: str) -> bool:
        """Whether ``prompt`` has more tokens than the text encoders read (77 with both ends)."""
        tokenizer = self.pipe.tokenizer
        return len(tokenizer(prompt, verbose=False).input_ids) > tokenizer.model_max_length

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """Latent of one image: the mean of the VAE's posterior, scaled as the UNet expects.

        Args:
            image: [3, H, W] float32, [0, 1] RGB.

        Returns:
            [C, H/8, W/8] float32 on the generator's device.
        """
        vae = self.pipe.vae
        x = (image[None] * 2 - 1).to(vae.device, vae.dtype)
        with self._computing(self._vae_autocast):
            latent = vae.encode(x).latent_dist.mode().float()[0]
        shift, scale = self._latent_affine(latent)
        return (latent - shift) / scale

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decoder output before clamping, differentiable.

        Args:
            latents: [B, C, h, w] float32, scaled latents.

        Returns:
            [B, 3, H, W] float32, RGB in about [-1, 1].
        """
        shift, scale = self._latent_affine(latents)
        raw = (latents * scale + shift).to(self.pipe.vae.dtype)
        with self._computing(self._vae_autocast):
            return self.pipe.vae.decode(raw, return_dict=False)[0].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents [B, C, h, w], one by one: [B, 3, H, W] float32, [0, 1] RGB."""
        return torch.cat([(self.decode_raw(row) / 2 + 0.5).clamp(0, 1) for row in latents.split(1)])

    def _computing(self, dtype: torch.dtype | None) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _latent_affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Shift and scale from the UNet's latents to the VAE's own."""
        config = self.pipe.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return 0.0, 1.0 / config.scaling_factor
        mean, std = (
            torch.tensor(v, device=like.device, dtype=like.dtype).view(-1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )
        return mean, std / config.scaling_factor

    def predict(self, eps: Tensor, prompts: PromptEncoding) -> tuple[Tensor, Tensor]:
        """The one UNet evaluation; the latent is x0 = x - ``step.sigma`` * eps_hat.

        Args:
            eps: Noise, [B, C, h, w] float32, N(0, 1).
            prompts: Encoding of B prompts.

        Returns:
            (eps_hat, x), both [B, C, h, w] float32, differentiable with respect to ``eps``.
        """
        B, _, h, w = eps.shape
        unet, factor = self.pipe.unet, self.pipe.vae_scale_factor
        size = (h * factor, w * factor)
        time_ids = torch.tensor([[*size, 0, 0, *size]], device=eps.device, dtype=unet.dtype)
        with self._computing(self.autocast):
            eps_hat = unet(
                (eps * self.step.scale).to(unet.dtype),
                self.step.timestep.to(eps.device),
                encoder_hidden_states=prompts.embeds.to(unet.dtype),
                added_cond_kwargs={
                    "text_embeds": prompts.pooled.to(unet.dtype),
                    "time_ids": time_ids.expand(B, -1),
                },
                return_dict=False,
            )[0]
        return eps_hat.float(), eps * self.step.skip

    def latents(self, eps: Tensor, prompts: PromptEncoding) -> Tensor:
        """Latents x0 [B, C, h, w] float32 of noise ``eps`` [B, C, h, w]."""
        eps_hat, x = self.predict(eps, prompts)
        return x - self.step.sigma * eps_hat

    def save(self, folder: Path) -> None:
        """Write a complete diffusers pipeline (safetensors) to ``folder``, atomically."""
        # Tokenizers save how they were called last: a call makes equal files of equal models.
        self._encode_prompt("")
        with write_folder(folder) as temporary:
            self.pipe.save_pretrained(temporary, safe_serialization=True)

    def load_unet(self, folder: Path) -> None:
        """Take over the UNet's weights from a pipeline folder of ``save``."""
        trained = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        self.pipe.unet.load_state_dict(trained.state_dict())

    def fingerprint(self) -> str:
        """16 hex digits that change when any module is trained or replaced.

        Hashes name, shape and up to 1024 evenly spaced values of every tensor in float32.
        """
        digest = hashlib.sha256(repr(self.step).encode())
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            for name, value in sorted(getattr(self.pipe, part).state_dict().items()):
                flat = value.detach().flatten()
                sample = flat[:: max(1, flat.numel() // 1024)].float().cpu()
                digest.update(f"{part}.{name}{tuple(value.shape)}".encode())
                digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:16]


def _check_shape(pipe: object) -> None:
    """Raise ModelError unless ``pipe`` has the modules and the conditioning of SDXL."""
    if not isinstance(pipe, StableDiffusionXLPipeline):
        raise ModelError(f"it is a {type(pipe).__name__}, not a StableDiffusionXLPipeline")
    missing = [
        name
        for name in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler")
        if getattr(pipe, name, None) is None
    ]
    if missing:
        raise ModelError(f"the pipeline has no {', '.join(missing)}")
    config = pipe.unet.config
    if config.addition_embed_type != "text_time":
        raise ModelError("its UNet has no text_time conditioning, so it is not of SDXL's shape")
    if config.time_cond_proj_dim is not None:
        raise ModelError("its UNet takes a guidance embedding, as LCMs do; that is not supported")
    if config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(
            f"its UNet takes {config.in_channels} channels, its VAE has "
            f"{pipe.vae.config.latent_channels}: inpainting and refiner models are not supported"
        )
