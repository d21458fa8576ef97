"""`python -m oneshot_fast.lora convert | merge`: LoRA files in other forms, or in the weights."""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitSubcommandPrefixes, Positional, UseAppendAction, subcommand

from oneshot_fast.cli import OK, run_command
from oneshot_fast.errors import require


@dataclass(frozen=True)
class ConvertConfig:
    """Write RTDMD's generator_ema.pt as diffusers and peft read it.

    The folder has pytorch_lora_weights.safetensors for pipe.load_lora_weights, and peft/ for
    PeftModel.from_pretrained.
    """

    file: Positional[Path]
    """generator_ema.pt, a folder that holds it, or a checkpoint's folder with transformer/; code in
    it is never run."""
    output_dir: Positional[Path]
    """Folder to write; it must not be there yet."""
    part: Literal["transformer", "unet"] = "transformer"
    """The pipeline's network that it adapts."""
    lora_alpha: float | None = None
    """Scale times rank, where no adapter_config.json beside the file says it; by default twice the
    rank, as RTDMD trains (64 for rank 32)."""


@dataclass(frozen=True)
class MergeConfig:
    """Write a whole model with LoRAs merged into its weights."""

    model_id: str
    """Folder in diffusers layout, or hub id."""
    output_dir: Path
    """Folder to write; it must not be there yet."""
    lora: UseAppendAction[tuple[str, ...]]
    """FILE or FILE:WEIGHT, of any format that --lora of other commands reads; may be given several
    times: changes are added up in float64, in any order, and rounded once."""
    lora_alpha: float | None = None
    """As for convert; of all files that do not say it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the written weights; auto: that of the model's files."""
    variant: str | None = None
    """Weight variant, such as fp16."""
    revision: str | None = None
    """Hub revision."""


@dataclass(frozen=True)
class LoraCommand:
    """LoRA files in other forms, or in the weights."""

    command: OmitSubcommandPrefixes[
        Annotated[ConvertConfig, subcommand("convert")]
        | Annotated[MergeConfig, subcommand("merge")]
    ]


def execute(command: LoraCommand) -> int:
    """Run the chosen command; see ``run_command`` for exit codes."""
    config = command.command
    require(not config.output_dir.exists(), f"{config.output_dir} is there; name another folder")
    alpha = config.lora_alpha

    import torch

    from oneshot_fast.generators.base import LoadOptions
    from oneshot_fast.generators.lora_files import LoraFile, check_alpha, weights_of
    from oneshot_fast.generators.rtdmd_files import convert_rtdmds, is_rtdmds

    if isinstance(config, ConvertConfig):
        file = LoraFile(weights_of(config.file, f"{config.file}"), alpha=alpha)
        require(is_rtdmds(file.path), f"{file.path}: diffusers and peft read it themselves")
        check_alpha(alpha, [file])
        count = convert_rtdmds(file.path, alpha, config.part, config.output_dir)
        print(f"{count} modules of {config.part}: {config.output_dir}")
        return OK

    from oneshot_fast.generators.merging import write_merged

    require(bool(config.lora), "give --lora FILE")
    files = [LoraFile.parse(text, alpha) for text in config.lora]
    check_alpha(alpha, files)
    options = LoadOptions(variant=config.variant, revision=config.revision)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    write_merged(config.model_id, files, config.output_dir, options, dtype)
    print(f"merged {len(files)} files: {config.output_dir}")
    return OK


main = functools.partial(run_command, "lora", LoraCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
