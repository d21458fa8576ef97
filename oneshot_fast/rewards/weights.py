"""Published weights into transformers' models: tensors only, every one in its place."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oneshot_fast.errors import ModelError, refused
from oneshot_fast.rewards.base import Setup
from oneshot_fast.runtime.tensor_files import misfit, read_safetensors


def read_tokenizer(setup: Setup, model: str, kind: str, *files: str) -> Any:
    """Tokenizer of transformers' class ``kind`` from the ``files`` in the folder ``model``.

    Raises:
        ModelError: If one is missing or damaged.
    """
    for file in files:
        folder = setup.find(model, file).parent
    import transformers  # slow, so a missing file is told first

    with refused(ModelError, f"cannot use the tokenizer in {folder}: "):
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)


def read_model(setup: Setup, model: str, kind: str) -> Any:
    """Model of transformers' class ``kind`` in the folder ``model``, in evaluation mode.

    Raises:
        ModelError: If a file is missing or damaged, or a tensor missing or left over.
    """
    path, config_path = (setup.find(model, f) for f in ("model.safetensors", "config.json"))
    import transformers  # slow, so a missing file is told first

    network = getattr(transformers, kind)
    with refused(ModelError, f"cannot use {config_path}: "):
        config = network.config_class.from_json_file(config_path)
    return build(network, config, read_safetensors(path), path, setup.dtype).to(setup.device)


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """Ids and attention mask, [B, length] int64 each; what exceeds ``length`` tokens is cut off."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )


def renamed(tensors: Mapping[str, Tensor], names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors, in whose names each pattern (a regular expression) becomes its other text."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for pattern, new in names:
            key = re.sub(pattern, new, key)
        found[key] = value
    return found


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
    with refused(ModelError, f"{path} has another layout: "):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
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
        with refused(ModelError, f"{path} has another layout: "):
            layer.load_state_dict({"weight": weight, "bias": bias})
        head.append(layer)
    return head
