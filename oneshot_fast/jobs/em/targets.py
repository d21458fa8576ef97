"""The stages of one EM run, in order. Holds no maths.

Each stage is a resumable run in a folder of its own; a stage whose result is there is skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from oneshot_fast.data.manifests import merge_manifests
from oneshot_fast.data.pairs import Record, read_manifest
from oneshot_fast.errors import require
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.jobs.em.schedule import cycle_seeds, data_roots, is_stuck, turn
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.runtime.files import (
    append_jsonl,
    mend_jsonl,
    read_json,
    write_json,
    write_jsonl,
)
from oneshot_fast.runtime.folder import RunFolder
from oneshot_fast.runtime.processes import barrier, is_main, kept_by_main, main_first
from oneshot_fast.runtime.progress import end_tracking, start_tracking
from oneshot_fast.runtime.seeds import content_id
from oneshot_fast.training.batch import PreservePool, SftOptions

if TYPE_CHECKING:
    from oneshot_fast.em import EmCommand
    from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure
    from oneshot_fast.generators.base import Generator
    from oneshot_fast.generators.target_images import TargetImages

OUTPUTS = (
    "eval", "direct", "heldout-base", "heldout-final", "logs", "preserve.safetensors",
    "checkpoint-best", "checkpoint-final", "failures.jsonl", "history.jsonl", "summary.json",
    "report.html",
)  # fmt: skip


class EmRun:
    """The stages of one run, in order; every one is skipped if its result is there."""

    def __init__(self, command: EmCommand) -> None:
        """Load the data and the initial generator.

        Raises:
            UserError: On bad data, model or options.
        """
        require(command.eval_samples >= 10, "eval_samples must be at least 10")
        command.em.check()
        self.command, self.folder = command, command.work_dir
        train, heldout = data_roots(command)
        self.records, self.failures = command.data.read(train)
        self.heldout: list[Record] = []
        if heldout is not None:
            self.heldout, failures = dataclasses.replace(
                command.data, start_index=0, max_samples=None
            ).read(heldout)
            self.failures += failures
        self.prompts = [record.prompt for record in self.records]

        from oneshot_fast.generators.target_images import TargetImages

        self.generator: Generator = command.model.load(
            command.initial_model_id or "tiny", master_weights=True
        )
        self.targets: TargetImages = TargetImages(self.generator, command.data.resolution)
        self.summary: dict[str, Any] = {"random_noise": {}, "cycles": []}
        self._assigner(self.folder, 0)  # checks its options before any long work

    def settings(self) -> dict[str, Any]:
        """Everything the result depends on."""
        return {
            "command": "em",
            **dataclasses.asdict(self.command.em),
            "eval_samples": self.command.eval_samples,
            "compare_direct": self.command.compare_direct,
            "seed": self.command.run.seed,
            "resolution": self.targets.resolution,
            "resize_mode": self.command.data.resize_mode,
            "model": self.generator.fingerprint(),
            "device": self.generator.device.type,
            "samples": len(self.records),
            "data": content_id(*(record.id for record in self.records)),
            "heldout": content_id(*(record.id for record in self.heldout)),
        }

    def run(self) -> dict[str, Any]:
        """Run all stages that have no result yet.

        Returns:
            The summary, as in summary.json.
        """
        run, cycles = self.command.run, range(1, len(self.command.em.schedule()) + 1)
        old = (path.name for path in self.folder.glob("cycle-*"))  # may be more than the new ones
        outputs = (*OUTPUTS, *sorted({*old, *map(_name, cycles)}))
        settings = self.settings()
        with kept_by_main(RunFolder(self.folder, settings, outputs, run.overwrite)):
            if is_main():
                mend_jsonl(self.folder / "history.jsonl")
            tracker = start_tracking(run.report_to, self.folder, settings)
            measure = self._measure()
            self._evaluate(measure, "base")
            pool = self._pool()
            self._assign_heldout("base")
            initial = self._weights() if self.command.compare_direct else {}
            for cycle in cycles:
                self._cycle(cycle, pool)
                tracker.log(self._evaluate(measure, _name(cycle)), step=cycle)
                noise = self.summary["random_noise"]
                names = ["base", *map(_name, range(1, cycle + 1))]
                distances = [noise[name].get("frechet_distance") for name in names]
                if is_stuck(distances, self.command.em.patience):
                    break
            self._assign_heldout("final")
            if self.command.compare_direct:
                self.generator.denoiser.load_state_dict(initial)
                self._train_directly(measure, pool)
            end_tracking(tracker)
            if is_main():
                self._finish(settings)
        return dict(read_json(self.folder / "summary.json"))

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[Path]:
        """Yield the folder of a stage and note in history.jsonl how long it took."""
        started = time.perf_counter()
        if is_main():
            print(f"[{name}]", file=sys.stderr)
        yield self.folder / name
        if not is_main():
            return
        path = self.folder / "history.jsonl"
        if name not in (row["stage"] for row in mend_jsonl(path)):
            seconds = round(time.perf_counter() - started, 3)
            append_jsonl(path, [{"stage": name, "seconds": seconds}])

    def _weights(self) -> dict[str, Tensor]:
        return {k: v.to("cpu", copy=True) for k, v in self.generator.denoiser.state_dict().items()}

    def _measure(self) -> RandomNoiseMeasure:
        from oneshot_fast.evaluation.measures import real_measures
        from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure, classifier_for

        classifier = classifier_for(self.generator, self.prompts)
        real = None
        if self.heldout:
            mode = self.command.data.resize_mode
            real = self.targets.images([(record.image_path, mode) for record in self.heldout]).cpu()
            labels = [record.prompt for record in self.heldout]
            self.summary["real"] = real_measures(real, labels, classifier)
        return RandomNoiseMeasure(
            self.prompts,
            self.generator.noise_shape(self.targets.resolution, self.targets.resolution),
            samples=self.command.eval_samples,
            seed=self.command.run.seed,
            classifier=classifier,
            real=real,
        )

    def _evaluate(self, measure: RandomNoiseMeasure, name: str) -> dict[str, float]:
        with self._stage(f"eval/{name}") as path:
            result = main_first(lambda: measure.measure(self.generator, path))
        self.summary["random_noise"][name] = result
        return result

    def _pool(self) -> PreservePool | None:
        options = self.command.em.sft()
        if not options.preserves:
            return None
        shape = self.generator.noise_shape(self.targets.resolution, self.targets.resolution)
        return PreservePool.build(
            self.generator,
            self.prompts,
            shape,
            options.preserve_pool_size,
            self.command.run.seed,
            self.folder / "preserve.safetensors",
        )

    def _assigner(
        self, folder: Path, seed: int, cycle: int = 1, previous: Path | None = None
    ) -> AssignRun:
        return AssignRun(
            self.generator,
            self.targets,
            folder,
            self.command.em.assign(cycle),
            seed=seed,
            resize_mode=self.command.data.resize_mode,
            batch_size=self.command.em.assign_batch_size,
            num_images=self.command.num_images,
            previous=previous,
        )

    def _train(
        self,
        folder: Path,
        manifest: Path,
        options: SftOptions,
        seed: int,
        pool: PreservePool | None,
    ) -> dict[str, Any]:
        pairs, failures = read_manifest(manifest)
        return SftRun(
            self.generator,
            self.targets,
            folder,
            options,
            seed=seed,
            save_minutes=self.command.save_minutes,
            keep_checkpoints=self.command.train_keep_checkpoints,
        ).run(pairs, failures, pool=pool)

    def _assign_heldout(self, name: str) -> None:
        if not self.heldout:
            return
        with self._stage(f"heldout-{name}") as folder:
            result = self._assigner(folder, self.command.run.seed).run(self.heldout)
        kept = ("initial_loss", "best_loss", "losses")
        heldout = self.summary.setdefault("heldout", {"samples": result["samples"]})
        heldout[name] = {key: result[key] for key in kept}

    def _train_directly(self, measure: RandomNoiseMeasure, pool: PreservePool | None) -> None:
        """Baseline: the same number of steps on the same targets, with random noise."""
        cycles = [row["cycle"] for row in self.summary["cycles"]]
        options = self.command.em.sft("random", cycles)
        manifest = self.folder / _name(1) / "assign" / "manifest.jsonl"
        with self._stage("direct") as folder:
            self._train(folder, manifest, options, self.command.run.seed, pool)
        self._evaluate(measure, "direct")

    def _cycle(self, cycle: int, pool: PreservePool | None) -> None:
        """One E-step and one M-step on what it found."""
        em = self.command.em
        seed, noise_seed = cycle_seeds(self.command.run.seed, cycle, em.pool_refresh)
        previous = self._manifest(cycle - 1) if cycle > 1 else None
        with self._stage(f"{_name(cycle)}/assign") as folder:
            assigned = self._assigner(
                folder, noise_seed, cycle, previous if em.warm_start else None
            ).run(turn(self.records, cycle, em.assign_fraction), self.failures)
        if previous is not None and em.assign_fraction < 1 and is_main():
            merge_manifests(previous, folder / "manifest.jsonl", self._manifest(cycle))
        barrier()
        with self._stage(f"{_name(cycle)}/sft") as folder:
            options = em.sft(cycles=[cycle])
            trained = self._train(folder, self._manifest(cycle), options, seed, pool)
        self.summary["cycles"].append(
            {
                "cycle": cycle,
                "assign": {k: assigned[k] for k in ("initial_loss", "best_loss", "losses")},
                "sft": {k: trained[k] for k in ("matched_loss_before", "matched_loss_after")},
                "failed": assigned["failed"],
                "truncated_prompts": assigned["truncated_prompts"],
            }
        )

    def _manifest(self, cycle: int) -> Path:
        """The pairs that a cycle trains on."""
        folder = self.folder / _name(cycle)
        if cycle > 1 and self.command.em.assign_fraction < 1:
            return folder / "manifest.jsonl"
        return folder / "assign" / "manifest.jsonl"

    def _finish(self, settings: dict[str, Any]) -> None:
        """Choose the best cycle, link checkpoints, write summary and failures."""
        noise, cycles = self.summary["random_noise"], self.summary["cycles"]
        last = len(cycles)
        noise["final"] = noise[_name(last)]
        # Without a classifier nothing here tells better from worse, so the last one is taken.
        best = min(
            range(1, last + 1), key=lambda k: (noise[_name(k)].get("frechet_distance", 0.0), -k)
        )
        for name, cycle in (("best", best), ("final", last)):
            link = self.folder / f"checkpoint-{name}"
            link.unlink(missing_ok=True)
            link.symlink_to(Path(_name(cycle)) / "sft" / "checkpoint-final")
        folders = [f"{_name(last)}/assign", "heldout-base"]
        failures = [r for f in folders for r in mend_jsonl(self.folder / f / "failures.jsonl")]
        write_jsonl(self.folder / "failures.jsonl", failures)
        history = mend_jsonl(self.folder / "history.jsonl")
        self.summary |= {
            "best_cycle": best,
            "failed": len(failures),
            "seconds": round(sum(row["seconds"] for row in history), 1),
            "settings": settings,
        }
        write_json(self.folder / "summary.json", self.summary)


def _name(cycle: int) -> str:
    return f"cycle-{cycle:02d}"
