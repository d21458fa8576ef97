"""Command line of training on preferences, among a generator's own images or given ones."""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneshot_fast.cli import OK, finish, run_command
from oneshot_fast.data.manifests import find_manifests, read_manifests
from oneshot_fast.data.preferences import read_preferences
from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.errors import UserError, require
from oneshot_fast.evaluation.features import Features, load_features
from oneshot_fast.evaluation.random_noise import classifier_for
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.options import ModelOptions, check_sampler
from oneshot_fast.jobs.prefer.options import PreferData, PreferOptions
from oneshot_fast.jobs.prefer.pairs import PairRun
from oneshot_fast.jobs.prefer.run import PreferRun
from oneshot_fast.runtime.options import RunOptions
from oneshot_fast.training.options import KeepOptions


@dataclass(frozen=True)
class PreferCommand:
    """Train a generator on preferences, among its own images or given ones.

    With --reward and --prompt_file: in every step images of prompts are drawn, scored, which needs
    no gradient, and compared; --objective says how the generator moves towards the better ones.
    With --pairs: better and worse images are given. --judge tells whether what is learnt is
    over-optimised. An interrupted run resumes when the same command is repeated.
    """

    model_id: str = "stabilityai/sdxl-turbo"
    """Generator: folder in diffusers layout, hub id, .safetensors file, or "tiny"."""
    output_dir: Path | None = None
    """Folder of the results."""
    dry_run: bool = False
    """Print parameters, memory by part, disk and time needed, from a few timed passes on random
    data; nothing is written."""
    training: PreferOptions = PreferOptions()
    data: PreferData = PreferData()
    model: ModelOptions = ModelOptions()
    keep: KeepOptions = KeepOptions()
    run: RunOptions = RunOptions()


def execute(command: PreferCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    require(bool(command.output_dir or command.dry_run), "give --output_dir DIR")
    command.data.check(command.data.reward)
    require(
        command.model.backprop_steps is None or command.training.preserves,
        "--backprop_steps has no effect without preserve losses, as each step is trained by "
        "itself; leave it out",
    )
    run = _on_drawn(command) if command.data.pairs is None else _on_pairs(command)
    if command.dry_run:
        print(run.plan())
        return OK
    summary = run.run(**command.run.arguments)

    from oneshot_fast.report.prefer import print_summary, write_report

    return finish(command, run.folder, summary, write_report, print_summary, "pairs ")


def _on_drawn(command: PreferCommand) -> PreferRun:
    data, options = command.data, command.training
    if data.prompt_file is None or not data.reward:
        raise UserError("give --prompt_file FILE and --reward NAME, or --pairs FILE")
    require(
        not data.manifest_path,
        "--manifest_path has no effect without --pairs; give --pairs, too",
    )
    options.check_drawn()
    prompts = read_prompts(data.prompt_file, data.prompt_field)
    common = _common(command)
    generator = common["generator"]
    return PreferRun(
        prompts=prompts,
        rewards=data.load(generator.device, data.reward),
        features=_features(command, generator, prompts),
        **common,
    )


def _on_pairs(command: PreferCommand) -> PairRun:
    data, options = command.data, command.training
    assert data.pairs is not None
    for flag in ("reward", "prompt_file", "prompt_field"):
        require(
            not getattr(data, flag),
            f"--{flag} is of images that are drawn, and --pairs are given; leave one out",
        )
    options.check_pairs()
    require(
        not data.manifest_path or options.pair_noise == "assigned",
        "--manifest_path has no effect on --pair_noise random; leave one out",
    )
    manifests = find_manifests(data.manifest_path)
    for path in manifests:
        check_sampler(path, command.model, "--pair_noise random")
    pairs, failures = read_preferences(data.pairs)
    matched = read_manifests(manifests)[0] if manifests else []
    return PairRun(pairs=pairs, matched=matched, failures=failures, **_common(command))


def _common(command: PreferCommand) -> dict[str, Any]:
    """Arguments of either run."""
    data, size = command.data, command.data.size
    master_weights = command.training.weights_dtype == "float32"
    generator = command.model.load(command.model_id, master_weights=master_weights)
    return {
        "generator": generator,
        "folder": command.output_dir or Path(),
        "options": command.training,
        "judge": data.judges(generator.device, data.judge),
        "resolution": size,
        "eval_samples": data.eval_samples,
        "names": data.names,
        "seed": command.run.seed,
        **command.keep.arguments(generator.device, command.dry_run),
    }


def _features(command: PreferCommand, generator: Generator, prompts: list[str]) -> Features | None:
    """Those of drpo; None: the latents themselves."""
    named = command.training.features
    if command.training.objective != "drpo" or named == "latents":
        return None
    setup = command.data.setup(generator.device)
    found = load_features(named, generator, classifier_for(generator, prompts), setup)
    return None if named is None and found.is_weak else found


main = functools.partial(run_command, "prefer", PreferCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
