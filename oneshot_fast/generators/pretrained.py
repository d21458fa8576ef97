"""Pipelines of diffusers from a folder, the hub or one file; what is wrong is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from oneshot_fast.errors import ModelError, one_line
from oneshot_fast.generators.base import LoadOptions


def read_pipeline(kind: type[Any], source: str, options: LoadOptions, dtype: torch.dtype) -> Any:
    """The pipeline at ``source``, on the CPU.

    Args:
        kind: Its class in diffusers.
        source: Folder in diffusers layout, hub id, or .safetensors file.
        options: Variant, revision, place of the configs.
        dtype: Of the weights.

    Raises:
        ModelError: If it cannot be read.
    """
    known = {"dtype": dtype, "local_files_only": options.local_files_only}
    if source.endswith(".safetensors"):
        return _read_file(kind, Path(source), options.model_config, known)
    return _read_folder(kind, source, options.variant, known | {"revision": options.revision})


def _read_folder(kind: type[Any], source: str, variant: str | None, known: dict[str, Any]) -> Any:
    folder = Path(source)
    is_local = folder.is_absolute() or source.startswith(".") or folder.exists()
    if is_local and not (folder / "model_index.json").is_file():
        raise ModelError("no model_index.json there; give a diffusers folder, a hub id or a file")
    errors: list[Exception] = []
    for choice in dict.fromkeys((variant, None)):  # a checkpoint of ours has no variant files
        try:
            return kind.from_pretrained(source, variant=choice, **known)
        except Exception as error:  # diffusers raises many types for a broken or absent model
            errors.append(error)
    if is_local:
        raise ModelError(one_line(errors[0]))
    raise ModelError(
        "it is no local folder, and the hub did not give it; download it first, or check the "
        f"name and the network ({one_line(errors[0]):.150})"
    )


def _read_file(kind: type[Any], path: Path, model_config: str | None, known: dict[str, Any]) -> Any:
    if not path.is_file():
        raise ModelError("no such file")
    try:
        return kind.from_single_file(str(path), config=model_config, **known)
    except Exception as error:  # diffusers raises many types here, bare Exception among them
        hint = "" if model_config else " (offline? name a folder of configs with --model_config)"
        raise ModelError(one_line(error) + hint) from error
