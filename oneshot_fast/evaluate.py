"""Command line: measure generators on fresh noise against held-out images, side by side."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tyro.conf import UseAppendAction

from oneshot_fast.cli import OK, finish, run_command
from oneshot_fast.data.options import DataOptions
from oneshot_fast.data.sources import open_pairs
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.rewards.options import JudgeModels
from oneshot_fast.runtime.options import RunOptions


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure how good one-step generators are on fresh noise, against held-out images.

    No classifier of yours is needed: energy score, Frechet distance, KID, MMD (CMMD), precision,
    recall, density, coverage, prompt alignment and diversity within a prompt, with standard errors.
    Each model is compared with the first one on the same noises: better, worse, or cannot be told
    apart. An interrupted run resumes when the same command is repeated.
    """

    model_id: tuple[str, ...] = ()
    """One or more generators: folder in diffusers layout, hub id, .safetensors file, "tiny" or
    "tiny-teacher" (which takes several steps); the others are compared with the first."""
    output_dir: Path | None = None
    """Folder of the results."""
    eval_samples: int = 500
    """Fresh random noises, the same ones for all models."""
    features: str | None = None
    """What images are compared by: clip or dinov2 (each also with :FOLDER), vae, or
    python:module.function of images [B, 3, H, W] in [0, 1]; by default the first of a classifier
    that knows the prompts (digits), CLIP, DINOv2 that is on this machine, or else the VAE's
    latents, a weak judge."""
    judge: UseAppendAction[tuple[str, ...]] = ()
    """NAME of a reward that is measured, too, as in --reward of optimize; may be given several
    times."""
    dry_run: bool = False
    """Print parameters and time needed, from a few timed images; nothing is written."""
    data: DataOptions = DataOptions()
    judges: JudgeModels = JudgeModels()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()


def execute(command: EvaluateCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    require(bool(command.model_id), "give --model_id A [B ...]")
    doubled = [name for name in command.model_id if command.model_id.count(name) > 1]
    require(not doubled, f"model {', '.join(doubled[:1])} is named twice; name it once")
    if command.data.data_root is None or not (command.output_dir or command.dry_run):
        raise UserError("give --data_root DIR of held-out images and --output_dir DIR")
    require(
        command.data.resize_mode != "bucket",
        "--resize_mode bucket: images are compared at one size; use crop, squash or pad",
    )
    pairs = [*open_pairs(command.data.data_root, command.data)]

    import torch

    from oneshot_fast.generators.base import Generator
    from oneshot_fast.jobs.evaluate.run import EvaluateRun
    from oneshot_fast.report.evaluate import print_summary, write_evaluate_report

    has_file = any(name.endswith(".safetensors") for name in command.model_id)

    def load(name: str) -> Generator:
        is_other = has_file and not name.endswith(".safetensors")  # the configs are the file's
        model = replace(command.model, model_config=None) if is_other else command.model
        return model.load(name)

    first = load(command.model_id[0])
    device = torch.device(first.device)
    run = EvaluateRun(
        {name: partial(load, name) for name in command.model_id} | {command.model_id[0]: first},
        pairs,
        command.output_dir or Path(),
        features=command.features,
        judge=command.judges.judges(device, command.judge),
        setup=command.judges.setup(device),
        eval_samples=command.eval_samples,
        resolution=command.data.size,
        resize_mode=command.data.resize_mode,
        seed=command.run.seed,
    )
    if command.dry_run or command.output_dir is None:
        print(run.plan())
        return OK
    summary = run.run(**command.run.arguments)
    return finish(command, command.output_dir, summary, write_evaluate_report, print_summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m oneshot_fast.evaluate``."""
    return run_command("evaluate", EvaluateCommand, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
