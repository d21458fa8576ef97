"""The main job by targets: assign a noise to every target, train on the pairs, repeat."""

import contextlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from oneshot_fast.data.manifests import merge_manifests
from oneshot_fast.data.records import Failure, Record
from oneshot_fast.errors import DamagedError, one_line, require
from oneshot_fast.evaluation.distances import HEADLINE, Verdict
from oneshot_fast.evaluation.features import load_features
from oneshot_fast.evaluation.heldout import measure_against
from oneshot_fast.evaluation.random_noise import (
    RandomNoiseMeasure,
    all_scores,
    classifier_for,
    compare,
    forget_other,
)
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.assign.run import BUCKET_STEP, AssignRun
from oneshot_fast.jobs.em.cycles import Cycles, name_of
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.jobs.em.schedule import turn
from oneshot_fast.jobs.em.trials import (
    FEWEST,
    MOST_JUDGES,
    Trial,
    follow,
    name_of_trial,
    run_trials,
    said_of_recipe,
    short,
    trained_on,
    winner,
)
from oneshot_fast.rewards import Setup, WeightedRewards
from oneshot_fast.runtime import files
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import barrier, is_main, main_first
from oneshot_fast.runtime.seeds import content_id, derived_seed
from oneshot_fast.training.losses.preserve import POOL
from oneshot_fast.training.trainer import BadStepsError

Data = Iterable[Record | Failure]
RECIPE = "recipe.json"


class EmRun(Cycles):
    """EM on pairs of prompts and images."""

    def __init__(
        self,
        generator: Generator,
        data: Data,
        folder: str | Path,
        options: EmOptions,
        *,
        heldout: Data = (),
        resize_mode: str = "crop",
        bucket_step: int = BUCKET_STEP,
        num_images: int = 16,
        compare_direct: bool = False,
        judge: WeightedRewards | None = None,
        setup: Setup | None = None,
        note: str = "",
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to align, in place; float32 weights.
            data: Targets, and what could not be read.
            folder: Where everything is written.
            options: How the steps alternate, and how each works.
            heldout: Pairs never trained on: what the generator is measured against, and assigned
                with the first and the last one. ``hold_out`` takes them from the data.
            resize_mode: "crop", "squash", "pad" or "bucket"; with buckets all is measured at the
                one size around which they are.
            bucket_step: What the sides of buckets are multiples of, pixels.
            num_images: Targets per E-step whose images are saved; -1 for all.
            compare_direct: Also train on random noise, with as many steps.
            judge: Rewards that are measured.
            note: Said when the run begins.
            setup: Where the models of ``options.features`` are, see ``load_features``.
            **more: As for ``Cycles``.

        Raises:
            UserError: If an option makes no sense, or the features cannot be loaded.
        """
        self.items, self.heldout_items = list(data), list(heldout)
        self.records, self.failures = _split(self.items)
        self.heldout, self.heldout_failures = _split(self.heldout_items)
        super().__init__(
            # of the list, so that a record which is mended later changes none of the measures
            generator,
            [item.prompt for item in self.items if item.prompt],
            folder,
            options,
            **more,
        )
        self.resize_mode, self.num_images = resize_mode, num_images
        self.bucket_step = bucket_step
        self.compare_direct, self.judge, self.note = compare_direct, judge, note
        heldout_prompts = [item.prompt for item in self.heldout_items if item.prompt]
        self.classifier = classifier_for(generator, [*self.prompts, *heldout_prompts])
        if self.heldout or self.options.features:
            self.features = load_features(self.options.features, generator, self.classifier, setup)
        if self.options.recipe:
            require(
                bool(self.heldout), "--recipe auto judges by held-out pairs, and there are none"
            )
            count = trained_on(self.options, len(self.records))
            require(
                count >= FEWEST,
                f"--recipe auto: its trials, a third of the effort, would train on {count} of "
                f"{len(self.records)} targets, fewer than {FEWEST}; leave it out, or give more "
                "targets, num_cycles or assign_steps",
            )
        if self.records:
            self.targets.warn_of_size(self.records[0].image_path)
        self.first()  # checks its options before any long work

    def describe(self) -> dict[str, Any]:
        return {
            "compare_direct": self.compare_direct,
            "judge": sorted(self.judge.weights) if self.judge is not None else [],
            "resize_mode": self.resize_mode,
            **({"bucket_step": self.bucket_step} if self.resize_mode == "bucket" else {}),
            "samples": len(self.items),
            "heldout": len(self.heldout_items),
        }

    def measure(self) -> RandomNoiseMeasure:
        if self.note and is_main():
            say(self.note)
        for name, listed, failures in (
            (f"{name_of(1)}/assign", self.records, self.failures),
            ("heldout-base", self.heldout, self.heldout_failures),
        ):
            with contextlib.suppress(DamagedError):  # made again when its turn comes
                self._assigner(listed, self.folder / name, failures=failures).look()
        more = self.measuring(scores=all_scores(None, self.judge))
        folder, made_of, pool = self.folder / "eval", content_id(*self.prompts), self.folder / POOL
        if not self.heldout:
            main_first(lambda: forget_other(folder, [made_of], pool))
            return RandomNoiseMeasure(self.prompts, self.noise_shape, **more)
        measure, self.summary["real"], _ = measure_against(  # assigning lists what cannot be read
            self.heldout, self.targets, self.generator, folder, self.resize_mode,
            made_of=[made_of], also=[pool], **more,
        )  # fmt: skip
        return measure

    def alternate(self, measure: RandomNoiseMeasure) -> None:
        """All cycles; held-out pairs are assigned before and after, then the baseline is trained.

        That is the same number of steps on the same targets, with random noise.
        """
        denoiser = self.generator.denoiser
        self._assign_heldout("base")
        if self.compare_direct or self.heldout:
            self.initial = {k: v.to("cpu", copy=True) for k, v in denoiser.state_dict().items()}
        if self.options.recipe:
            self._choose()
        super().alternate(measure)
        self._assign_heldout("final")
        if not self.compare_direct:
            return
        denoiser.load_state_dict(self.initial)
        options = self.options.sft("random", [row["cycle"] for row in self.summary["cycles"]])
        manifest = self.folder / name_of(1) / "assign" / "manifest.jsonl"
        self.train("direct", manifest, options, self.seed)
        self.evaluate(measure, "direct")

    def e_step(self, cycle: int, seed: int) -> tuple[Path, dict[str, Any]]:
        options, folder = self.options, self.folder / name_of(cycle) / "assign"
        previous = self._manifest(cycle - 1) if cycle > 1 else None
        run = self._assigner(
            _split(turn(self.items, cycle, options.assign_fraction))[0],
            folder,
            seed,
            cycle,
            failures=self.failures,
            previous=previous if options.warm_start else None,
        )
        assigned = self.complete(run)
        if previous is not None and options.assign_fraction < 1 and is_main():
            merge_manifests(previous, folder / "manifest.jsonl", self._manifest(cycle))
        barrier()
        return self._manifest(cycle), {
            "assign": {name: assigned[name] for name in ("initial_loss", "best_loss", "losses")},
            "failed": assigned["failed"],
            "truncated_prompts": assigned["truncated_prompts"],
            "cut_images": assigned["cut_images"],
        }

    def _choose(self) -> None:
        """Follow the best of short trainings; the decision is kept in recipe.json."""
        path, trials = self.folder / RECIPE, self.folder / "trials"
        if not path.exists():
            count = trained_on(self.options, len(self.items))
            seeds = [derived_seed(self.seed, "trial", place) for place in range(len(self.items))]
            order = sorted(range(len(self.items)), key=seeds.__getitem__)
            judges, _ = _split(self.items[k] for k in order[count : count + MOST_JUDGES])
            measure, _, _ = measure_against(
                [*self.heldout, *judges], self.targets, self.generator, trials / "eval",
                self.resize_mode, **self.measuring(),
            )  # fmt: skip
            self._measure_trial(measure, "base")
            chosen = [self.items[k] for k in sorted(order[:count])]
            tried = run_trials(self.options, partial(self._try, measure, chosen))
            best = winner(tried, self._between)
            if is_main():
                history = files.mend_jsonl(self.folder / "history.jsonl")
                took = [row["seconds"] for row in history if row["stage"].startswith("trials/")]
                found = {
                    "method": best.method,
                    "lr": best.lr,
                    "num_cycles": follow(self.asked, best.method, best.lr).num_cycles,
                    "trained_on": count,
                    "judged_by": len(self.heldout) + len(judges),
                    "seconds": round(sum(took), 1),
                    "trials": [trial.row for trial in tried],
                }
                files.write_json(path, found)
        barrier()
        self.summary["recipe"] = found = files.read_json(path)
        self.options = follow(self.asked, found["method"], found["lr"])
        if is_main():
            files.remove(trials)
            say(said_of_recipe(found))
        barrier()

    def _try(
        self, measure: RandomNoiseMeasure, items: list[Record | Failure], method: str, lr: float
    ) -> Verdict | str:
        """Train from the base on some of the targets, and judge; the base's weights come back.

        A verdict against the base, or why there is none.
        """
        folder, options = self.folder / "trials", short(self.asked, method, lr)
        name = name_of_trial(method, lr)
        if measure.kept(folder / "eval" / name) is None:
            assigner = self._assigner(_split(items)[0], folder / method, self.seed, options=options)
            self.complete(assigner)
            manifest, reason = folder / method / "manifest.jsonl", ""
            try:
                self.train(f"trials/{name}", manifest, options.sft(), self.seed)
                self._measure_trial(measure, name)
            except BadStepsError as error:
                reason = one_line(error)
            self._restore()
            if is_main():
                files.remove(folder / name)
            if reason:
                return reason
        found = compare(folder / "eval" / "base", folder / "eval" / name)
        return found.get(HEADLINE, "no held-out image has a prompt with two images")

    def _between(self, before: Trial, after: Trial) -> Verdict | None:
        """What one trial is against another, in pairs."""
        paths = (
            self.folder / "trials/eval" / name_of_trial(t.method, t.lr) for t in (before, after)
        )
        return compare(*paths).get(HEADLINE)

    def _restore(self) -> None:
        """The base's weights, in their type, also after a training that broke off."""
        denoiser = self.generator.denoiser
        if getattr(denoiser, "peft_config", None):
            denoiser.unload_lora()
        denoiser.to(next(iter(self.initial.values())).dtype)
        denoiser.load_state_dict(self.initial)

    def _measure_trial(self, measure: RandomNoiseMeasure, name: str) -> None:
        with self.stage(f"trials/eval/{name}") as path:
            main_first(lambda: measure.measure(self.generator, path))

    def first(self) -> AssignRun:
        return self._assigner(self.records, self.folder)

    def _assigner(
        self,
        data: Sequence[Record],
        folder: Path,
        seed: int = 0,
        cycle: int = 1,
        options: EmOptions | None = None,
        **more: Any,
    ) -> AssignRun:
        return AssignRun(
            self.generator,
            data,
            folder,
            (options or self.options).assign(cycle),
            seed=seed,
            resize_mode=self.resize_mode,
            bucket_step=self.bucket_step,
            batch_size=self.options.assign_batch_size,
            num_images=self.num_images,
            targets=self.targets,
            **more,
        )

    def _assign_heldout(self, name: str) -> None:
        if not self.heldout:
            return
        folder = self.folder / f"heldout-{name}"
        run = self._assigner(
            self.heldout, folder, self.seed, options=self.asked, failures=self.heldout_failures
        )
        result = self.complete(run)
        heldout = self.summary.setdefault("heldout", {"samples": result["samples"]})
        heldout[name] = {key: result[key] for key in ("initial_loss", "best_loss", "losses")}

    def _manifest(self, cycle: int) -> Path:
        """The pairs that a cycle trains on."""
        folder = self.folder / name_of(cycle)
        is_merged = cycle > 1 and self.options.assign_fraction < 1
        return (folder if is_merged else folder / "assign") / "manifest.jsonl"


def _split(items: Iterable[Record | Failure]) -> tuple[list[Record], list[Failure]]:
    found = list(items)
    return (
        [item for item in found if isinstance(item, Record)],
        [item for item in found if isinstance(item, Failure)],
    )
