"""The main job: alternate assignment (E-step) and training (M-step), and measure what it brings."""

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneshot_fast.cli import OK, check_defaults, finish, run_command
from oneshot_fast.data.options import DataOptions
from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.data.records import Failure, Record
from oneshot_fast.data.sources import open_pairs
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.jobs.em.rewards import RewardEmRun
from oneshot_fast.jobs.em.targets import EmRun
from oneshot_fast.jobs.em.trials import FEWEST, trained_on
from oneshot_fast.rewards.options import RewardOptions, RewardTrainingOptions
from oneshot_fast.runtime.options import RunOptions
from oneshot_fast.runtime.processes import main_first


@dataclass(frozen=True)
class EmCommand:
    """Align a one-step generator with images: alternate noise assignment and training.

    Without arguments it runs the embedded default: a small digit generator and images of digits in
    a style it does not know. For your own data short trainings choose the recipe first, see
    --recipe. With --reward and --prompt_file there are no targets: the E-step searches noises that
    score high, the M-step trains on the images found. An interrupted run resumes when the same
    command is repeated.
    """

    work_dir: Path = Path("runs/em")
    """Folder of everything the run writes."""
    initial_model_id: str | None = None
    """Generator to align: folder in diffusers layout, hub id, .safetensors file, "tiny" or
    "tiny-teacher", which takes several steps. By default stabilityai/sdxl-turbo for your own data
    or prompts, "tiny" without."""
    heldout_root: Path | None = None
    """Pairs never trained on, in the format of data_root: what the generator is measured against,
    and assigned with the first and the last one, with equal effort."""
    heldout: float | None = None
    """Without heldout_root: share of the data that is held out, chosen by the seed; 0 holds out
    nothing. By default a tenth, but 16 to 500 pairs, and of fewer than 64 none."""
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
    own_data = command.data.data_root is not None or by_reward
    model_id = command.initial_model_id or ("stabilityai/sdxl-turbo" if own_data else "tiny")
    command.em.resolve(320, by_reward=by_reward).check()  # before any model is loaded
    command.data.check()
    command = dataclasses.replace(command, initial_model_id=model_id)
    run = _on_rewards(command) if by_reward else _on_targets(command)
    if command.dry_run:
        print(run.plan())
        return OK
    summary = run.run(**command.run.arguments)

    from oneshot_fast.report.em import print_summary, write_em_report

    return finish(command, command.work_dir, summary, write_em_report, print_summary)


def _on_targets(command: EmCommand) -> EmRun:
    judges = command.reward_training.judge
    others = dataclasses.replace(command.reward_training, judge=())
    check_defaults(command.rewards.searched, others, needs="--reward")
    require(
        command.heldout is None or command.heldout_root is None,
        "--heldout and --heldout_root exclude each other: a share of the data, or other data",
    )

    from oneshot_fast.embedded.digits import write_default_dataset
    from oneshot_fast.evaluation.heldout import held_out_words, hold_out

    root: str | Path | None = command.data.data_root
    heldout = command.heldout_root
    whole = dataclasses.replace(command.data, start_index=0, max_samples=None)
    with tempfile.TemporaryDirectory() as unused:
        if root is None:
            place = Path(unused) if command.dry_run else command.work_dir / "data"
            main_first(lambda: write_default_dataset(place))
            root = place / "train"
            if command.heldout is None:
                heldout = heldout or place / "heldout"
        data, held, note = [*open_pairs(root, command.data)], [], ""
        if heldout:
            held = [*open_pairs(heldout, whole)]
        else:
            data, held = hold_out(data, command.heldout, command.run.seed)
            if command.heldout != 0:
                note = held_out_words(len(data), len(held))
        if command.data.data_root is not None and held and _is_tried(command.em, data):
            em = dataclasses.replace(command.em, recipe="auto")
            command = dataclasses.replace(command, em=em)
            words = "short trainings choose the recipe first (--recipe none: they do not)"
            note = f"{note}; {words}" if note else words
        more = _more(command)
        device = more["generator"].device
        return EmRun(
            data=data,
            heldout=held,
            judge=command.rewards.judges(device, judges),
            setup=command.rewards.setup(device),
            resize_mode=command.data.resize_mode,
            bucket_step=command.data.bucket_step,
            num_images=command.num_images,
            compare_direct=command.compare_direct,
            note=note,
            **more,
        )


def _is_tried(options: EmOptions, data: Sequence[Record | Failure]) -> bool:
    """Whether a recipe for these targets is left to trials, and they are enough for these."""
    targets = sum(isinstance(item, Record) for item in data)
    auto = dataclasses.replace(options, recipe="auto")
    return options.leaves_recipe and trained_on(auto.resolve(320), targets) >= FEWEST


def _on_rewards(command: EmCommand) -> RewardEmRun:
    options, rewards = command.reward_training, command.rewards
    if options.prompt_file is None:
        raise UserError("with --reward, give --prompt_file FILE")
    options.check(rewards.reward)
    without_targets = dataclasses.replace(
        command,
        data=DataOptions(
            resolution=command.data.resolution,
            width=command.data.width,
            height=command.data.height,
            prompt_field=command.data.prompt_field,
        ),
        heldout_root=None,
        heldout=None,
        compare_direct=False,
        num_images=EmCommand.num_images,
    )
    require(
        command == without_targets,
        "--reward takes prompts, no targets; leave data_root, the flags that say how it is read, "
        "heldout_root, compare_direct and num_images out",
    )
    command.em.resolve(320, by_reward=True).optimize().check()
    prompts = read_prompts(options.prompt_file, command.data.prompt_field)
    more = _more(command)
    device = more["generator"].device
    return RewardEmRun(
        prompts=prompts,
        rewards=rewards.rewards(device),
        judge=rewards.judges(device, options.judge),
        images_per_prompt=options.images_per_prompt,
        names=[*rewards.names, *(f"judge {name}" for name in options.judge)],
        recompute=rewards.recomputed(device),
        **more,
    )


def _more(command: EmCommand) -> dict[str, Any]:
    """Arguments of either run."""
    generator = command.model.load(command.initial_model_id or "tiny", master_weights=True)
    by_reward = bool(command.rewards.reward)
    embedded = command.data.data_root is None and not by_reward
    return {
        "generator": generator,
        "folder": command.work_dir,
        "options": command.em.resolve(generator.width, embedded, by_reward),
        "seed": command.run.seed,
        "resolution": command.data.size,
        "eval_samples": command.eval_samples,
        "save_minutes": command.save_minutes,
        "keep_checkpoints": command.train_keep_checkpoints,
    }


main = functools.partial(run_command, "em", EmCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
