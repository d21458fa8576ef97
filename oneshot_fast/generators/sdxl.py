"""The one-step generator; only this file, loading.py and pipeline_check.py know the pipeline."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from oneshot_fast.generators.base import PromptEncoding
from oneshot_fast.generators.cache import EncodingCache
from oneshot_fast.generators.decoder import Decoder, computing, latent_affine, update_digest
from oneshot_fast.generators.pipeline_check import check_shape
from oneshot_fast.generators.precision import gradient_scale, scale_gradient
from oneshot_fast.generators.step import OneStep
from oneshot_fast.runtime.files import write_folder

__all__ = ["OneStepGenerator", "PromptEncoding"]


class OneStepGenerator:
    """Prompt and Gaussian noise in, latent and image out, in one UNet evaluation.

    Weights are frozen; SFT unfreezes ``unet``. Noise, latents and images are float32; the UNet and
    the VAE run in ``dtype``.
    """

    classifier = None  # a judge of samples that comes with the model
    encodings: EncodingCache | None = None  # on disk
    prompts_kept: int = 4096  # encodings in memory

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
        check_shape(pipe)
        self.pipe = pipe
        self.autocast = vae_autocast = autocast
        if pipe.vae.config.force_upcast:  # as diffusers does: SDXL's VAE overflows in float16
            if pipe.vae.dtype == torch.float16:
                pipe.vae.to(torch.float32)
            if autocast == torch.float16:
                vae_autocast = None
        self.step = OneStep.from_scheduler(pipe.scheduler)
        for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            module.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)
        self._vae_autocast = vae_autocast
        self.decoder = Decoder(pipe.vae, vae_autocast)
        self._prompts: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._conditions: dict[object, tuple[Tensor, Tensor]] = {}
        self._compiled_unet: Callable[..., Any] | None = None

    @property
    def unet(self) -> UNet2DConditionModel:
        """The trained part."""
        return self.pipe.unet

    @property
    def device(self) -> torch.device:
        """Where the UNet lives; diffusers' own ``device`` and ``dtype`` look at all modules."""
        return next(self.pipe.unet.parameters()).device

    @property
    def image_size(self) -> int:
        """Native image side in pixels."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    @property
    def latent_factor(self) -> int:
        """Pixels per latent pixel and side."""
        return self.pipe.vae_scale_factor

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks by name; the first is ``unet``."""
        names = ("unet", "vae", "text_encoder", "text_encoder_2")
        return {name: getattr(self.pipe, name) for name in names}

    def with_networks(
        self, networks: Mapping[str, nn.Module], decoder: Decoder
    ) -> OneStepGenerator:
        """A copy of this generator, not compiled, with other networks of the same shapes."""
        other = copy.copy(self)
        other.pipe = copy.copy(self.pipe)
        for name in networks:
            setattr(other.pipe, name, None)
        for name, network in networks.items():
            setattr(other.pipe, name, network)
        other.decoder, other._compiled_unet = decoder, None
        other._prompts, other._conditions = OrderedDict(), {}
        return other

    @property
    def is_compiled(self) -> bool:
        """Whether each batch size costs a compilation."""
        return self._compiled_unet is not None

    def compile(self, mode: str = "default") -> None:
        """Compile the UNet where it is differentiated; see torch.compile.

        Code is compiled at the first use with a batch size, and kept on disk by torch. Under
        no_grad nothing is compiled: that is one evaluation in many, of other batch sizes. The
        decoder stays as it is: torch 2.13's inductor fuses the backward pass of two of its blocks
        in channels_last order, which it chooses itself on the CPU, to a gradient of 0.

        Args:
            mode: "default", "max-autotune", or "reduce-overhead" for CUDA graphs.
        """
        self._compiled_unet = torch.compile(self.pipe.unet, mode=mode, dynamic=False)

    def use_channels_last(self) -> None:
        """Keep weights, and with them activations, in channels_last order."""
        self.pipe.unet.to(memory_format=torch.channels_last)
        self.pipe.vae.to(memory_format=torch.channels_last)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of the latent of a ``height`` x ``width`` pixel image."""
        factor = self.pipe.vae_scale_factor
        return self.pipe.unet.config.in_channels, height // factor, width // factor

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of the noise that such an image is made of: its latent's."""
        return self.latent_shape(height, width)

    def side_of(self, noise_shape: Sequence[int]) -> int:
        """Side in pixels of the image that a noise of this shape makes."""
        return noise_shape[-1] * self.latent_factor

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEncoding:
        """Encode prompts as the pipeline does, each distinct one once.

        Prompts run one by one, so an encoding never depends on its neighbours' rounding.

        Returns:
            Encoding of B = len(prompts) prompts on the generator's device.
        """
        rows = []
        for prompt in prompts:
            if prompt not in self._prompts:
                kept, make = self.encodings, self._encode_prompt
                self._prompts[prompt] = kept.prompt(prompt, make) if kept else make(prompt)
            self._prompts.move_to_end(prompt)
            rows.append(self._prompts[prompt])
        while len(self._prompts) > max(self.prompts_kept, len(prompts)):
            self._prompts.popitem(last=False)
        embeds, pooled = (torch.cat(parts).to(self.device) for parts in zip(*rows, strict=True))
        return PromptEncoding(embeds, pooled)

    def blank_prompts(self, count: int) -> PromptEncoding:
        """Zeros of the shape of an encoding of ``count`` prompts, on torch's default device."""
        width = self.pipe.unet.config.cross_attention_dim
        pooled = self.pipe.text_encoder_2.config.projection_dim
        return PromptEncoding(torch.zeros(count, 77, width), torch.zeros(count, pooled))

    @torch.no_grad()
    def _encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        logger = diffusers_logging.get_logger(
            "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl"
        )
        level = logger.level
        logger.setLevel("ERROR")  # truncation is reported once, through is_truncated
        try:
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                prompt, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
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
        x = (image[None] * 2 - 1).to(vae.device, next(vae.encoder.parameters()).dtype)
        with computing(vae.device, self._vae_autocast):
            latent = vae.encode(x).latent_dist.mode().float()[0]
        shift, scale = latent_affine(vae, latent)
        return (latent - shift) / scale

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decoder output before clamping, differentiable.

        Args:
            latents: [B, C, h, w] float32, scaled latents.

        Returns:
            [B, 3, H, W] float32, RGB in about [-1, 1].
        """
        return self.decoder.raw(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents [B, C, h, w], one by one: [B, 3, H, W] float32, [0, 1] RGB."""
        return torch.cat([(self.decode_raw(row) / 2 + 0.5).clamp(0, 1) for row in latents.split(1)])

    def predict(self, eps: Tensor, prompts: PromptEncoding) -> tuple[Tensor, Tensor]:
        """The one UNet evaluation; the latent is x0 = x - ``step.sigma`` * eps_hat.

        Args:
            eps: Noise, [B, C, h, w] float32, N(0, 1).
            prompts: Encoding of B prompts.

        Returns:
            (eps_hat, x), both [B, C, h, w] float32, differentiable with respect to ``eps``.
        """
        run, dtype = self.pipe.unet, next(self.pipe.unet.parameters()).dtype
        if self._compiled_unet is not None and torch.is_grad_enabled():
            torch.compiler.cudagraph_mark_step_begin()
            run = self._compiled_unet
        timestep, time_ids = self._fixed_conditions(eps, dtype)
        s = self._gradient_scale(dtype, eps[0].numel())
        with computing(eps.device, self.autocast):
            eps_hat = run(
                scale_gradient(eps * self.step.scale, 1 / s).to(dtype),
                timestep,
                encoder_hidden_states=prompts.embeds.to(dtype),
                added_cond_kwargs={
                    "text_embeds": prompts.pooled.to(dtype),
                    "time_ids": time_ids.expand(len(eps), -1),
                },
                return_dict=False,
            )[0]
        return scale_gradient(eps_hat.float(), s), eps * self.step.skip

    def _fixed_conditions(self, eps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Timestep and size conditions [1, 6], made once: each copy makes a GPU wait."""
        h, w = (side * self.pipe.vae_scale_factor for side in eps.shape[-2:])
        key = h, w, eps.device, dtype
        if key not in self._conditions:
            time_ids = torch.tensor([[h, w, 0, 0, h, w]], device=eps.device, dtype=dtype)
            self._conditions[key] = self.step.timestep.to(eps.device), time_ids
        return self._conditions[key]

    def _gradient_scale(self, dtype: torch.dtype, elements: int) -> float:
        """Scale of the gradients inside the UNet; 1 where it is trained, which has its own."""
        scale = gradient_scale(self.autocast or dtype, elements)
        if scale != 1 and any(p.requires_grad for p in self.pipe.unet.parameters()):
            return 1.0
        return scale

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
        """16 hex digits that change when any module or its precision changes.

        Hashes name, shape and up to 1024 evenly spaced values of every tensor in float32.
        """
        digest = hashlib.sha256(repr(self.step).encode())
        for name, network in self.networks.items():
            update_digest(digest, name, network)
        digest.update(self.decoder.fingerprint().encode())
        precision = self.autocast or self.pipe.unet.dtype, self.decoder.computes_in
        if set(precision) != {torch.float32}:
            digest.update(repr(precision).encode())
        return digest.hexdigest()[:16]
