"""Latents to images, differentiably: a VAE's decoder, or a tiny one in its place."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from oneshot_fast.errors import ModelError, require
from oneshot_fast.generators.precision import gradient_scale, scale_gradient, widened
from oneshot_fast.generators.pretrained import load_network, refuse_dangling


class Decoder:
    """Decodes scaled latents in the type of the decoder's weights, or under autocast."""

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        autocast: torch.dtype | None = None,
        overflows: bool = False,
    ) -> None:
        """Wrap a VAE, or a tiny one for the same latents, whose weights must be frozen.

        With ``autocast`` it computes in this type over float32 weights. One that ``overflows`` in
        float16 does not decode in it.
        """
        self._overflows = overflows
        self._vae, self._autocast, self._tile = vae, autocast, 0
        self.is_tiny = isinstance(vae, AutoencoderTiny)

    @property
    def computes_in(self) -> torch.dtype:
        """Type of its arithmetic."""
        return self._autocast or self.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoder's weights."""
        return next(iter(self._vae.decoder.parameters())).dtype

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Decode in ``dtype`` from now on; the encoder stays as it is.

        Raises:
            ModelError: For float16, if the VAE overflows in it.
        """
        if dtype == torch.float16 and self._overflows:
            raise ModelError(
                "its VAE overflows in float16 (force_upcast); decode in bfloat16 or float32, or "
                "use a model with the fixed VAE"
            )
        self._autocast = None
        self._vae.decoder.to(dtype)
        if getattr(self._vae, "post_quant_conv", None) is not None:
            self._vae.post_quant_conv.to(dtype)

    def fingerprint(self) -> str:
        """Text that differs where images do; empty for the VAE's decoder as it was loaded."""
        if not self.is_tiny:
            return "" if not self._tile else f"tile {self._tile}"
        digest = hashlib.sha256()
        update_digest(digest, "decoder", self._vae.decoder)
        return digest.hexdigest()

    @property
    def can_checkpoint(self) -> bool:
        """Whether ``checkpoint`` is known to this VAE."""
        return self._vae._supports_gradient_checkpointing

    def checkpoint(self) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Raises:
            UserError: If this VAE cannot.
        """
        kind = type(self._vae).__name__
        require(self.can_checkpoint, f"decoder_checkpointing is not for an {kind}; leave it out")
        self._vae.enable_gradient_checkpointing()

    def tile(self, side: int) -> None:
        """Decode in overlapping tiles of ``side`` latent pixels, blended at their seams.

        Memory is saved by tiles together with ``checkpoint``; the image differs a little.

        Raises:
            UserError: If ``side`` is no multiple of 4, or the decoder is a tiny one.
        """
        require(
            side > 0 and side % 4 == 0,
            f"decoder_tiling is {side}; give a multiple of 4 latent pixels, or 0 for none",
        )
        require(not self.is_tiny, "decoder_tiling is not for a tiny decoder; leave one of them out")
        require(
            isinstance(self._vae, AutoencoderKL),
            f"decoder_tiling is not for an {type(self._vae).__name__}; leave it out",
        )
        self._tile = side
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        self._vae.tile_latent_min_size, self._vae.tile_sample_min_size = side, side * factor

    def raw(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32 in about [-1, 1] RGB, before clamping, differentiable.

        They are of scaled latents [B, C, h, w] float32.
        """
        shift, scale = latent_affine(self._vae, latents)
        s = gradient_scale(self.computes_in, 3 * 8 * 8 * latents[0, 0].numel())
        raw = scale_gradient(latents * scale + shift, 1 / s).to(self.dtype)
        with computing(latents.device, self._autocast):
            return scale_gradient(widened(self._decode(raw)), s)

    def _decode(self, latents: Tensor) -> Tensor:
        if self._tile and max(latents.shape[-2:]) > self._tile:
            return self._vae.tiled_decode(latents, return_dict=False)[0]
        return self._vae.decode(latents, return_dict=False)[0]


def load_tiny_decoder(
    decoder_id: str, device: torch.device, dtype: torch.dtype, latent_channels: int
) -> Decoder:
    """Load a tiny autoencoder (diffusers' AutoencoderTiny, such as madebyollin/taesdxl).

    Raises:
        ModelError: If it cannot be loaded or is for other latents.
    """
    try:
        refuse_dangling(Path(decoder_id))
        vae, wrong = load_network(AutoencoderTiny, decoder_id, torch_dtype=dtype)
        if wrong:
            raise ModelError(wrong)
    except ModelError as error:
        raise ModelError(f"cannot use decoder {decoder_id}: {error}") from None
    if vae.config.latent_channels != latent_channels:
        raise ModelError(
            f"cannot use decoder {decoder_id}: it is for {vae.config.latent_channels} latent "
            f"channels, the model has {latent_channels}"
        )
    return Decoder(vae.to(device).requires_grad_(False).eval())


def computing(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to ``dtype``, or none."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def latent_affine(
    vae: AutoencoderKL | AutoencoderTiny, like: Tensor
) -> tuple[Tensor | float, Tensor | float]:
    """Shift and scale from the denoiser's latents to the VAE's own."""
    config = vae.config
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return getattr(config, "shift_factor", None) or 0.0, 1.0 / config.scaling_factor
    mean, std = (
        torch.tensor(v, device=like.device, dtype=like.dtype).view(-1, 1, 1) for v in (mean, std)
    )
    return mean, std / config.scaling_factor


def update_digest(digest: "hashlib._Hash", part: str, module: nn.Module) -> None:
    """Hash name, shape and up to 2047 evenly spaced values of every tensor in float32.

    Of a network of diffusers or transformers the config, too, such as a VAE's scaling_factor.
    """
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_diff_dict"):  # of transformers
        config = config.to_diff_dict()
    if isinstance(config, Mapping):
        # not the libraries' own notes, such as their versions, nor the type, which weights have
        notes = {"transformers_version", "architectures", "dtype"}
        told = {k: v for k, v in config.items() if not k.startswith("_") and k not in notes}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu()
        digest.update(f"{part}.{name}{tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
