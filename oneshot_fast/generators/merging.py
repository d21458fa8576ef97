"""A whole model with LoRAs merged into its weights, network by network, without running it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oneshot_fast.errors import ModelError, require
from oneshot_fast.generators.base import LoadOptions
from oneshot_fast.generators.loading import find_family
from oneshot_fast.generators.lora_files import LoraFile, MergedSource
from oneshot_fast.generators.pipeline import PipelineGenerator
from oneshot_fast.generators.pretrained import open_folder, write_use
from oneshot_fast.runtime.files import write_folder


def write_merged(
    model_id: str,
    loras: Sequence[LoraFile],
    folder: Path,
    options: LoadOptions,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a pipeline with ``loras`` merged in, in diffusers layout, atomically.

    The changes of all files are added up in float64 and the sum is rounded once, to ``dtype``.

    Args:
        model_id: Folder in diffusers layout or hub id, also of a model of many steps.
        loras: What is merged.
        folder: Where to; replaced as a whole.
        options: How the model is found.
        dtype: Of all written weights; None is that of their files.

    Raises:
        ModelError: If the model is of no family that takes a LoRA, or a file is not for it.
    """
    family: Any
    family, source_id = find_family(model_id, options)
    known = issubclass(family, PipelineGenerator) and not source_id.endswith(".safetensors")
    require(
        known,
        f"--model_id {model_id} is no pipeline's folder in diffusers layout, which merge needs; "
        "give one (pipe.save_pretrained writes it)",
    )
    try:
        source = open_folder(family, source_id, options)
        pipe = MergedSource(source, family.parts, loras, dtype).read(dtype)
    except ModelError as error:
        raise ModelError(f"cannot merge into model {model_id}: {error}") from None
    with write_folder(folder) as temporary:
        pipe.save_pretrained(temporary, safe_serialization=True)
        write_use(temporary, source.use)
