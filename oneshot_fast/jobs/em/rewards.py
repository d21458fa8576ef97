"""The main job by rewards: search noises that score high, train on the images found, repeat.

The E-step is a noise optimisation with the generator as it is (best-of-K is RAFT, Dong et al. 2023,
arXiv 2304.06767; gradients amortise their own search), the M-step an ordinary training on random
noise with the images found. Every stage is the resumable run of its own command.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from oneshot_fast.cli import OK, SOME_FAILED, public
from oneshot_fast.data.options import DataOptions
from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.errors import require
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.jobs.em.schedule import cycle_seeds
from oneshot_fast.jobs.em.targets import EmRun
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.jobs.optimize.pairs import MANIFEST
from oneshot_fast.runtime.files import read_json
from oneshot_fast.runtime.processes import barrier, is_main
from oneshot_fast.runtime.seeds import content_id

if TYPE_CHECKING:
    from oneshot_fast.em import EmCommand
    from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure
    from oneshot_fast.jobs.optimize.search import RewardSearch, Sample
    from oneshot_fast.training.batch import PreservePool

_OF_TARGETS = (
    "patience", "assign_fraction", "warm_start", "pool_matching", "feature_weight",
    "sphere_optimizer", "rotation_optimizer",
)  # fmt: skip


def search_options(em: EmOptions, cycle: int) -> OptimizeOptions:
    """How the E-step of a cycle, from 1, searches.

    Raises:
        UserError: If an option is only for targets.
    """
    for name in _OF_TARGETS:
        require(
            getattr(em, name) == getattr(EmOptions, name),
            f"{name} is for assigning noises to targets; leave it out with --reward",
        )
    plain = em.assign(cycle)
    require(plain.choice != "pool", "a pool needs targets; with --reward use best_of_n")
    options = OptimizeOptions(
        method=plain.method,
        steps=plain.steps,
        lr=plain.lr,
        candidates=plain.candidates,
        max_angle=plain.max_angle,
        patch_size=plain.patch_size,
        rotation_groups=plain.rotation_groups,
        noise_l2_weight=plain.noise_l2_weight,
        prior_weight=plain.prior_weight,
    )
    options.check()
    return options


class RewardEmRun(EmRun):
    """The stages of one run by rewards, in order; every one is skipped if its result is there."""

    def __init__(self, command: EmCommand) -> None:
        """Load prompts, generator and rewards.

        Raises:
            UserError: On bad prompts, models or options.
        """
        em, options = command.em, command.reward_training
        require(command.eval_samples >= 10, "eval_samples must be at least 10")
        require(options.images_per_prompt >= 1, "images_per_prompt must be at least 1")
        em.check()
        self._searches = [search_options(em, k + 1) for k in range(len(em.schedule()))]
        assert options.prompt_file is not None
        self.prompts = read_prompts(options.prompt_file)

        from oneshot_fast.generators.target_images import TargetImages

        self.command, self.folder = command, command.work_dir
        self.records, self.heldout, self.failures = [], [], []
        self.generator = command.model.load(command.initial_model_id or "tiny", master_weights=True)
        self.targets = TargetImages(self.generator, command.data.resolution)
        self.summary: dict[str, Any] = {"random_noise": {}, "cycles": []}
        self.rewards = command.rewards.load(self.generator.device)
        judges = options.judge
        self.judge = command.rewards.load(self.generator.device, judges) if judges else None
        self._searcher(1)  # checks its options before any long work

    def settings(self) -> dict[str, Any]:
        """Everything the result depends on."""
        options = self.command.reward_training
        return {
            "command": "em",
            "rewards": [*self.command.rewards.names, *(f"judge {name}" for name in options.judge)],
            **dataclasses.asdict(self.command.em),
            "eval_samples": self.command.eval_samples,
            "images_per_prompt": options.images_per_prompt,
            "seed": self.command.run.seed,
            "resolution": self.targets.resolution,
            "model": self.generator.fingerprint(),
            "device": self.generator.device.type,
            "samples": len(self.prompts) * options.images_per_prompt,
            "prompts": content_id(*self.prompts),
        }

    def _measure(self) -> RandomNoiseMeasure:
        from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure, classifier_for
        from oneshot_fast.jobs.sft.rewards import all_scores

        return RandomNoiseMeasure(
            self.prompts,
            self.generator.noise_shape(self.targets.resolution, self.targets.resolution),
            samples=self.command.eval_samples,
            seed=self.command.run.seed,
            classifier=classifier_for(self.generator, self.prompts),
            scores=all_scores(self.rewards, self.judge),
        )

    def _searcher(self, cycle: int) -> RewardSearch:
        from oneshot_fast.jobs.optimize.search import RewardSearch

        generator = self.generator
        # an M-step ends the denoiser's
        generator.recompute(self.command.rewards.recomputed(generator.device))
        options, side = self._searches[cycle - 1], self.targets.resolution
        if options.method == "rotation":
            from oneshot_fast.noise.rotation import check_patching

            size = self.generator.noise_shape(side, side)[1:]
            check_patching(size, options.patch_size, options.rotation_groups)
        return RewardSearch(self.generator, self.rewards, options, resolution=side)

    def plan(self) -> str:
        """What the first cycle would need."""
        from oneshot_fast.jobs.optimize.plan import optimize_plan
        from oneshot_fast.planning.timing import sft_plan

        em, samples = self.command.em, self._samples(0)
        e_step = "\n".join(optimize_plan(self._searcher(1), samples, em.assign_batch_size))
        side = self.targets.resolution
        m_step = sft_plan(self.generator, em.sft(), resolution=side, samples=len(samples))
        return f"E-step\n{e_step}\n\nM-step\n{m_step}\n\nthere are {len(em.schedule())} cycles"

    def _samples(self, seed: int) -> list[Sample]:
        from oneshot_fast.jobs.optimize.run import samples_of

        return samples_of(self.prompts, self.command.reward_training.images_per_prompt, seed)

    def _cycle(self, cycle: int, pool: PreservePool | None) -> None:
        """Search noises, and train on the images found."""
        from oneshot_fast.jobs.optimize.run import OptimizeRun

        command, em = self.command, self.command.em
        seed, noise_seed = cycle_seeds(command.run.seed, cycle, em.pool_refresh)
        with self._stage(f"cycle-{cycle:02d}/assign") as folder:
            run = OptimizeRun(
                self._searcher(cycle),
                folder,
                batch_size=em.assign_batch_size,
                seed=noise_seed,
                rewards=command.rewards.names,
            )
            if is_main():
                run.run(self._samples(noise_seed))
            barrier()
            found = read_json(folder / "metrics_summary.json")
        with self._stage(f"cycle-{cycle:02d}/sft") as home:
            trained = self._train(home, folder / MANIFEST, em.sft(cycles=[cycle]), seed, pool)
        self.summary["cycles"].append(
            {
                "cycle": cycle,
                "search": {key: found[key] for key in ("initial_reward", "best_reward")},
                "sft": {k: trained[k] for k in ("matched_loss_before", "matched_loss_after")},
                "failed": found["failed"],
            }
        )


def execute(command: EmCommand) -> int:
    """The command with --reward; see ``run_command`` for exit codes."""
    options = command.reward_training
    require(options.prompt_file is not None, "with --reward, give --prompt_file FILE")
    options.check(command.rewards.reward)
    require(
        dataclasses.replace(command.data, resolution=None) == DataOptions()
        and command.heldout_root is None,
        "--reward takes prompts, no targets; leave data_root, the flags that say how it is read, "
        "and heldout_root out",
    )
    require(not command.compare_direct, "--compare_direct needs targets; not with --reward")
    require(
        command.num_images == type(command).num_images,
        "with --reward all images found are kept, as targets; leave --num_images out",
    )
    run = RewardEmRun(command)
    if command.dry_run:
        print(run.plan())
        return OK
    summary = run.run()
    if is_main():
        from oneshot_fast.report.rewards import write_em_reward_report

        write_em_reward_report(command.work_dir, public(command))
        print_summary(command, summary)
    return SOME_FAILED if summary["failed"] else OK


def print_summary(command: EmCommand, summary: dict[str, Any]) -> None:
    """Say what was reached and where it is."""
    noise = summary["random_noise"]
    columns = ["base", *(f"cycle-{row['cycle']:02d}" for row in summary["cycles"])]
    print(f"\nOn {command.eval_samples} random noises:")
    print(f"{'':24}" + "".join(f"{name:>12}" for name in columns))
    for key in noise["base"]:
        if key != "samples":
            print(f"{key:24}" + "".join(f"{noise[name][key]:12.4f}" for name in columns))
    for row in summary["cycles"]:
        found = row["search"]
        print(
            f"search of cycle {row['cycle']}: mean reward {found['initial_reward']:.4f} -> "
            f"{found['best_reward']:.4f}"
        )
    print(f"took {summary['seconds']:.0f} s; checkpoint: {command.work_dir / 'checkpoint-final'}")
    print(f"report: {command.work_dir / 'report.html'}")
