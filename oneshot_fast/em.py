"""The main job: alternate assignment (E-step) and training (M-step), and measure what it brings."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneshot_fast.cli import OK, SOME_FAILED, check_defaults, public, run_command
from oneshot_fast.data.options import DataOptions
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.jobs.em.targets import EmRun
from oneshot_fast.rewards.options import RewardOptions, RewardTrainingOptions
from oneshot_fast.runtime.options import RunOptions


@dataclass(frozen=True)
class EmCommand:
    """Align a one-step generator with images: alternate noise assignment and training.

    Without arguments it runs the embedded default: a small digit generator and images of digits in
    a style it does not know. With --reward and --prompt_file there are no targets: the E-step
    searches noises that score high, the M-step trains on the images found. An interrupted run
    resumes when the same command is repeated.
    """

    work_dir: Path = Path("runs/em")
    """Folder of everything the run writes."""
    initial_model_id: str | None = None
    """Generator to align: folder in diffusers layout, hub id, .safetensors file, or "tiny". By
    default stabilityai/sdxl-turbo for your own data or prompts, "tiny" without."""
    heldout_root: Path | None = None
    """Pairs never trained on, in the format of data_root: assigned with the first and the last
    generator, with equal effort."""
    eval_samples: int = 500
    """Random noises on which the generator is measured before, between and after the cycles."""
    compare_direct: bool = False
    """Also train directly on random noise, with as many steps, and show it beside EM."""
    num_images: int = 16
    """Targets per E-step whose images are saved and shown; -1 for all."""
    save_minutes: float = 5.0
    """Minutes between saved training states; 0 saves after every step."""
    train_keep_checkpoints: int = 0
    """M-step: also keep cycle-XX/sft/checkpoint-<step> of the newest so many epochs; 0: none."""
    dry_run: bool = False
    """Print parameters, memory by part, disk and time needed of both steps, from a few timed ones
    on random data; nothing is written."""
    em: EmOptions = EmOptions()
    data: DataOptions = DataOptions()
    rewards: RewardOptions = RewardOptions()
    reward_training: RewardTrainingOptions = RewardTrainingOptions()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()


def execute(command: EmCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    by_reward = bool(command.rewards.reward)
    if not by_reward:
        check_defaults(command.rewards, command.reward_training, needs="--reward")
    own_data = command.data.data_root is not None or by_reward
    model_id = command.initial_model_id or ("stabilityai/sdxl-turbo" if own_data else "tiny")
    options = command.em.resolve(embedded=not own_data)
    command = dataclasses.replace(command, initial_model_id=model_id, em=options)
    if by_reward:
        from oneshot_fast.jobs.em.rewards import execute as execute_by_reward

        return execute_by_reward(command)
    if command.dry_run:
        print_plan(command)
        return OK
    summary = EmRun(command).run()

    from oneshot_fast.report import write_em_report
    from oneshot_fast.runtime.processes import is_main

    if is_main():
        write_em_report(command.work_dir, public(command))
        print_summary(summary, command.work_dir)
    return SOME_FAILED if summary["failed"] else OK


def print_plan(command: EmCommand) -> None:
    """Say what the command would need; ``command.em`` is resolved."""
    em, data = command.em, command.data
    em.check()

    from oneshot_fast.embedded.digits import TRAIN_PAIRS
    from oneshot_fast.planning.timing import assign_plan, sft_plan
    from oneshot_fast.runtime.units import duration

    if data.data_root is None:
        samples = len(range(TRAIN_PAIRS)[data.start_index :][: data.max_samples])
    else:
        samples = len(data.read(data.data_root)[0])
    generator = command.model.load(command.initial_model_id or "tiny", master_weights=True)
    side = data.resolution or generator.image_size
    e_step = assign_plan(
        generator,
        em.assign(),
        resolution=side,
        batch_size=em.assign_batch_size,
        samples=samples,
        num_images=command.num_images,
    )
    m_step = sft_plan(generator, em.sft(), resolution=side, samples=samples)
    assert e_step.seconds is not None
    assert m_step.seconds is not None
    cycles = len(em.schedule())
    needed = duration(cycles * (e_step.seconds + m_step.seconds))
    print(f"E-step\n{e_step}\n\nM-step\n{m_step}\n")
    print(f"in all, {cycles} cycles: {needed}, without the evaluations")


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Say what was reached and where it is."""
    noise = dict(summary["random_noise"])
    if "real" in summary:
        noise["real images"] = summary["real"]
    columns = [name for name in ("base", "final", "direct", "real images") if name in noise]
    print(f"\nOn {noise['base']['samples']} random noises:")
    print(f"{'':24}" + "".join(f"{name:>14}" for name in columns))
    for key, label in (
        ("accuracy", "prompt accuracy"),
        ("frechet_distance", "Frechet distance"),
        ("diversity", "diversity"),
        ("drift", "drift from base"),
    ):
        cells = [f"{noise[c][key]:14.3f}" if key in noise[c] else f"{'-':>14}" for c in columns]
        print(f"{label:24}" + "".join(cells))
    print("\nMatching loss, before -> after the E-step -> after the M-step:")
    for row in summary["cycles"]:
        assign, sft = row["assign"], row["sft"]
        print(
            f"cycle {row['cycle']:<4} {assign['initial_loss']:10.4f} -> {assign['best_loss']:.4f}"
            f" -> {sft['matched_loss_after']:.4f}"
        )
    if "heldout" in summary:
        base, final = summary["heldout"]["base"], summary["heldout"]["final"]
        change = 100 * (final["best_loss"] / base["best_loss"] - 1)
        print(
            f"{summary['heldout']['samples']} held-out pairs, assigned: {base['best_loss']:.4f} "
            f"with the base model, {final['best_loss']:.4f} with the final one ({change:+.0f} %)"
        )
    if len(summary["cycles"]) > 1 and "frechet_distance" in noise["final"]:
        print(f"checkpoint-best: cycle {summary['best_cycle']}, of the lowest Frechet distance")
    truncated = summary["cycles"][-1]["truncated_prompts"]
    if truncated:
        print(f"warning: {truncated} prompts are longer than 77 tokens; cut off", file=sys.stderr)
    if summary["failed"]:
        print(f"{summary['failed']} records failed: {folder / 'failures.jsonl'}", file=sys.stderr)
    print(f"\ntook {summary['seconds']:.0f} s; checkpoint: {folder / 'checkpoint-final'}")
    print(f"report: {folder / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m oneshot_fast.em``."""
    return run_command("em", EmCommand, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
