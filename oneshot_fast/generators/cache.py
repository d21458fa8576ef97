"""Prompt encodings and target latents on disk, named by what they are made of."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from oneshot_fast.data.pairs import ImageRef, file_sha256
from oneshot_fast.generators.decoder import update_digest

if TYPE_CHECKING:
    from oneshot_fast.generators.sdxl import OneStepGenerator


class EncodingCache:
    """A folder with one safetensors file per prompt or image; any number of runs may share it.

    A file's name is a hash of the encoder's weights, type and device, and of the prompt's tokens,
    or of the image's bytes and how it is resized.
    """

    def __init__(self, folder: Path, generator: OneStepGenerator) -> None:
        """Describe the cache; nothing is written before there is something to keep.

        Args:
            folder: Where the files are.
            generator: Its networks encode; they must not be changed.
        """
        self._folder, self._generator = Path(folder), generator

    def prompt(self, prompt: str, encode: Callable[[str], tuple[Tensor, Tensor]]) -> Any:
        """Encoding (embeds [1, 77, D], pooled [1, P]) of ``prompt``, on the CPU.

        Args:
            prompt: The text.
            encode: Makes what is not there.
        """
        pipe = self._generator.pipe
        tokens = [t(prompt, verbose=False).input_ids for t in (pipe.tokenizer, pipe.tokenizer_2)]

        def make() -> dict[str, Tensor]:
            return dict(zip(("embeds", "pooled"), encode(prompt), strict=True))

        found = self._get(("prompt", self._text_encoders, tokens), make)
        return found["embeds"], found["pooled"]

    def latent(
        self, image: ImageRef, resize_mode: str, resolution: int, encode: Callable[[], Tensor]
    ) -> Tensor:
        """Latent [C, h, w] float32 of ``image``, on the CPU.

        Args:
            image: Where it is.
            resize_mode: How it is brought to ``resolution``.
            resolution: Side in pixels.
            encode: Makes what is not there.

        Raises:
            DataError: If the image cannot be read.
        """
        what = ("latent", self._image_encoder, file_sha256(image), resize_mode, resolution)
        return self._get(what, lambda: {"latent": encode()})["latent"]

    @cached_property
    def _text_encoders(self) -> str:
        return self._fingerprint("text_encoder", "text_encoder_2")

    @cached_property
    def _image_encoder(self) -> str:
        return self._fingerprint("vae")

    def _fingerprint(self, *names: str) -> str:
        """Text that changes when one of these networks, or how it computes, changes."""
        digest = hashlib.sha256(str(self._generator.autocast).encode())
        for name in names:
            network = self._generator.networks[name]
            first = next(network.parameters())
            digest.update(f"{first.dtype} {first.device.type}".encode())
            update_digest(digest, name, network)
        return digest.hexdigest()

    def _get(
        self, what: Sequence[object], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        path = self._folder / name[:2] / f"{name[2:]}.safetensors"
        try:
            # copies: others may replace or remove the file
            return {key: value.clone() for key, value in load_file(path).items()}
        except (FileNotFoundError, SafetensorError):  # not there, or torn by a fault of the disk
            made = {key: value.cpu().contiguous() for key, value in make().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        # a folder of its own: another process may write the same file
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            save_file(made, temporary)
            descriptor = os.open(temporary, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            temporary.replace(path)
        return made
