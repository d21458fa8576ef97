"""Encodings on disk, named by what they are made of."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class EncodingCache:
    """A folder with one safetensors file per prompt or image; any number of runs may share it."""

    def __init__(self, folder: Path) -> None:
        """Describe the cache; nothing is written before there is something to keep."""
        self._folder = Path(folder)

    def get(
        self, key: Sequence[object], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Tensors by name, on the CPU; ``make`` gives what is not there.

        ``key`` is all that they depend on, as JSON holds it; its hash names the file.
        """
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
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
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        return made
