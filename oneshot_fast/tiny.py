"""`python -m oneshot_fast.tiny train | evaluate | dataset`: make and judge the embedded models."""

import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitSubcommandPrefixes, subcommand

from oneshot_fast.cli import OK, run_command
from oneshot_fast.errors import require
from oneshot_fast.recipes.tiny.config import TrainConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure accuracy and diversity of samples; print them and write JSON."""

    model_id: str = "tiny"
    """Folder of the pipeline, "tiny" or "tiny-teacher"."""
    num_inference_steps: int = 1
    """Denoising steps; the teacher's are 20."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1: none. The teacher's is 2."""
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

    from oneshot_fast.data.images import save_png, tile
    from oneshot_fast.embedded.classifier import load_classifier
    from oneshot_fast.generators.base import LoadOptions
    from oneshot_fast.generators.sdxl import SdxlGenerator
    from oneshot_fast.recipes.tiny.evaluate import measure
    from oneshot_fast.runtime.files import write_text

    for name in ("num_inference_steps", "guidance_scale", "samples_per_digit"):
        value = getattr(config, name)
        require(1 <= value < math.inf, f"{name} is {value}; give at least 1")
    pipeline = SdxlGenerator.load(config.model_id, LoadOptions(torch.device("cpu"))).pipe
    classifier = load_classifier(config.classifier)
    sampler = config.num_inference_steps, config.guidance_scale
    measures, samples = measure(
        pipeline, classifier, config.samples_per_digit, config.seed, *sampler
    )
    text = json.dumps(measures, indent=2)
    print(text)
    if config.output is not None:
        write_text(config.output, text + "\n")
    if config.grid is not None:
        save_png(config.grid, tile(samples[:100], columns=10))


main = functools.partial(run_command, "tiny", TinyCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
