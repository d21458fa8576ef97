"""Published weights into transformers' models: tensors only, every one in its place."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oneshot_fast.errors import ModelError, one_line
from oneshot_fast.runtime.tensor_files import misfit


def read_config(kind: Any, path: Path) -> Any:
    """Configuration of transformers' class ``kind`` in a config.json; ModelError if damaged."""
    try:
        return kind.from_json_file(path)
    except Exception as error:  # transformers raises many types for broken files
        raise ModelError(f"cannot use {path}: {one_line(error)}") from None


def read_tokenizer(kind: Any, folder: Path) -> Any:
    """Tokenizer of class ``kind`` with the vocabulary in ``folder``; ModelError if damaged."""
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many types for broken files
        raise ModelError(f"cannot use the tokenizer in {folder}: {one_line(error)}") from None


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """Ids and attention mask, [B, length] int64 each; what exceeds ``length`` tokens is cut off."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )


def depth(tensors: Iterable[str], prefix: str) -> int:
    """Number of layers whose tensors are named ``prefix`` and a number."""
    return len({k.removeprefix(prefix).split(".")[0] for k in tensors if k.startswith(prefix)})


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
            ignore_mismatched_sizes=True,
            **options,
        )
    except Exception as error:  # transformers raises many types here
        raise ModelError(f"{path} has another layout: {one_line(error)}") from None
    if wrong := misfit(info):
        raise ModelError(f"{path} has another layout: {wrong}")
    return model.eval()


def linear_head(tensors: Mapping[str, Tensor], path: Path) -> nn.Sequential:
    """The five linear layers, with dropout between them, that score an embedding; float32.

    LAION's aesthetic predictor and ImageReward have the same, without nonlinearity: keys
    ``layers.{0,2,4,6,7}.{weight,bias}``, the widths being those of the tensors.

    Raises:
        ModelError: If they are other ones; ``path`` is their file.
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
            raise ModelError(f"{path} has another layout: {one_line(error)}") from None
        head.append(layer)
    return head
