"""`python -m oneshot_fast.scale`: many noises, few go on; simulated, searched, run, learnt from."""

import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitSubcommandPrefixes, UseAppendAction, subcommand

from oneshot_fast.cli import OK, finish, public, run_command
from oneshot_fast.data.options import SizeOptions
from oneshot_fast.errors import require
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.scale.options import RewardTraining, ScaleOptions, parsed_steps
from oneshot_fast.rewards import identity
from oneshot_fast.rewards.options import RewardOptions
from oneshot_fast.runtime.options import RunOptions

if TYPE_CHECKING:
    from oneshot_fast.jobs.scale.pools import Pool
    from oneshot_fast.search.pruning import Cost, Schedule


@dataclass(frozen=True)
class PoolOptions:
    """The rewards, and what a candidate costs."""

    pool: Path
    """Rewards of many candidates per prompt at many steps: .safetensors, .npz, .npy, .parquet, or a
    folder of TTSnap's YAML files."""
    reward: tuple[str, ...] = ()
    """Names of the rewards, where the pool's file has none. With several each ranks the candidates,
    and sums of ranks decide; in a pool of `scale data` the weighted sum does, as in `scale run`."""
    scale: Literal["none", "published"] = "none"
    """published: rewards named imr, pic and hps as papers print them."""
    deduplicate: bool = True
    """Leave out candidates that are copies of others."""
    evaluation_cost: float = 21.5
    """x: one evaluation of the denoiser, both halves of guidance; the default is FLUX.1 at 512
    pixels in TFLOP (SDXL at 1024 with guidance: 13.5)."""
    verification_cost: float = 2.65
    """y: decoding and scoring one image, in the same unit (SDXL at 1024: 10.8)."""
    cost: Literal["counts", "ratio", "original"] = "counts"
    """counts: whole candidates; ratio: shares; original: TTSnap's, one evaluation too few."""

    def load(self) -> "Pool":
        """Read the pool; UserError if it cannot be used."""
        from oneshot_fast.jobs.scale.pools import read_pool

        for name in ("evaluation_cost", "verification_cost"):
            fits = 0 <= getattr(self, name) < math.inf
            require(fits, f"{name} is {getattr(self, name)}; give a finite number from 0")
        require(self.evaluation_cost + self.verification_cost > 0, "both costs are 0")
        pool = read_pool(self.pool)
        if self.reward:
            count = len(pool.rewards)
            require(len(self.reward) == count, f"give {count} names with --reward: so many it has")
            pool = dataclasses.replace(pool, rewards=self.reward)
        pool = pool.published_scale() if self.scale == "published" else pool
        return (pool.without_copies() if self.deduplicate else pool).total()

    def of(self, pool: "Pool") -> "Cost":
        """What one of its candidates costs."""
        from oneshot_fast.search.pruning import Cost

        return Cost(self.evaluation_cost, self.verification_cost, pool.num_steps, self.cost)


@dataclass(frozen=True)
class SimulateConfig:
    """Simulate a schedule of prunes beside Best-of-N at equal cost."""

    pool: PoolOptions
    after: tuple[int, ...] = (2, 6, 11)
    """Steps, from 0, after which the worst candidates are dropped."""
    keep: tuple[float, ...] = (0.4, 0.4, 0.5)
    """Share that each prune keeps."""
    budget: tuple[float, ...] = ()
    """Costs per prompt; by default those of Best-of-2, 5, 10 and 20."""
    draws: int = 64
    """Random subsets of the pool, doubled up to 4096 until their error no longer matters."""
    shared_mask: bool = False
    """The same subset for all prompts, as TTSnap draws."""
    runs: tuple[Path, ...] = ()
    """Folders of finished `scale run`s of the same model and reward: what they gave is shown beside
    what the pool says of their schedules."""
    output_dir: Path = Path("runs/scale")
    """Folder of scale.json, scale.png and report.html."""
    seed: int = 0
    """Seed of the draws."""


@dataclass(frozen=True)
class SearchConfig:
    """Find the schedule that pays most for a budget, judged on prompts kept aside."""

    pool: PoolOptions
    budget: float | None = None
    """Cost per prompt; by default that of Best-of-10."""
    prune_reward: Literal["base", "noise_aware"] = "base"
    """Which reward prunes; the base reward selects in the end."""
    max_prunes: int = 3
    """Most prunes of a schedule."""
    tries: int = 1500
    """Random schedules that are tried."""
    holdout: float = 0.5
    """Share of the prompts that are kept aside."""
    output_dir: Path = Path("runs/scale_search")
    """Folder of schedule.json and report.html."""
    seed: int = 0
    """Seed of the split, the schedules and the draws."""


@dataclass(frozen=True)
class _Made:
    """Of which prompts images are made, and by what."""

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
    batch_size: int = 16
    """Noises, of any of the prompts, that are evaluated at once; halved where memory runs out. A
    result does not depend on it beyond rounding."""
    size: SizeOptions = SizeOptions()
    rewards: RewardOptions = RewardOptions()
    model: ModelOptions = ModelOptions()
    run: RunOptions = RunOptions()

    def check(self) -> None:
        """Raise UserError for what is missing, or has no effect."""
        require(bool(self.rewards.reward), "give --reward NAME[:WEIGHT]")
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}; give at least 1")
        model = self.model
        for flag, is_usual in (
            ("checkpointing", self.rewards.checkpointing == "auto"),
            ("backprop_steps", model.backprop_steps is None),
            ("decoder_checkpointing", not model.decoder_checkpointing),
        ):
            require(is_usual, f"--{flag} is for gradients, and nothing here has any; leave it out")
        require(
            not model.compile,
            "--compile compiles anew for every size of a batch, and sizes vary here; leave it out",
        )
        self.run.check()
        _ = self.size.size

    def prompts(self) -> list[str]:
        """Those that are named."""
        from oneshot_fast.data.prompts import named_prompts

        return named_prompts(self.prompt, self.prompt_file, self.prompt_field)


@dataclass(frozen=True)
class DataConfig(_Made):
    """Make a pool of one's own: images of each prompt at all steps, scored.

    pool.safetensors is for `simulate` and `search`; images/pXXXX/idYYY/sNN.png are the estimates of
    the steps, labels.jsonl their scores, both for `train_reward`. An interrupted run resumes when
    the same command is repeated.
    """

    candidates: int = 32
    """Images of each prompt."""
    prune_reward: UseAppendAction[tuple[str, ...]] = ()
    """Folder of `train_reward`, [:WEIGHT], that scores estimates, too: one for each --reward, in
    their order; then `simulate` and `search` know it as noise-aware."""
    steps_saved: str | None = None
    """Steps, from 0, that are kept, such as 0:15,19, where 15 is no longer meant; by default all.
    The last always is."""
    save_images: bool = True
    """Keep pictures, not only scores."""
    format: Literal["png", "tar"] = "png"
    """Of pictures: a file for each, or a WebDataset shard for each prompt, images/pXXXX.tar, whose
    samples pXXXX-idYYY have all steps of an image, .sNN.png, and a .json."""
    dry_run: bool = False
    """Print what will be made, and the time from some timed batches; nothing is written."""

    @property
    def steps(self) -> list[int] | None:
        """``steps_saved`` as numbers; UserError if it has none."""
        return None if self.steps_saved is None else parsed_steps(self.steps_saved, "steps_saved")

    def check(self) -> None:
        super().check()
        require(self.output_dir is not None or self.dry_run, "give --output_dir DIR")
        require(
            self.save_images or self.format == "png",
            "--format has no effect with --no_save_images; leave one out",
        )
        _ = self.steps


@dataclass(frozen=True)
class ScaleRunConfig(_Made):
    """Make, for each prompt, the best image that a budget pays: many noises, few of them followed.

    All noises of some images go through the steps side by side; what is dropped is not evaluated
    any more. training/manifest.jsonl pairs the base noises with the images that were found, for
    `python -m oneshot_fast.sft`. An interrupted run resumes when the same command is repeated.
    """

    num_images_per_prompt: int = 1
    """Images of each prompt, each from noises of its own."""
    seeds: tuple[int, ...] = ()
    """Instead: the seeds of each prompt's base noises, as torch.Generator().manual_seed takes
    them."""
    prune_reward: UseAppendAction[tuple[str, ...]] = ()
    """NAME[:WEIGHT], or folder of `train_reward`, of what scores estimates on the way; by default
    --reward, which selects in the end. May be given several times."""
    score_decoder_id: str | None = None
    """Tiny decoder (AutoencoderTiny: folder or hub id) that decodes estimates on the way; the last
    images have the model's own."""
    dry_run: bool = False
    """Print what an image will cost, and the time from some timed batches; nothing is written."""
    scale: ScaleOptions = ScaleOptions()

    def check(self) -> None:
        super().check()
        require(self.output_dir is not None or self.dry_run, "give --output_dir DIR")
        from oneshot_fast.search.samples import check_count

        check_count(self.num_images_per_prompt, self.seeds)
        self.scale.checked(self.model.num_inference_steps, True)


@dataclass(frozen=True)
class TrainRewardConfig:
    """Train a reward to tell, from a step's estimate, the score of the image that it leads to.

    Learns from the pictures of `scale data`, and measures on prompts kept aside. The folder is a
    reward: --prune_reward DIR of `run`, or --reward DIR of any command. An interrupted training
    resumes when the same command is repeated.
    """

    data: Path
    """Folder of `scale data`, with pictures."""
    reward: str
    """The reward of finished images, one of those that scored the data."""
    output_dir: Path | None = None
    """Folder of the trained reward."""
    dry_run: bool = False
    """Print what will be trained, and the time from some timed steps; nothing is written."""
    models_dir: Path = Path("models")
    """Folder of the models of rewards, see python -m oneshot_fast.download."""
    save_minutes: float = 5.0
    """Minutes between saved training states; 0 saves after every step."""
    training: RewardTraining = RewardTraining()
    run: RunOptions = RunOptions()


@dataclass(frozen=True)
class ConvertConfig:
    """Write a pool of any form as .safetensors."""

    pool: Path
    """What to read."""
    output: Path
    """What to write."""


@dataclass(frozen=True)
class ScaleCommand:
    """Test-time scaling: many noises per prompt, of which few are followed to the end."""

    command: OmitSubcommandPrefixes[
        Annotated[SimulateConfig, subcommand("simulate")]
        | Annotated[SearchConfig, subcommand("search")]
        | Annotated[ScaleRunConfig, subcommand("run")]
        | Annotated[DataConfig, subcommand("data")]
        | Annotated[TrainRewardConfig, subcommand("train_reward")]
        | Annotated[ConvertConfig, subcommand("convert")]
    ]


def execute(command: ScaleCommand) -> int:
    """Run the chosen command; see ``run_command`` for exit codes."""
    config = command.command
    if isinstance(config, SimulateConfig):
        _simulate(config)
    elif isinstance(config, SearchConfig):
        _search(config)
    elif isinstance(config, ScaleRunConfig):
        return _run(config)
    elif isinstance(config, DataConfig):
        return _data(config)
    elif isinstance(config, TrainRewardConfig):
        return _train_reward(config)
    else:
        from oneshot_fast.jobs.scale.pools import read_pool, write_pool

        require(config.output.suffix == ".safetensors", f"{config.output} must be a .safetensors")
        write_pool(config.output, read_pool(config.pool))
        print(f"pool: {config.output}")
    return OK


def _simulate(config: SimulateConfig) -> None:
    from oneshot_fast.jobs.scale.simulate import Arm, agreement, areas, curve, measured
    from oneshot_fast.report.scale import write_scale_report
    from oneshot_fast.runtime.files import write_json
    from oneshot_fast.search.pruning import Schedule

    require(config.draws >= 2, "draws must be at least 2")
    pool = config.pool.load()
    cost, schedule = config.pool.of(pool), Schedule(config.after, config.keep)
    schedule.check(cost.steps)
    arms = {"pruned": Arm(schedule)}
    if pool.noise_aware is not None:
        arms["pruned, noise-aware"] = Arm(schedule, noise_aware=True)
    sizes = (n for n in (2, 5, 10, 20) if n <= pool.final.shape[1])
    budgets = config.budget or tuple(Schedule().cost(n, cost) for n in sizes)
    found = {
        "settings": public(config) | {"runs": [*map(str, config.runs)]},
        "prompts": len(pool.final),
        "candidates": pool.final.shape[1],
        "rows": curve(
            pool,
            arms,
            budgets,
            cost,
            draws=config.draws,
            seed=config.seed,
            shared_mask=config.shared_mask,
        ),
    }
    found["areas"] = areas(found["rows"])
    found["agreement"] = agreement(pool)
    found["measured"] = measured(pool, config.runs, cost, seed=config.seed)
    largest = found["rows"][-1]["n"]
    found["alive"] = {"after": [*schedule.after], "counts": schedule.counts(largest)}
    found["best_of_n_cost"] = Schedule().cost(1, cost)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.output_dir / "scale.json", found)
    write_scale_report(config.output_dir, found)
    for row in found["rows"]:
        gain = row.get("gain")
        against = "" if gain is None else (
            f"; against Best-of-N {gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"
        )  # fmt: skip
        few = ": all that the pool has" if row["pool_too_small"] else ""
        print(f"budget {row['budget']:g}: {row['arm']}, n = {row['n']}{few}, "
              f"{row['mean']:.4f} [{row['low']:.4f}, {row['high']:.4f}]{against}")  # fmt: skip
    for arm, area in found["areas"].items():
        if area is not None and len(budgets) > 1:
            print(f"{arm}: area over the budgets {area:+.1f} % of Best-of-N's")
    for row in found["measured"]:
        print(f"{row['run']}: {row['arm']}, n = {row['n']}: measured {row['measured']:.4f} "
              f"[{row['low']:.4f}, {row['high']:.4f}], simulated {row['simulated']:.4f} "
              f"[{row['simulated_low']:.4f}, {row['simulated_high']:.4f}]")  # fmt: skip
    print(f"report: {config.output_dir / 'report.html'}")


def _search(config: SearchConfig) -> None:
    from oneshot_fast.jobs.scale.simulate import PUBLISHED, search_schedule
    from oneshot_fast.report.scale import write_search_report
    from oneshot_fast.runtime.files import write_json
    from oneshot_fast.search.pruning import Schedule

    require(config.max_prunes >= 1, "max_prunes must be at least 1")
    require(config.tries >= 1, "tries must be at least 1")
    require(0 < config.holdout < 1, "holdout must be between 0 and 1")
    pool = config.pool.load()
    cost = config.pool.of(pool)
    budget = Schedule().cost(10, cost) if config.budget is None else config.budget
    aware = config.prune_reward == "noise_aware"
    require(not aware or pool.noise_aware is not None, "the pool has no noise-aware reward")
    found = search_schedule(
        pool, budget, cost, noise_aware=aware, max_prunes=config.max_prunes, tries=config.tries,
        holdout=config.holdout, seed=config.seed,
    )  # fmt: skip
    config.output_dir.mkdir(parents=True, exist_ok=True)
    path = config.output_dir / "schedule.json"
    settings = public(config) | {"budget": budget}
    kept = {"settings": settings, **dataclasses.asdict(found)}
    write_json(path, kept)
    write_search_report(config.output_dir, kept)
    print(f"{found.search_prompts} prompts to search, {found.held_out_prompts} kept aside to judge")
    if found.pool_too_small:
        print(f"the budget pays more candidates than the {pool.final.shape[1]} of the pool")
    for name, gain in found.held_out.items():
        shown = words(found.searched if name == "searched" else PUBLISHED)
        between = f"[{gain['low']:+.4f}, {gain['high']:+.4f}]"
        print(f"{name} ({shown}), n = {found.n[name]} beside {found.n['best_of_n']}: "
              f"against Best-of-N {gain['mean']:+.4f} {between}")  # fmt: skip
    better = words(found.schedule) if found.schedule.after else "Best-of-N is better here"
    print(f"recommended: {better}\nschedule: {path}")


def _run(config: ScaleRunConfig) -> int:
    config.check()
    from oneshot_fast.jobs.scale.run import ScaleRun
    from oneshot_fast.report.scale_run import write_run_report

    prompts = config.prompts()
    generator, rewards = config.model.load(config.model_id), config.rewards
    device, on_the_way = generator.device, config.prune_reward
    run = ScaleRun(
        generator,
        prompts,
        config.output_dir or Path(),
        config.scale,
        rewards=rewards.load(device, rewards.reward),
        reward_names=rewards.names,
        prune_rewards=rewards.judges(device, on_the_way),
        prune_reward_names=[*map(identity, on_the_way)],
        score_decoder_id=config.score_decoder_id,
        images_per_prompt=config.num_images_per_prompt,
        seeds=config.seeds,
        seed=config.run.seed,
        batch_size=config.batch_size,
        resolution=config.size.size,
        begins_anew=config.run.overwrite,
    )
    if config.output_dir is None or config.dry_run:
        print(run.plan())
        return OK
    summary = run.run(**config.run.arguments)
    say = functools.partial(
        _print_summary, model=["--model_id", config.model_id, *config.model.flags]
    )
    return finish(config, config.output_dir, summary, write_run_report, say, "images ")


def _data(config: DataConfig) -> int:
    config.check()
    from oneshot_fast.jobs.scale.data import POOL, DataRun
    from oneshot_fast.report.scale import write_data_report

    prompts, folder, rewards = config.prompts(), config.output_dir, config.rewards
    generator = config.model.load(config.model_id)
    run = DataRun(
        generator,
        prompts,
        folder or Path(),
        rewards=rewards.load(generator.device, rewards.reward),
        reward_names=rewards.names,
        candidates=config.candidates,
        prune_rewards=rewards.judges(generator.device, config.prune_reward),
        prune_reward_names=[*map(identity, config.prune_reward)],
        steps_saved=config.steps,
        save_images=config.save_images,
        picture_format=config.format,
        seed=config.run.seed,
        batch_size=config.batch_size,
        resolution=config.size.size,
    )
    if folder is None or config.dry_run:
        print(run.plan())
        return OK
    summary = run.run(**config.run.arguments)

    def say(summary: dict[str, Any], folder: Path) -> None:
        print(f"{summary['candidates']} images of each of {summary['samples']} prompts in "
              f"{summary['seconds']:.0f} s; pool: {folder / POOL}")  # fmt: skip

    return finish(config, folder, summary, write_data_report, say, "prompts ")


def _train_reward(config: TrainRewardConfig) -> int:
    from oneshot_fast.jobs.scale.train_reward import RewardRun
    from oneshot_fast.report.scale_reward import print_summary, write_reward_report

    config.run.check()
    require(config.output_dir is not None or config.dry_run, "give --output_dir DIR")
    run = RewardRun(
        config.output_dir or Path(),
        config.data,
        config.reward,
        config.training,
        models_dir=config.models_dir,
        seed=config.run.seed,
        save_minutes=config.save_minutes,
    )
    if config.output_dir is None or config.dry_run:
        print(run.plan())
        return OK
    summary = run.run(**config.run.arguments)
    return finish(config, config.output_dir, summary, write_reward_report, print_summary)


def _print_summary(summary: dict[str, Any], folder: Path, model: Sequence[str]) -> None:
    from oneshot_fast.data.found_pairs import MANIFEST

    arms = {summary["settings"]["method"]: summary}
    if (beside := summary.get("compare")) is not None:
        arms["best_of_n"] = beside
    for name, arm in arms.items():
        print(f"{name}, {arm['candidates']} candidates of each of {summary['samples']} images: "
              f"reward {arm['best_reward']:.4f} [{arm['low']:.4f}, {arm['high']:.4f}], "
              f"{arm['tflop_per_image']:.4g} TFLOP and {arm['seconds_per_image']:.2f} s per "
              "image")  # fmt: skip
    if beside is not None:
        gain = beside["gain"]
        print(f"against Best-of-N: {gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]")
    if summary["training_pairs"]:
        flags = [*model, "--manifest_path", str(folder / MANIFEST)]
        print(f"to train on these images: python -m oneshot_fast.sft {shlex.join(flags)} "
              "--output_dir DIR")  # fmt: skip


def words(schedule: "Schedule") -> str:
    """A schedule as the flags that give it."""
    after, keep = (" ".join(map(str, part)) for part in (schedule.after, schedule.keep))
    return f"--keep {keep} --after {after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m oneshot_fast.scale``."""
    return run_command("scale", ScaleCommand, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
