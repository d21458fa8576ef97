"""The small generators: no VAE, no text, the noise of a shape of its own."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oneshot_fast.data.sizes import Size
from oneshot_fast.errors import ModelError, UserError, one_line
from oneshot_fast.generators.base import Conditioning, Generator, LoadOptions, Prediction
from oneshot_fast.generators.decoder import update_digest
from oneshot_fast.generators.toy_networks import ToyClassifier, ToyConfig, ToyNetwork
from oneshot_fast.runtime.files import write_folder

_ON_CPU = LoadOptions()


class ToyGenerator(Generator):
    """Class and noise in, image out.

    There is no VAE: a latent is the image, [3, s, s] in [-1, 1]. The noise has a shape of its own.
    """

    runs_in_half = False
    classifier: ToyClassifier | None = None

    def __init__(self, config: ToyConfig, denoiser: ToyNetwork | None = None) -> None:
        """Wrap the network that makes the images, by default one with initial weights; freeze it.

        ``classifier``, where it is set, is saved beside it.
        """
        self.config = config
        self._network = (denoiser or ToyNetwork(config)).requires_grad_(False).eval()

    @classmethod
    def reads(cls, model_id: str) -> bool:
        """Whether a folder holds a model of ``save``."""
        try:
            return _read_config(Path(model_id)).get("model") == "toy"
        except (OSError, ValueError):
            return False

    @property
    def denoiser(self) -> ToyNetwork:
        return self._network

    def replace_module(self, module: nn.Module) -> None:
        assert isinstance(module, ToyNetwork)
        self._network = module

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self._network}

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def latent_factor(self) -> int:
        return 1

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """That of the image."""
        if height != self.image_size or width != self.image_size:
            raise UserError(f"this model makes {self.image_size} x {self.image_size} pixels only")
        return 3, height, width

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        self.latent_shape(height, width)
        return self.config.noise_shape

    def size_of_noise(self, noise_shape: Sequence[int]) -> Size:
        """Height and width in pixels of what a noise makes: always the same."""
        return self.image_size, self.image_size

    def blank_prompts(self, count: int) -> Conditioning:
        return Conditioning(torch.zeros(count, 1, len(self.config.prompts)))

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """One-hot classes, [B, 1, K].

        Raises:
            UserError: For a prompt that is no class of this model.
        """
        known = self.config.prompts
        for prompt in prompts:
            if prompt not in known:
                raise UserError(f'this model knows only prompts like "{known[0]}", not "{prompt}"')
        labels = torch.tensor([known.index(prompt) for prompt in prompts])
        return Conditioning(F.one_hot(labels, len(known))[:, None].float().to(self.device))

    def encode_image(self, image: Tensor) -> Tensor:
        """Latent [3, s, s] of an image [3, s, s] in [0, 1]."""
        return (image * 2 - 1).to(self.device)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """The latents themselves, [B, 3, s, s]."""
        return latents

    def predict(self, eps: Tensor, conditioning: Conditioning) -> Prediction:
        """The network's output is the image: x = 0, sigma = -1."""
        image = self._network(eps, conditioning.embeds[:, 0])
        return Prediction(image, torch.zeros_like(image), -1.0)

    def save(self, folder: Path) -> None:
        """Write the networks as safetensors, and config.json, to ``folder``, atomically."""
        with write_folder(folder) as temporary:
            config = {"model": "toy", **dataclasses.asdict(self.config)}
            (temporary / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            save_file(self._network.state_dict(), temporary / "model.safetensors")
            if self.classifier is not None:
                save_file(self.classifier.state_dict(), temporary / "classifier.safetensors")

    def load_weights(self, folder: Path) -> None:
        """Take over the weights of a folder of ``save``."""
        self._network.load_state_dict(load_file(folder / "model.safetensors"))

    @classmethod
    def load(cls, model_id: str | Path, options: LoadOptions = _ON_CPU) -> "ToyGenerator":
        """Read what ``save`` wrote."""
        folder = Path(model_id)
        given = options.model_config, options.timestep
        if options.dtype not in (None, torch.float32) or given != (None, None):
            raise ModelError(f"model {folder} takes no --dtype, --model_config or --timestep")
        try:
            found = _read_config(folder)
            C, h, w = found["noise_shape"]
            sizes = found["image_size"], (C, h, w), found["width"]
            config = ToyConfig(tuple(found["prompts"]), *sizes)
            generator = cls(config)
            generator.load_weights(folder)
            generator.denoiser.to(options.device)
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
        update_digest(digest, "unet", self._network)
        return digest.hexdigest()[:16]


def _read_config(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
