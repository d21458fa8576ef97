"""Published weights into transformers' models: tensors only, every one in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from oneshot_fast.errors import ModelError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ModelError: If it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"cannot read {path}: {first_line(error)}; download it anew") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pt or .pth file, on the CPU; code in the file is never run.

    Returns:
        The tensors by key; those under ``state_dict`` where the file has that.

    Raises:
        ModelError: If the file is damaged or holds more than tensors.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many types for a broken file
        raise ModelError(
            f"cannot read the tensors of {path}, damaged or more than tensors: {first_line(error)}"
        ) from None
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(tensors, dict) or not all(torch.is_tensor(v) for v in tensors.values()):
        raise ModelError(f"{path} is no checkpoint: expected tensors by name")
    return tensors


def read_config(kind: Any, path: Path) -> Any:
    """Configuration of transformers' class ``kind`` in a config.json.

    Raises:
        ModelError: If it is damaged.
    """
    try:
        return kind.from_json_file(path)
    except Exception as error:  # transformers raises many types for broken files
        raise ModelError(f"cannot use {path}: {first_line(error)}") from None


def build(
    kind: Any,
    config: Any,
    tensors: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype,
    **options: Any,
) -> Any:
    """A model of transformers' class ``kind`` with ``tensors``, in evaluation mode.

    Args:
        kind: Such as ``CLIPModel``.
        config: Its configuration.
        tensors: All of its weights and nothing else.
        path: Their file, for messages.
        dtype: Type of the weights.
        options: More arguments of the class.

    Raises:
        ModelError: If a tensor is missing, left over or of another shape.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=dtype,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # transformers raises many types here
        raise ModelError(f"{path} has another layout: {first_line(error)}") from None
    wrong = [f"no {key}" for key in sorted(info["missing_keys"])]
    wrong += [f"unknown {key}" for key in sorted(info["unexpected_keys"])]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(f"{path} has another layout: {wrong[0]}{more}")
    return model.eval()


def linear_head(tensors: Mapping[str, Tensor], path: Path) -> nn.Sequential:
    """The five linear layers, with dropout between them, that score an embedding; float32.

    LAION's aesthetic predictor and ImageReward have the same, without nonlinearity: keys
    ``layers.{0,2,4,6,7}.{weight,bias}``, the widths being those of the tensors.

    Args:
        tensors: Those ten.
        path: Their file, for messages.

    Raises:
        ModelError: If they are other ones.
    """
    numbers = (0, 2, 4, 6, 7)
    expected = {f"layers.{n}.{part}" for n in numbers for part in ("weight", "bias")}
    wrong = sorted(expected ^ tensors.keys())
    if wrong:
        raise ModelError(f"{path} has another layout: {wrong[0]} is missing or unknown")
    head = nn.Sequential()
    for n in numbers:
        weight, bias = (tensors[f"layers.{n}.{part}"].float() for part in ("weight", "bias"))
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        try:
            layer.load_state_dict({"weight": weight, "bias": bias})
        except RuntimeError as error:
            raise ModelError(f"{path} has another layout: {first_line(error)}") from None
        head.append(layer)
    return head


def first_line(error: Exception) -> str:
    """First line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
