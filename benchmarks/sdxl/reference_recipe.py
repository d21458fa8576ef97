"""The baseline: how scripts for this job are usually written. One image at a time, nothing kept.

Half-precision UNet and float32 decoder on a GPU, the decoder run at every step although the loss is
in latents, the image encoded and the prompt encoded for every image; with ``show`` also a line, a
picture per step and plots per image. Training is AdamW on all weights in the UNet's own precision,
with a live copy of the base model as teacher.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


class ReferenceRecipe:
    """Assignment and SFT step on one pipeline."""

    def __init__(self, pipe: StableDiffusionXLPipeline, side: int) -> None:
        """Freeze the pipeline's modules; ``side`` is the image's in pixels."""
        self.pipe, self.side = pipe, side
        for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            module.requires_grad_(False)
        pipe.scheduler.set_timesteps(1)
        self.t, self.sigma = pipe.scheduler.timesteps[0], float(pipe.scheduler.sigmas[0])
        self.init = float(pipe.scheduler.init_noise_sigma)

    def encode(self, path: Path, prompt: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Latent [1, 4, h, w] of the image, and the UNet's keyword arguments for the prompt."""
        pipe, device = self.pipe, self.pipe.unet.device
        image = Image.open(path).convert("RGB").resize((self.side, self.side))
        x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].to(device) / 127.5 - 1
        with torch.no_grad():
            latent = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
            embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        size = (self.side, self.side)
        time_ids = torch.tensor([[*size, 0, 0, *size]], device=device, dtype=embeds.dtype)
        return latent, {
            "encoder_hidden_states": embeds,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
        }

    def generate(self, unet: Any, z: Tensor, conditions: dict[str, Any]) -> Tensor:
        """Latent [1, 4, h, w] float32 of noise ``z``."""
        x = z * self.init
        scaled = (x / (self.sigma**2 + 1) ** 0.5).to(unet.dtype)
        return x - self.sigma * unet(scaled, self.t, **conditions).sample.float()

    def decode(self, latent: Tensor) -> Tensor:
        """Image [3, H, W] in [0, 1]."""
        with torch.no_grad():
            raw = self.pipe.vae.decode(latent.detach() / self.pipe.vae.config.scaling_factor).sample
        return (raw[0] / 2 + 0.5).clamp(0, 1)

    def assign(
        self, path: Path, prompt: str, steps: int, lr: float, folder: Path, show: bool
    ) -> float:
        """Match one image; returns the best loss. Writes the noise as .pt into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        target, conditions = self.encode(path, prompt)
        eps = torch.randn_like(target)
        D, p = 4 * 2 * 2, 2
        a = torch.zeros(D, D, device=eps.device, requires_grad=True)
        optimizer = torch.optim.Adam([a], lr=lr)
        losses: list[float] = []
        best, best_z = float("inf"), eps
        for step in range(steps):
            q = torch.linalg.matrix_exp(a - a.T)
            patches = torch.nn.functional.unfold(eps, p, stride=p)
            z = torch.nn.functional.fold(q @ patches, eps.shape[-2:], p, stride=p)
            latent = self.generate(self.pipe.unet, z, conditions)
            loss = (latent - target).square().mean()
            image = self.decode(latent)
            if loss.item() < best:
                best, best_z = loss.item(), z.detach().clone()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if show:
                self.show_step(step, losses[-1], z, image, folder)
        torch.save(best_z.cpu(), folder / "best_input_noise.pt")
        if show:
            self.plot(losses, best_z, folder)
        return best

    def show_step(self, step: int, loss: float, z: Tensor, image: Tensor, folder: Path) -> None:
        """A line of diagnostics and a picture."""
        with (folder / "log.txt").open("a") as log:
            print(f"step {step} loss {loss:.4f} mean {z.mean():.4f} std {z.std():.4f}", file=log)
            moments = f"skewness {(z**3).mean():.4f} kurtosis {(z**4).mean():.4f}"
            print(f"norm {z.norm():.3f} {moments}", file=log)
        pixels = (image.permute(1, 2, 0) * 255).byte().cpu().numpy()
        Image.fromarray(pixels).save(folder / f"step_{step:03}.png")

    def plot(self, losses: list[float], z: Tensor, folder: Path) -> None:
        """Loss curve, histogram and channels of the noise."""
        for name, draw in (
            ("loss.png", lambda axes: axes.plot(losses)),
            ("histogram.png", lambda axes: axes.hist(z.flatten().cpu().numpy(), bins=50)),
            ("noise.png", lambda axes: axes.imshow(z[0, 0].cpu().numpy())),
        ):
            figure, axes = plt.subplots()
            draw(axes)
            figure.savefig(folder / name)
            plt.close(figure)

    def trainer(self, lr: float) -> None:
        """Unfreeze the UNet, copy it as the teacher, make the optimiser."""
        self.teacher = copy.deepcopy(self.pipe.unet)
        self.pipe.unet.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.pipe.unet.parameters(), lr=lr)

    def train_step(self, path: Path, prompt: str, z: Tensor, preserve_weight: float) -> float:
        """One step on one pair and one random noise for the preserve loss."""
        target, conditions = self.encode(path, prompt)
        loss = (self.generate(self.pipe.unet, z, conditions) - target).square().mean()
        noise = torch.randn_like(z)
        with torch.no_grad():
            base = self.generate(self.teacher, noise, conditions)
        kept = self.generate(self.pipe.unet, noise, conditions)
        loss = loss + preserve_weight * (kept - base).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.pipe.unet.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()
