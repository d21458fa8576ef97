"""`python -m oneshot_fast.tiny train | evaluate | dataset`: make and judge the embedded default."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.embedded.digits import to_pil, write_default_dataset
from oneshot_fast.recipes.tiny.config import TrainConfig
from oneshot_fast.runtime.progress import silence_imports


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


def evaluate(config: EvaluateConfig) -> None:
    """Measure a generator and write what was asked for."""
    from diffusers import StableDiffusionXLPipeline

    from oneshot_fast.embedded.pipeline import model_path
    from oneshot_fast.recipes.tiny.evaluate import measure, sample_grid

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        config.model_id or model_path(), dtype=torch.float32
    )
    classifier = load_classifier(config.classifier)
    measures, samples = measure(pipeline, classifier, config.samples_per_digit, config.seed)
    text = json.dumps(measures, indent=2)
    print(text)
    if config.output is not None:
        config.output.write_text(text + "\n", encoding="utf-8")
    if config.grid is not None:
        to_pil(sample_grid(samples[:100], columns=10)).save(config.grid)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command."""
    config = tyro.cli(
        Annotated[TrainConfig, tyro.conf.subcommand("train")]
        | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
        | Annotated[DatasetConfig, tyro.conf.subcommand("dataset")],
        prog="python -m oneshot_fast.tiny",
        args=argv,
        use_underscores=True,
    )
    silence_imports()
    if isinstance(config, TrainConfig):
        from oneshot_fast.recipes.tiny.train import train

        train(config)
    elif isinstance(config, EvaluateConfig):
        evaluate(config)
    else:
        write_default_dataset(config.data_root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
