"""LoRA files of RTDMD: read without running code, and in the form that others read.

RTDMD (https://github.com/Harahan/RTDMD) saves a trained generator with torch.save:
``<module>.lora_A.default.weight`` and the same of B, without alpha; and in its checkpoint's
transformer/ by the same names, with peft's configuration, which says alpha.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.errors import ModelError, refused
from oneshot_fast.runtime.files import write_folder
from oneshot_fast.runtime.tensor_files import read_header, read_pickle, read_safetensors

# how diffusers and peft name what they read
DIFFUSERS_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
PEFT_PREFIX, PEFT_CONFIG = "base_model.model.", "adapter_config.json"
TORCH = (".pt", ".pth")  # files of torch.save, as generator_ema.pt
_KEY = re.compile(
    r"(?:module\.|_orig_mod\.|base_model\.model\.)*(.+)\.lora_([AB])\.default\.weight"
)
_UNETS = ("down_blocks.", "mid_block.", "up_blocks.")  # how modules of a UNet begin
_TRANSFORMERS = ("transformer_blocks.", "single_transformer_blocks.")


def is_rtdmds(path: Path) -> bool:
    """Whether a file has RTDMD's names of modules: one of torch.save, or of its checkpoint.

    Raises:
        ModelError: If it is damaged.
    """
    names = () if path.suffix in TORCH else read_header(path)[0]
    return path.suffix in TORCH or _KEY.fullmatch(next(iter(names), "")) is not None


def peft_config(path: Path, said: str) -> dict[str, Any]:
    """What peft's configuration beside a file says: the arguments of LoraConfig."""
    from peft import LoraConfig

    with refused(ModelError, f"{said}{PEFT_CONFIG}: "):
        known: dict[str, Any] = LoraConfig.from_pretrained(str(path.parent)).to_dict()
    known.pop("peft_type")
    return known


def read_rtdmds(
    path: Path, alpha: float | None, said: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A denoiser's LoRA in a file of RTDMD's names; code in a pickle is never run.

    Args:
        path: The file.
        alpha: Scale times rank, where no configuration beside it says it; None is twice the rank.
        said: How messages begin.

    Returns:
        MODULE.lora_A.weight [r, in] and MODULE.lora_B.weight [out, r] by name, float32, and the
        arguments of peft's LoraConfig.

    Raises:
        ModelError: If it is damaged, holds anything else, lacks a half of a pair, or has other
            ranks than the configuration beside it.
    """
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    try:
        is_pickle = path.suffix in TORCH
        raw = read_pickle(path, mmap=True) if is_pickle else read_safetensors(path)
    except ModelError as error:
        raise ModelError(f"{said}{error}") from None
    tensors, ranks = dict[str, Tensor](), dict[str, int]()
    for key, value in raw.items():
        named = _KEY.fullmatch(key)
        if named is None or value.ndim != 2 or not value.is_floating_point():
            raise ModelError(f"{said}{key} is no MODULE.lora_A.default.weight or lora_B, a matrix")
        name = f"{named[1]}.lora_{named[2]}.weight"
        if name in tensors:
            raise ModelError(f"{said}{key} is there twice, under another prefix")
        tensors[name] = value.to(torch.float32, copy=True)  # away from the file
        if not tensors[name].isfinite().all():
            raise ModelError(f"{said}{key} has values that are NaN or infinite")
    if not tensors:
        raise ModelError(f"{said}it holds no tensors")
    for name, value in tensors.items():
        module, kind = name[:-14], name[-8]
        other = tensors.get(f"{module}.lora_{'B' if kind == 'A' else 'A'}.weight")
        if other is None:
            raise ModelError(f"{said}{module} has lora_{kind} alone; its other half is missing")
        rank = value.shape[0 if kind == "A" else 1]
        if other.shape[1 if kind == "A" else 0] != rank:
            shapes = f"{list(value.shape)} and {list(other.shape)}"
            raise ModelError(f"{said}{module} has lora_A and lora_B of shapes {shapes}")
        ranks[module] = rank
    modules = "|".join(map(re.escape, ranks))
    if (path.parent / PEFT_CONFIG).is_file():
        known = peft_config(path, said)
        for module, rank in ranks.items():
            patterns = known["rank_pattern"]
            wanted = patterns.get(get_pattern_key(patterns, module), known["r"])
            if wanted != rank:
                raise ModelError(
                    f"{said}{module} has rank {rank}, but {PEFT_CONFIG} beside it says {wanted}"
                )
        return tensors, known | {"target_modules": modules}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    chosen = 2.0 * usual if alpha is None else alpha
    config: Any = LoraConfig(
        r=usual,
        lora_alpha=chosen,  # type: ignore[arg-type]  # it computes with floats
        target_modules=modules,
        rank_pattern={f"^{re.escape(k)}": r for k, r in ranks.items() if r != usual},
        alpha_pattern={
            f"^{re.escape(k)}": 2.0 * r for k, r in ranks.items() if r != usual and alpha is None
        },
    )
    return tensors, {k: v for k, v in config.to_dict().items() if k != "peft_type"}


def convert_rtdmds(path: Path, alpha: float | None, part: str, folder: Path) -> int:
    """Write a LoRA of RTDMD as files that others read.

    ``folder`` has pytorch_lora_weights.safetensors for ``pipe.load_lora_weights(folder)`` and, in
    peft/, what ``PeftModel.from_pretrained`` reads; alpha is in both.

    Args:
        path: The file.
        alpha: See ``read_rtdmds``.
        part: Name of the pipeline's network that it adapts: transformer or unet.
        folder: Where to; replaced as a whole.

    Returns:
        How many modules it adapts.

    Raises:
        ModelError: See ``read_rtdmds``; or a module is one of the other kind of network.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors, config = read_rtdmds(path, alpha, f"{path}: ")
    for key in tensors:
        kinds = ("unet", _UNETS), ("transformer", _TRANSFORMERS)
        of = next((kind for kind, begins in kinds if key.startswith(begins)), part)
        if of != part:
            raise ModelError(f"{path}: {key} is of a {of}; give --part {of}")
    metadata = {f"{part}.{key}": value for key, value in config.items()}
    text = json.dumps(metadata, indent=2, sort_keys=True, default=sorted)
    with write_folder(folder) as temporary:
        named = {f"{part}.{key}": value for key, value in tensors.items()}
        save_file(
            named, temporary / DIFFUSERS_FILE, {"format": "pt", "lora_adapter_metadata": text}
        )
        prefixed = {PEFT_PREFIX + key: value for key, value in tensors.items()}
        (temporary / "peft").mkdir()
        save_file(prefixed, temporary / "peft" / PEFT_FILE, {"format": "pt"})
        LoraConfig(**config).save_pretrained(str(temporary / "peft"))
    return len(tensors) // 2
