"""`python -m oneshot_fast.tiny train | evaluate | dataset`: make and judge the embedded default."""

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitSubcommandPrefixes, subcommand

from oneshot_fast.cli import OK, run_command
from oneshot_fast.recipes.tiny.config import TrainConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure accuracy and diversity of one-step samples; print them and write JSON."""

    model_id: Path | None = None
    """Folder of the pipeline; by default the packaged one."""
    classifier: Path | None = None
    """Weights of the judge; by default the packaged ones."""
    output: Path | None = None
    """JSON file of the measures."""
    grid: Path | None = None
    """PNG file of samples, a column per digit."""
    samples_per_digit: int = 50
    """Samples of each digit."""
    seed: int = 0
    """Seed of the noises."""


@dataclass(frozen=True)
class DatasetConfig:
    """Write the default data set: pairs of a prompt and a digit in the target style."""

    data_root: Path
    """Folder that gets train/ and heldout/."""


@dataclass(frozen=True)
class TinyCommand:
    """Make and judge the embedded default: a small one-step generator of handwritten digits."""

    command: OmitSubcommandPrefixes[
        Annotated[TrainConfig, subcommand("train")]
        | Annotated[EvaluateConfig, subcommand("evaluate")]
        | Annotated[DatasetConfig, subcommand("dataset")]
    ]


def execute(command: TinyCommand) -> int:
    """Run the chosen command; see ``run_command`` for exit codes."""
    config = command.command
    if isinstance(config, TrainConfig):
        from oneshot_fast.recipes.tiny.train import train

        train(config)
    elif isinstance(config, EvaluateConfig):
        evaluate(config)
    else:
        from oneshot_fast.embedded.digits import write_default_dataset

        write_default_dataset(config.data_root)
    return OK


def evaluate(config: EvaluateConfig) -> None:
    """Measure a generator and write what was asked for."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    from oneshot_fast.data.images import save_png, tile
    from oneshot_fast.embedded.classifier import load_classifier
    from oneshot_fast.embedded.pipeline import model_path
    from oneshot_fast.recipes.tiny.evaluate import measure
    from oneshot_fast.runtime.files import write_text

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        config.model_id or model_path(), dtype=torch.float32
    )
    classifier = load_classifier(config.classifier)
    measures, samples = measure(pipeline, classifier, config.samples_per_digit, config.seed)
    text = json.dumps(measures, indent=2)
    print(text)
    if config.output is not None:
        write_text(config.output, text + "\n")
    if config.grid is not None:
        save_png(config.grid, tile(samples[:100], columns=10))


main = functools.partial(run_command, "tiny", TinyCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
