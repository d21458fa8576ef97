"""What EM by targets and EM by rewards share: cycles of two steps, measured. Holds no maths.

Each stage is a resumable run in a folder of its own; a stage whose result is there is skipped.
"""

import contextlib
import dataclasses
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from oneshot_fast.data.manifests import read_manifests
from oneshot_fast.data.sizes import Resolution
from oneshot_fast.errors import one_line, require
from oneshot_fast.evaluation.distances import HEADLINE, Verdict, best_of, said
from oneshot_fast.evaluation.features import Features
from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure, classifier_for, compare
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.jobs.em.schedule import cycle_seeds, is_stuck
from oneshot_fast.jobs.optimize.run import OptimizeRun
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.plan import sft_plan
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.runtime import files
from oneshot_fast.runtime.folder import RunFolder
from oneshot_fast.runtime.processes import gather_objects, is_main, kept_by_main, main_first
from oneshot_fast.runtime.progress import Tracker, start_tracking
from oneshot_fast.runtime.units import duration
from oneshot_fast.training.losses.preserve import POOL, PreservePool
from oneshot_fast.training.options import check_keeping
from oneshot_fast.training.zero import check_engine

_OUTPUTS = (
    "eval", "direct", "heldout-base", "heldout-final", "logs", POOL,
    "checkpoint-best", "checkpoint-final", "checkpoint-best.safetensors",
    "checkpoint-final.safetensors", "failures.jsonl", "history.jsonl", "summary.json",
    "report.html", "curves.png", "trials", "recipe.json",
)  # fmt: skip


class Cycles(ABC):
    """The stages of one run, in order; a subclass says how noises are found."""

    by_reward = False  # whether there are rewards in place of targets

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[str],
        folder: str | Path,
        options: EmOptions,
        *,
        seed: int = 0,
        resolution: Resolution | None = None,
        eval_samples: int = 500,
        save_minutes: float = 5.0,
        keep_checkpoints: int = 0,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to align, in place; float32 weights.
            prompts: Of the random noises on which it is measured, and of the preserve losses.
            folder: Where everything is written.
            options: How the steps alternate, and how each works.
            seed: Seed of the run.
            resolution: Image side in pixels, or height and width; by default the generator's own.
            eval_samples: Random noises on which the generator is measured.
            save_minutes: Minutes between saved training states.
            keep_checkpoints: M-step: how many epochs' checkpoints are kept, the newest.

        Raises:
            UserError: If an option makes no sense.
        """
        require(eval_samples >= 10, "eval_samples must be at least 10")
        check_keeping(save_minutes, keep_checkpoints)
        self.asked = self.options = options.resolve(generator.width, by_reward=self.by_reward)
        self.options.check()
        check_engine(self.options.sft(), generator)
        if options.save_single_file:
            generator.check_single_file()
        if options.train_lora_format == "kohya":
            generator.check_kohya()
        if self.options.train_caption_dropout:
            generator.encode_prompts([""])  # some models do not know it
        self.generator, self.prompts, self.folder = generator, list(prompts), Path(folder)
        self.targets = TargetImages(generator, resolution)
        self.classifier = classifier_for(generator, self.prompts)
        self.seed, self.eval_samples = seed, eval_samples
        self._saving: dict[str, Any] = {
            "save_minutes": save_minutes,
            "keep_checkpoints": keep_checkpoints,
        }
        self._pool: PreservePool | None = None
        self.features: Features | None = None  # what images are compared by, and the verdicts
        self.verdicts: dict[str, dict[str, Verdict]] = {}
        self.initial: dict[str, Tensor] = {}  # weights, of a run that may end with them
        self.tracker, self.verify = Tracker(), False
        self.summary: dict[str, Any] = {"random_noise": {}, "cycles": []}

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What else the result depends on."""

    @abstractmethod
    def measure(self) -> RandomNoiseMeasure:
        """What the generator is measured by, see ``measuring``."""

    @abstractmethod
    def first(self) -> AssignRun | OptimizeRun:
        """The first E-step, to check and to plan."""

    @abstractmethod
    def e_step(self, cycle: int, seed: int) -> tuple[Path, dict[str, Any]]:
        """Find noises with the generator as it is; ``cycle`` counts from 1.

        Returns:
            Manifest of the pairs to train on, and what the summary says of the step.
        """

    def settings(self) -> dict[str, Any]:
        """Everything the result depends on."""
        return {
            "command": "em",
            **dataclasses.asdict(self.asked),
            "eval_samples": self.eval_samples,
            "seed": self.seed,
            **self.generator.settings(self.targets.size),
            **self.describe(),
            **({"features": self.features.name} if self.features else {}),
        }

    def plan(self) -> str:
        """What the first cycle's steps will need, and the time of all cycles; does nothing."""
        first, size, cycles = self.first(), self.targets.size, len(self.options.schedule())
        e_step, samples = first.plan(), first.total or 0
        m_step = sft_plan(self.generator, self.options.sft(), resolution=size, samples=samples)
        needed = duration(cycles * (e_step.seconds + m_step.seconds))
        return (
            f"E-step\n{e_step}\n\nM-step\n{m_step}\n\n"
            f"in all, {cycles} cycles: {needed}, without the evaluations"
            + (", and half as much for the trials of --recipe auto" if self.options.recipe else "")
            + "; the checkpoints of each M-step stay on the disk"
        )

    def run(
        self, *, overwrite: bool = False, report_to: str | Tracker = "none", verify: bool = False
    ) -> dict[str, Any]:
        """Run all stages that have no result yet; returns the summary, as in summary.json."""
        cycles = range(1, len(self.options.schedule()) + 1)
        old = (path.name for path in self.folder.glob("cycle-*"))  # may be more than the new ones
        outputs = (*_OUTPUTS, *sorted({*old, *map(name_of, cycles)}))
        settings, self.verify = self.settings(), verify
        folder = RunFolder(self.folder, settings, outputs, overwrite, verify)
        with kept_by_main(folder):
            self.tracker = start_tracking(report_to, self.folder, settings)
            measure = self.measure()
            self.summary |= {"measured_by": measure.described, "verdicts": {}}
            self.evaluate(measure, "base")
            options, size = self.options.sft(), self.targets.size
            self._pool = PreservePool.build(
                self.generator, options, self.prompts, size, self.seed, self.folder
            )
            self.alternate(measure)
            self.tracker.finish()
            if is_main() and folder.is_writable:
                self._finish(settings, is_measured=measure.real is not None)
        return dict(files.read_json(self.folder / "summary.json"))

    def alternate(self, measure: RandomNoiseMeasure) -> None:
        """All cycles, each measured; the generator ends with the weights of the last one."""
        distances = [self.summary["random_noise"]["base"].get(HEADLINE)]
        for cycle in range(1, len(self.options.schedule()) + 1):
            self._cycle(cycle)
            measured = self.evaluate(measure, name_of(cycle))
            distances.append(measured.get(HEADLINE))
            if is_stuck(distances, self.options.patience):
                break

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        """Yield the folder of a stage and note in history.jsonl how long it took."""
        started = time.perf_counter()
        if is_main():
            print(f"[{name}]", file=sys.stderr)
        yield self.folder / name
        if not is_main():
            return
        path = self.folder / "history.jsonl"
        if name not in (row["stage"] for row in files.mend_jsonl(path)):
            seconds = round(time.perf_counter() - started, 3)
            files.append_jsonl(path, [{"stage": name, "seconds": seconds}])

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of a noise, [C, h, w]."""
        return self.generator.noise_shape(*self.targets.size)

    def measuring(self, **more: Any) -> dict[str, Any]:
        """Arguments of the ``RandomNoiseMeasure`` beside prompts and noises."""
        run = {"samples": self.eval_samples, "seed": self.seed}
        return {**run, "classifier": self.classifier, "features": self.features, **more}

    def evaluate(self, measure: RandomNoiseMeasure, name: str) -> dict[str, Any]:
        """Measure the generator as it is now, for the summary's column ``name``."""
        with self.stage(f"eval/{name}") as path:
            result = main_first(lambda: measure.measure(self.generator, path))
        tracker = self.tracker.part(name) if name == "direct" else self.tracker
        step = len(self.summary["cycles"])
        tracker.log(result, step)
        tracker.images([path.with_name(f"{name}.png")], step)
        self.summary["random_noise"][name] = result
        if name != "base" and self.features is not None:
            self.verdicts[name] = compare(path.with_name("base"), path)
            self.summary["verdicts"][name] = said(self.verdicts[name])
        return result

    def train(self, name: str, manifest: Path, options: SftOptions, seed: int) -> dict[str, Any]:
        """Train on the pairs of ``manifest`` in the stage ``name``; returns the summary."""
        pairs, failures = read_manifests([manifest])
        run = SftRun(
            self.generator, pairs, self.folder / name, options, targets=self.targets,
            failures=failures, seed=seed, **self._saving,
        )  # fmt: skip
        run.pool = self._pool
        return self.complete(run)

    def complete(self, run: AssignRun | OptimizeRun | SftRun) -> dict[str, Any]:
        """Do a stage, anew if what it was made of has been mended since; returns its summary.

        The settings of em are the same, or it would not have begun. What was measured after a stage
        that is made anew is forgotten.
        """
        name = run.folder.relative_to(self.folder).as_posix()
        with self.stage(name) as folder:
            mended = RunFolder(folder, run.settings(), ()).is_other()
            if isinstance(run, SftRun) and run.is_finished:
                mended |= run.is_mended()  # asked in every process
            outdated = any(gather_objects([mended]))
            if outdated and is_main():
                print(f"[{name}] made anew: what it was made of was mended", file=sys.stderr)
                for path in (self.folder / "eval").glob("[cd]*.json"):  # of cycles, and direct
                    if path.stem >= name.split("/")[0]:
                        files.remove(path)
            tracker = self.tracker.part(name)
            return run.run(overwrite=outdated, report_to=tracker, verify=self.verify)

    def _cycle(self, cycle: int) -> None:
        """One E-step and one M-step on what it found."""
        seed, noise_seed = cycle_seeds(self.seed, cycle, self.options.pool_refresh)
        manifest, found = self.e_step(cycle, noise_seed)
        options = self.options.sft(cycles=[cycle])
        trained = self.train(f"{name_of(cycle)}/sft", manifest, options, seed)
        losses = {name: trained[name] for name in ("matched_loss_before", "matched_loss_after")}
        self.summary["cycles"].append({"cycle": cycle, **found, "sft": losses})

    def _finish(self, settings: dict[str, Any], is_measured: bool) -> None:
        """Choose the best cycle, write summary and failures, then the two checkpoints."""
        noise, last = self.summary["random_noise"], len(self.summary["cycles"])
        noise["final"], path = noise[name_of(last)], self.folder / "summary.json"
        # without held-out images nothing here tells better from worse, so the last one is taken
        verdicts = [self.verdicts.get(name_of(k), {}).get(HEADLINE) for k in range(1, last + 1)]
        best = best_of(verdicts) if is_measured and any(verdicts) else last
        was_base = path.exists() and files.read_json(path)["best_cycle"] == 0
        folders = [f"{name_of(last)}/assign", "heldout-base"]
        failures = [
            r for f in folders for r in files.mend_jsonl(self.folder / f / "failures.jsonl")
        ]
        files.write_jsonl(self.folder / "failures.jsonl", failures)
        history = files.mend_jsonl(self.folder / "history.jsonl")
        self.summary |= {
            "best_cycle": best,
            "failed": len(failures),
            "seconds": round(sum(row["seconds"] for row in history), 1),
            "settings": settings,
        }
        files.write_json(path, self.summary)
        for name, cycle in (("best", best), ("final", last)):
            source = self.folder / name_of(cycle) / "sft" / "checkpoint-final"
            target = self.folder / f"checkpoint-{name}"
            try:
                if cycle:
                    files.copy_folder(source, target)
                elif not (was_base and target.exists()):
                    self._save_base(target)
                if self.options.save_single_file:
                    self.generator.save_single_file(target)
            except OSError as error:  # all the rest is there
                use = f": use {source}" if cycle else ""
                said_why = f"no {target}, as it could not be written ({one_line(error)}){use}"
                print(f"warning: {said_why}", file=sys.stderr)

    def _save_base(self, target: Path) -> None:
        """Save the generator as it was; it keeps the weights of the last cycle."""
        last = name_of(len(self.summary["cycles"]))
        self.generator.denoiser.load_state_dict(self.initial)
        self.generator.save(target)
        self.generator.load_weights(self.folder / last / "sft" / "checkpoint-final")


def name_of(cycle: int) -> str:
    """Folder of a cycle, from 1."""
    return f"cycle-{cycle:02d}"
