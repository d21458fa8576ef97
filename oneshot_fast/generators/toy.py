"""The small generators behind the interface of ``OneStepGenerator``."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oneshot_fast.errors import ModelError, UserError, one_line
from oneshot_fast.generators.base import PromptEncoding
from oneshot_fast.generators.decoder import update_digest
from oneshot_fast.generators.toy_networks import ToyClassifier, ToyConfig, ToyNetwork
from oneshot_fast.runtime.files import write_folder


@dataclass(frozen=True)
class _Step:
    """The step of ``OneStep`` whose result is the network's output itself."""

    sigma: float = -1.0


class ToyGenerator:
    """Prompt and noise in, image out: what the pipeline needs of a ``OneStepGenerator``.

    There is no VAE: a latent is the image, [3, s, s] in [-1, 1]. The noise has a shape of its own.
    """

    is_compiled = False
    autocast: torch.dtype | None = None
    decoder = None
    encodings = None
    step = _Step()

    def __init__(
        self,
        config: ToyConfig,
        unet: ToyNetwork | None = None,
        classifier: ToyClassifier | None = None,
    ) -> None:
        """Wrap networks; they are frozen.

        Args:
            config: Sizes.
            unet: What makes the images; by default one with initial weights.
            classifier: Judge of the samples, saved beside them.
        """
        self.config, self.classifier = config, classifier
        self.unet = (unet or ToyNetwork(config)).requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.unet.parameters()).device

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The one network, by name."""
        return {"unet": self.unet}

    def with_networks(self, networks: Mapping[str, nn.Module], decoder: None) -> ToyGenerator:
        """A copy of this generator with another network of the same shape."""
        other = copy.copy(self)
        other.unet = networks["unet"]  # type: ignore[assignment]
        return other

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.config.image_size

    @property
    def latent_factor(self) -> int:
        """Pixels per latent pixel and side."""
        return 1

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of a latent: the image's.

        Raises:
            UserError: For another size than the generator's own.
        """
        if height != self.image_size or width != self.image_size:
            raise UserError(f"this model makes {self.image_size} x {self.image_size} pixels only")
        return 3, height, width

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of a noise."""
        self.latent_shape(height, width)
        return self.config.noise_shape

    def side_of(self, noise_shape: Sequence[int]) -> int:
        """Side in pixels of what a noise makes: always the same."""
        return self.image_size

    def blank_prompts(self, count: int) -> PromptEncoding:
        """Zeros of the shape of an encoding of ``count`` prompts, on torch's default device."""
        classes = torch.zeros(count, len(self.config.prompts))
        return PromptEncoding(classes[:, None], classes)

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEncoding:
        """One-hot classes.

        Raises:
            UserError: For a prompt that is no class of this model.
        """
        known = self.config.prompts
        for prompt in prompts:
            if prompt not in known:
                raise UserError(f'this model knows only prompts like "{known[0]}", not "{prompt}"')
        labels = torch.tensor([known.index(prompt) for prompt in prompts])
        classes = F.one_hot(labels, len(known)).float().to(self.device)
        return PromptEncoding(classes[:, None], classes)

    def is_truncated(self, prompt: str) -> bool:
        """No prompt is."""
        return False

    def encode_image(self, image: Tensor) -> Tensor:
        """Latent [3, s, s] of an image [3, s, s] in [0, 1]."""
        return (image * 2 - 1).to(self.device)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """The latents themselves, [B, 3, s, s]."""
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, s, s] in [0, 1]."""
        return (latents / 2 + 0.5).clamp(0, 1)

    def predict(self, eps: Tensor, prompts: PromptEncoding) -> tuple[Tensor, Tensor]:
        """(image, zeros), so that x - sigma * eps_hat is the image; differentiable."""
        image = self.unet(eps, prompts.pooled)
        return image, torch.zeros_like(image)

    def compile(self, mode: str = "default") -> None:
        """Refused.

        Raises:
            UserError: Always.
        """
        raise UserError("the small generators are not compiled; leave --compile out")

    def use_channels_last(self) -> None:
        """Keep weights, and with them activations, in channels_last order."""
        self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def latents(self, eps: Tensor, prompts: PromptEncoding) -> Tensor:
        """Latents [B, 3, s, s] of noises [B, C, h, w]."""
        return self.predict(eps, prompts)[0]

    def save(self, folder: Path) -> None:
        """Write the networks as safetensors, and config.json, to ``folder``, atomically."""
        with write_folder(folder) as temporary:
            config = {"model": "toy", **dataclasses.asdict(self.config)}
            (temporary / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            save_file(self.unet.state_dict(), temporary / "model.safetensors")
            if self.classifier is not None:
                save_file(self.classifier.state_dict(), temporary / "classifier.safetensors")

    def load_unet(self, folder: Path) -> None:
        """Take over the weights of a folder of ``save``."""
        self.unet.load_state_dict(load_file(folder / "model.safetensors"))

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> ToyGenerator:
        """Read what ``save`` wrote.

        Raises:
            ModelError: If it is not there or of another kind.
        """
        try:
            found = _read_config(folder)
            C, h, w = found["noise_shape"]
            sizes = found["image_size"], (C, h, w), found["width"]
            config = ToyConfig(tuple(found["prompts"]), *sizes)
            generator = cls(config)
            generator.load_unet(folder)
            generator.unet.to(device)
            judge = folder / "classifier.safetensors"
            if judge.exists():
                generator.classifier = ToyClassifier(config.prompts, config.image_size)
                generator.classifier.load_state_dict(load_file(judge))
                generator.classifier.requires_grad_(False).eval()
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"cannot use small model {folder}: {one_line(str(error))}") from None
        return generator

    def fingerprint(self) -> str:
        """16 hex digits that change when the network or its sizes change."""
        digest = hashlib.sha256(repr(self.config).encode())
        update_digest(digest, "unet", self.unet)
        return digest.hexdigest()[:16]


def is_toy(folder: Path) -> bool:
    """Whether ``folder`` holds a model of ``ToyGenerator.save``."""
    try:
        return _read_config(folder).get("model") == "toy"
    except (OSError, ValueError):
        return False


def _read_config(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
