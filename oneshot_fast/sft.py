"""Command line of the M-step: train the generator on matched pairs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot_fast.cli import OK, SOME_FAILED, check_defaults, public, run_command
from oneshot_fast.data.pairs import DataError, MatchedPair, load_noise, read_manifest
from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.rewards.options import RewardOptions, RewardTrainingOptions
from oneshot_fast.runtime.options import RunOptions
from oneshot_fast.training.batch import SftOptions

if TYPE_CHECKING:
    from oneshot_fast.jobs.sft.rewards import RewardRun


@dataclass(frozen=True)
class SftCommand:
    """Train a one-step generator on matched (prompt, target image, noise) pairs, or on rewards.

    With --manifest_path: on the pairs of an assignment, or of a search by rewards. With --reward
    and --prompt_file: the gradient of the rewards goes through the single step into the weights
    (DRaFT-1, AlignProp); the preserve losses hold the generator near where it began. An interrupted
    run resumes when the same command is repeated.
    """

    manifest_path: Path | None = None
    """manifest.jsonl of an assignment (or of the reference workflow), or training/manifest.jsonl of
    python -m oneshot_fast.optimize."""
    model_id: str = "stabilityai/sdxl-turbo"
    """One-step generator: folder in diffusers layout, hub id, .safetensors file, or "tiny"."""
    output_dir: Path | None = None
    """Folder of the results."""
    resolution: int | None = None
    """With --reward: image side in pixels; by default the model's own."""
    eval_samples: int = 64
    """With --reward: random noises, not trained on, on which rewards, judges, drift and diversity
    are measured before training and after every epoch."""
    save_minutes: float = 5.0
    """Minutes between saved training states; 0 saves after every step."""
    keep_checkpoints: int = 0
    """Also keep checkpoint-<step> of the newest so many epochs; 0 keeps none."""
    offload_encoders: bool | None = None
    """Move text encoders and image encoder to the CPU while training, and the decoder if no loss
    needs it; by default on a GPU."""
    dry_run: bool = False
    """Print parameters, memory by part, disk and time needed, from a few timed passes on random
    data; nothing is written."""
    training: SftOptions = SftOptions()
    rewards: RewardOptions = RewardOptions()
    reward_training: RewardTrainingOptions = RewardTrainingOptions()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()


def execute(command: SftCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    folder = command.output_dir
    if command.rewards.reward:
        return train_on_rewards(command)
    _check_no_rewards(command)
    if command.manifest_path is None or (folder is None and not command.dry_run):
        raise UserError("give --manifest_path FILE and --output_dir DIR")
    command.training.check()
    pairs, failures = read_manifest(command.manifest_path)

    from oneshot_fast.generators.target_images import TargetImages
    from oneshot_fast.report.sft import write_sft_report
    from oneshot_fast.runtime.processes import is_main

    master_weights = command.training.weights_dtype == "float32"
    generator = command.model.load(command.model_id, master_weights=master_weights)
    side = generator.side_of(_noise_shape(pairs))
    if folder is None or command.dry_run:
        from oneshot_fast.jobs.sft.plan import sft_plan

        plan = sft_plan(
            generator,
            command.training,
            resolution=side,
            samples=len(pairs),
            offload_encoders=command.offload_encoders,
        )
        print(plan)
        return OK
    run = SftRun(
        generator,
        TargetImages(generator, side),
        folder,
        command.training,
        **_run_options(command),
    )
    summary = run.run(
        pairs, failures, overwrite=command.run.overwrite, report_to=command.run.report_to
    )
    if is_main():
        write_sft_report(folder, public(command))
        print_summary(summary, folder)
    return SOME_FAILED if summary["failed"] else OK


def _check_no_rewards(command: SftCommand) -> None:
    check_defaults(command.rewards, command.reward_training, needs="--reward")
    require(
        (command.resolution, command.eval_samples) == (None, SftCommand.eval_samples),
        "--resolution and --eval_samples are for training on rewards; pairs have the resolution of "
        "their noises",
    )


def train_on_rewards(command: SftCommand) -> int:
    """The command with --reward."""
    options, folder = command.reward_training, command.output_dir
    require(
        command.manifest_path is None,
        "--manifest_path and --reward exclude each other: train on pairs, or on rewards",
    )
    if options.prompt_file is None or (folder is None and not command.dry_run):
        raise UserError("with --reward, give --prompt_file FILE and --output_dir DIR")
    options.check(command.rewards.reward)
    command.training.check()
    require(
        command.rewards.checkpointing != "full" or not command.training.selective_checkpointing,
        "checkpointing full recomputes all that selective_checkpointing does; give one",
    )
    prompts = read_prompts(options.prompt_file)
    run = _reward_run(command)
    if folder is None or command.dry_run:
        from oneshot_fast.jobs.sft.plan import sft_plan

        plan = sft_plan(
            run.generator,
            command.training,
            resolution=run.resolution,
            samples=len(prompts) * options.images_per_prompt,
            offload_encoders=command.offload_encoders,
            by_reward=(run.rewards, prompts[0]),
        )
        print(plan)
        return OK
    summary = run.run(prompts, overwrite=command.run.overwrite, report_to=command.run.report_to)

    from oneshot_fast.report.sft import write_reward_report
    from oneshot_fast.runtime.processes import is_main

    if is_main():
        write_reward_report(folder, public(command))
        print_reward_summary(summary, folder)
    return OK


def _reward_run(command: SftCommand) -> RewardRun:
    from oneshot_fast.generators.target_images import TargetImages
    from oneshot_fast.jobs.sft.rewards import RewardRun

    options, master_weights = command.reward_training, command.training.weights_dtype == "float32"
    generator = command.model.load(command.model_id, master_weights=master_weights)
    generator.recompute(command.rewards.recomputed(generator.device))
    return RewardRun(
        generator,
        command.rewards.load(generator.device),
        command.output_dir or Path(),
        command.training,
        judge=command.rewards.load(generator.device, options.judge) if options.judge else None,
        resolution=TargetImages(generator, command.resolution).resolution,  # checks it
        images_per_prompt=options.images_per_prompt,
        eval_samples=command.eval_samples,
        names=[*command.rewards.names, *(f"judge {name}" for name in options.judge)],
        **_run_options(command),
    )


def _run_options(command: SftCommand) -> dict[str, Any]:
    return {
        "seed": command.run.seed,
        "save_minutes": command.save_minutes,
        "keep_checkpoints": command.keep_checkpoints,
        "offload_encoders": command.offload_encoders,
    }


def _noise_shape(pairs: Sequence[MatchedPair]) -> tuple[int, ...]:
    """Shape of the first noise that can be read; the others must be like it."""
    for pair in pairs[:-1]:
        with contextlib.suppress(DataError):
            return tuple(load_noise(pair).shape)
    return tuple(load_noise(pairs[-1]).shape)


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Say what was reached and where it is."""
    print(
        f"trained {summary['steps']} steps on {summary['samples']} pairs in "
        f"{summary['seconds']:.0f} s: latent loss on the matched noises "
        f"{summary['matched_loss_before']:.4f} -> {summary['matched_loss_after']:.4f}"
    )
    if summary["failed"]:
        print(f"{summary['failed']} pairs failed: {folder / 'failures.jsonl'}", file=sys.stderr)
    _print_places(folder)


def print_reward_summary(summary: dict[str, Any], folder: Path) -> None:
    """Say what was raised, what else changed, and where it is."""
    print(f"trained {summary['steps']} steps on rewards in {summary['seconds']:.0f} s")
    for name, before in summary["base"].items():
        print(f"{name:24}{before:10.4f} -> {summary['final'][name]:.4f}")
    _print_places(folder)


def _print_places(folder: Path) -> None:
    print(f"checkpoint: {folder / 'checkpoint-final'}")
    if (folder / "lora-final").exists():
        print(f"LoRA: {folder / 'lora-final'}")
    print(f"report: {folder / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m oneshot_fast.sft``."""
    return run_command("sft", SftCommand, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
