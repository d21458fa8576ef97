"""Command line of the M-step: train the generator on matched pairs, or on rewards."""

import functools
import heapq
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oneshot_fast.cli import OK, check_defaults, finish, run_command
from oneshot_fast.data.manifests import MatchedPair, find_manifests, read_manifests
from oneshot_fast.data.options import Manifests
from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.data.records import Failure, Record
from oneshot_fast.data.sources import open_pairs
from oneshot_fast.errors import UserError, require
from oneshot_fast.evaluation.heldout import held_out_places, held_out_words
from oneshot_fast.generators.options import ModelOptions, check_sampler
from oneshot_fast.jobs.sft.measured import MeasuredSftRun
from oneshot_fast.jobs.sft.options import HeldOutOptions, MeasuredTrainingOptions, SftOptions
from oneshot_fast.jobs.sft.rewards import RewardRun
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.rewards.options import RewardOptions
from oneshot_fast.runtime.options import RunOptions
from oneshot_fast.runtime.stored import View, Without
from oneshot_fast.training.options import KeepOptions


@dataclass(frozen=True)
class SftCommand:
    """Train a one-step generator on matched (prompt, target image, noise) pairs, or on rewards.

    With --manifest_path: on the pairs of an assignment, or of a search by rewards. With --reward
    and --prompt_file: the gradient of the rewards goes through the single step into the weights
    (DRaFT-1, AlignProp); the preserve losses hold the generator near where it began. An interrupted
    run resumes when the same command is repeated.
    """

    manifest_path: Manifests = ()
    """manifest.jsonl of an assignment (or of the reference workflow), or training/manifest.jsonl of
    python -m oneshot_fast.optimize; of several runs, all together: A B, or 'runs/*/manifest.jsonl'.
    """
    model_id: str = "stabilityai/sdxl-turbo"
    """Generator: folder in diffusers layout, hub id, .safetensors file, "tiny" or "tiny-teacher",
    which takes several steps."""
    output_dir: Path | None = None
    """Folder of the results."""
    dry_run: bool = False
    """Print parameters, memory by part, disk and time needed, from a few timed passes on random
    data; nothing is written."""
    training: SftOptions = SftOptions()
    rewards: RewardOptions = RewardOptions()
    reward_training: MeasuredTrainingOptions = MeasuredTrainingOptions()
    heldout: HeldOutOptions = HeldOutOptions()
    model: ModelOptions = ModelOptions()
    keep: KeepOptions = KeepOptions()
    run: RunOptions = RunOptions()


def execute(command: SftCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    run = _on_rewards(command) if command.rewards.reward else _on_pairs(command)
    if command.dry_run:
        print(run.plan())
        return OK
    summary = run.run(**command.run.arguments)

    from oneshot_fast.report.sft import print_summary, write_reward_report, write_sft_report

    write_report = write_reward_report if command.rewards.reward else write_sft_report
    return finish(command, run.folder, summary, write_report, print_summary, "pairs ")


def _on_pairs(command: SftCommand) -> SftRun:
    judging, held = command.reward_training, command.heldout
    if held.eval_every:
        default = MeasuredTrainingOptions()
        others = replace(judging, judge=(), eval_samples=default.eval_samples)
        check_defaults(command.rewards.searched, others, needs="--reward")
    else:
        check_defaults(held, needs="--eval_every")
        check_defaults(command.rewards, judging, needs="--reward")
    if not command.manifest_path or not (command.output_dir or command.dry_run):
        raise UserError("give --manifest_path FILE and --output_dir DIR")
    command.training.check()
    manifests = find_manifests(command.manifest_path)
    pairs, failures = read_manifests(manifests)
    for path in manifests if command.training.noise == "matched" else ():
        check_sampler(path, command.model, "--noise random")
    if not held.eval_every:
        return SftRun(pairs=pairs, failures=failures, **_common(command))
    require(
        held.heldout is None or held.heldout_root is None,
        "--heldout and --heldout_root exclude each other: a share of the pairs, or other data",
    )
    out: Sequence[Record | MatchedPair]
    note = ""
    if held.heldout_root:
        out = [item for item in open_pairs(held.heldout_root) if isinstance(item, Record)]
    else:
        pairs, out = _hold_out(pairs, failures, held.heldout, command.run.seed)
        note = held_out_words(len(pairs), len(out))
    common = _common(command)
    device = common["generator"].device
    return MeasuredSftRun(
        pairs=pairs,
        failures=failures,
        heldout=out,
        note=note,
        eval_every=held.eval_every,
        eval_samples=judging.eval_samples,
        features=held.features,
        judge=command.rewards.judges(device, judging.judge),
        setup=command.rewards.setup(device),
        **common,
    )


def _hold_out(
    pairs: Sequence[MatchedPair], failures: Sequence[Failure], share: float | None, seed: int
) -> tuple[Sequence[MatchedPair], list[MatchedPair]]:
    """Pairs to train on and to measure by; chosen by places in the list of all its lines.

    So a line that is mended moves none.
    """
    chosen = {*held_out_places(len(pairs) + len(failures), share, seed)}
    listed: Iterable[MatchedPair | Failure] = heapq.merge(
        pairs, failures, key=lambda item: item.line or 0
    )
    of_pair = (k for k, item in enumerate(listed) if isinstance(item, MatchedPair))
    held = [place for place, k in enumerate(of_pair) if k in chosen]
    kept = View(pairs, lambda pair: pair, Without(len(pairs), held))
    return kept, [pairs[place] for place in held]


def _on_rewards(command: SftCommand) -> RewardRun:
    options, rewards = command.reward_training, command.rewards
    require(
        not command.manifest_path,
        "--manifest_path and --reward exclude each other: train on pairs, or on rewards",
    )
    if options.prompt_file is None or not (command.output_dir or command.dry_run):
        raise UserError("with --reward, give --prompt_file FILE and --output_dir DIR")
    options.check(rewards.reward)
    size = options.size
    command.training.check()
    require(
        rewards.checkpointing != "full" or not command.training.selective_checkpointing,
        "checkpointing full recomputes all that selective_checkpointing does; give one",
    )
    prompts = read_prompts(options.prompt_file, options.prompt_field)
    common = _common(command)
    generator = common["generator"]
    generator.recompute(rewards.recomputed(generator.device))
    return RewardRun(
        prompts=prompts,
        rewards=rewards.rewards(generator.device),
        judge=rewards.judges(generator.device, options.judge),
        resolution=size,
        images_per_prompt=options.images_per_prompt,
        eval_samples=options.eval_samples,
        names=[*rewards.names, *(f"judge {name}" for name in options.judge)],
        **common,
    )


def _common(command: SftCommand) -> dict[str, Any]:
    """Arguments of either run."""
    master_weights = command.training.weights_dtype == "float32"
    generator = command.model.load(command.model_id, master_weights=master_weights)
    return {
        "generator": generator,
        "folder": command.output_dir or Path(),
        "options": command.training,
        "seed": command.run.seed,
        **command.keep.arguments(generator.device, command.dry_run),
    }


main = functools.partial(run_command, "sft", SftCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
