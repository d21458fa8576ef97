"""Command line: better images now, by optimising the noise of each prompt for rewards."""

import functools
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import UseAppendAction

from oneshot_fast.cli import OK, finish, run_command
from oneshot_fast.data.found_pairs import MANIFEST
from oneshot_fast.data.options import SizeOptions
from oneshot_fast.data.prompts import named_prompts
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.jobs.optimize.run import OptimizeRun
from oneshot_fast.rewards.options import RewardOptions
from oneshot_fast.runtime.options import RunOptions
from oneshot_fast.search.samples import check_count


@dataclass(frozen=True)
class OptimizeCommand:
    """Find, for each prompt, the noise from which the one-step generator makes the best image.

    The weights stay as they are. The noises are kept in noises/*.safetensors and can be given to
    any pipeline of the same model as `latents`. training/manifest.jsonl pairs the base noises with
    the saved best images: `python -m oneshot_fast.sft --manifest_path` of it teaches the generator
    what was found. An interrupted run resumes when the same command is repeated.
    """

    output_dir: Path | None = None
    """Folder of the results."""
    prompt: UseAppendAction[tuple[str, ...]] = ()
    """A prompt; may be given several times."""
    prompt_file: Path | None = None
    """Prompts: .txt with one per line, .tsv or .csv with a header, or .jsonl."""
    prompt_field: str | None = None
    """Column or field of prompt_file; by default the first of prompt, text and caption."""
    model_id: str = "stabilityai/sdxl-turbo"
    """Generator: folder in diffusers layout, hub id, .safetensors file, "tiny" or "tiny-teacher",
    which takes several steps."""
    num_images_per_prompt: int = 1
    """Images of each prompt, each from a noise of its own."""
    seeds: tuple[int, ...] = ()
    """Instead: the seeds of each prompt's base noises, as torch.Generator().manual_seed takes
    them."""
    batch_size: int | Literal["auto"] = "auto"
    """Images optimised at once; a result does not depend on it beyond rounding. auto is the largest
    power of two that fits on a GPU, and 16 on the CPU."""
    save_steps: tuple[int, ...] = ()
    """Gradient steps whose images are saved beside the first and the best."""
    num_images: int = -1
    """Images that are saved, in order; -1 for all."""
    dry_run: bool = False
    """Print the memory by part and the time needed, from a few timed steps; nothing is written."""
    size: SizeOptions = SizeOptions()
    search: OptimizeOptions = OptimizeOptions()
    rewards: RewardOptions = RewardOptions()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()


def execute(command: OptimizeCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    if command.output_dir is None and not command.dry_run:
        raise UserError("give --output_dir DIR")
    require(bool(command.rewards.reward), "give --reward NAME[:WEIGHT]")
    check_count(command.num_images_per_prompt, command.seeds)
    command.search.check()
    last = command.search.gradient_steps
    for step in command.save_steps:
        require(0 <= step <= last, f"save_steps names step {step}; there are 0 to {last}")
    prompts = named_prompts(command.prompt, command.prompt_file, command.prompt_field)
    size = command.size.size

    generator = command.model.load(command.model_id)
    generator.recompute(command.rewards.recomputed(generator.device))
    run = OptimizeRun(
        generator,
        prompts,
        command.output_dir or Path(),
        command.search,
        rewards=command.rewards.rewards(generator.device),
        reward_names=command.rewards.names,
        images_per_prompt=command.num_images_per_prompt,
        seeds=command.seeds,
        seed=command.run.seed,
        batch_size=command.batch_size,
        resolution=size,
        save_steps=command.save_steps,
        num_images=command.num_images,
    )
    if command.output_dir is None or command.dry_run:
        print(run.plan())
        return OK
    summary = run.run(**command.run.arguments)

    from oneshot_fast.report.optimize import write_optimize_report

    say = functools.partial(print_summary, model_id=command.model_id)
    return finish(command, command.output_dir, summary, write_optimize_report, say, "")


def print_summary(summary: dict[str, Any], folder: Path, model_id: str) -> None:
    """Say what was reached and where it is."""
    print(
        f"optimised {summary['samples']} images of {summary['prompts']} prompts: mean reward "
        f"{summary['initial_reward']:.4f} -> {summary['best_reward']:.4f}, noise turned by "
        f"{summary['angle']:.0f} degrees, in {summary['seconds']:.0f} s "
        f"({summary['images_per_second']:.2f} images/s)"
    )
    if summary["training_pairs"]:
        flags = ["--model_id", model_id, "--manifest_path", str(folder / MANIFEST)]
        print(
            f"to train on its {summary['training_pairs']} images: python -m oneshot_fast.sft "
            f"{shlex.join(flags)} --output_dir DIR"
        )


main = functools.partial(run_command, "optimize", OptimizeCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
