"""Generators measured on the same fresh noises against held-out images, into one folder."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from oneshot_fast.data.images import save_png, tile
from oneshot_fast.data.records import Failure, Record
from oneshot_fast.data.sizes import Resolution, size_fields
from oneshot_fast.errors import require
from oneshot_fast.evaluation.distances import said
from oneshot_fast.evaluation.features import Features, load_features
from oneshot_fast.evaluation.heldout import measure_against
from oneshot_fast.evaluation.random_noise import (
    RandomNoiseMeasure,
    all_scores,
    classifier_for,
    compare,
    shown,
)
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.planning.memory import parameter_lines, peak_lines
from oneshot_fast.planning.timing import Plan, shortest
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.rewards.base import Setup
from oneshot_fast.runtime.files import read_json, write_json, write_jsonl
from oneshot_fast.runtime.folder import RunFolder
from oneshot_fast.runtime.processes import is_main, kept_by_main, main_first
from oneshot_fast.runtime.progress import Tracker, start_tracking
from oneshot_fast.runtime.seeds import content_id, gaussian
from oneshot_fast.runtime.units import duration

Model = Generator | Callable[[], Generator]
_OUTPUTS = ("eval", "logs", "failures.jsonl", "summary.json", "comparison.png", "report.html")


class EvaluateRun:
    """Measures of generators, each also in pairs with the first."""

    def __init__(
        self,
        models: Mapping[str, Model],
        data: Iterable[Record | Failure],
        folder: str | Path,
        *,
        features: str | None = None,
        judge: WeightedRewards | None = None,
        setup: Setup | None = None,
        eval_samples: int = 500,
        resolution: Resolution | None = None,
        resize_mode: str = "crop",
        seed: int = 0,
    ) -> None:
        """Describe the run.

        Args:
            models: Generators by name, or what loads them: then one at a time is in memory, beside
                the first where its VAE is the judge.
            data: Held-out pairs: none of the generators was trained on them.
            folder: Where everything is written.
            features: What images are compared by, see ``load_features``.
            judge: Rewards that are measured, too.
            setup: Where the features' models are, see ``load_features``.
            eval_samples: Fresh noises, the same ones for all.
            resolution: Image side in pixels, or height and width; by default the first
                generator's own.
            resize_mode: "crop", "squash" or "pad".
            seed: Of the noises.

        Raises:
            UserError: If an option makes no sense, or a model or the features cannot be loaded.
        """
        require(bool(models), "there is no generator to evaluate")
        require(
            resize_mode != "bucket",
            "images are compared at one size; use resize_mode crop, squash or pad",
        )
        require(eval_samples >= 10, "eval_samples must be at least 10")
        self.models, self.items, self.folder = dict(models), list(data), Path(folder)
        self.judge, self.resize_mode, self.seed = judge, resize_mode, seed
        self.eval_samples = eval_samples
        name = next(iter(self.models))
        first = self.models[name] = self.generator(name)  # loaded once
        self.targets = TargetImages(first, resolution)
        self.noise_shape = first.noise_shape(*self.targets.size)
        prompts = [item.prompt for item in self.items if item.prompt]
        self.classifier = classifier_for(first, prompts)
        self.features: Features = load_features(features, first, self.classifier, setup)
        self.first, self.device = first, first.device

    def generator(self, name: str) -> Generator:
        """One of the generators; loads it if it is to be loaded."""
        model = self.models[name]
        return model if isinstance(model, Generator) else model()

    def settings(self) -> dict[str, Any]:
        """Everything the result depends on."""
        return {
            "command": "evaluate",
            "models": {name: self._fingerprint(name) for name in self.models},
            "features": self.features.name,
            "judge": sorted(self.judge.weights) if self.judge is not None else [],
            "eval_samples": self.eval_samples,
            "seed": self.seed,
            **size_fields(self.targets.size),
            "resize_mode": self.resize_mode,
            "device": self.device.type,
            "samples": len(self.items),
            "data": content_id(*(item.id for item in self.items)),
        }

    def _fingerprint(self, name: str) -> str:
        generator = self.generator(name)
        shape = generator.noise_shape(*self.targets.size)
        require(
            shape == self.noise_shape,
            f"{name} takes noises {list(shape)}, the first model {list(self.noise_shape)}: they "
            "cannot be compared on the same noises; evaluate them apart",
        )
        return generator.fingerprint()

    @torch.no_grad()
    def plan(self) -> Plan:
        """What the run will need, from a few images of the first model; does nothing of it."""
        name = next(iter(self.models))
        generator = self.generator(name)
        noise = gaussian([0], self.noise_shape).to(generator.device)
        blank = generator.blank_prompts(1).to(generator.device)
        seconds = shortest(
            lambda: self.features.of(generator.decode(generator.latents(noise, blank))).cpu()
        )
        needed = len(self.models) * self.eval_samples * seconds
        lines = [
            *parameter_lines(generator.networks),
            *peak_lines(generator.device),
            f"features: {self.features.name}",
            f"time: {duration(seconds)} per image of {name}",
            f"in all, for {len(self.models)} models of {self.eval_samples} images each: "
            f"{duration(needed)}, without loading",
        ]
        return Plan(lines, needed)

    def run(
        self, *, overwrite: bool = False, report_to: str | Tracker = "none", verify: bool = False
    ) -> dict[str, Any]:
        """Measure what has no result yet; returns the summary, as in summary.json."""
        settings = self.settings()
        folder = RunFolder(self.folder, settings, _OUTPUTS, overwrite, verify)
        with kept_by_main(folder):
            tracker, started = start_tracking(report_to, self.folder, settings), time.perf_counter()
            measure, summary = self._measure()
            paths = {name: self.folder / "eval" / stage for name, stage in self.stages.items()}
            for name, path in paths.items():
                part = tracker.part(path.name)
                summary["models"][name] = self._measured(measure, name, path, part)
            tracker.finish()
            first = next(iter(paths.values()))
            summary["verdicts"] = {
                name: said(compare(first, path)) for name, path in paths.items() if path != first
            }
            old = self.folder / "summary.json"
            seconds = read_json(old)["seconds"] if old.exists() else 0.0
            summary["seconds"] = round(max(seconds, time.perf_counter() - started), 1)
            if is_main() and folder.is_writable:
                rows = [shown(path) for path in paths.values()]
                save_png(self.folder / "comparison.png", tile(torch.cat(rows), len(rows[0])))
                write_json(self.folder / "summary.json", summary | {"settings": settings})
        return dict(read_json(self.folder / "summary.json"))

    @property
    def stages(self) -> dict[str, str]:
        """Name of each model's files in eval/."""
        return {name: "base" if k == 0 else f"model-{k + 1}" for k, name in enumerate(self.models)}

    def _measure(self) -> tuple[RandomNoiseMeasure, dict[str, Any]]:
        """What generators are measured by, and what the summary says of the real images."""
        records = [item for item in self.items if isinstance(item, Record)]
        failures = [item for item in self.items if isinstance(item, Failure)]
        measure, real, reasons = measure_against(
            records,
            self.targets,
            self.first,
            self.folder / "eval",
            self.resize_mode,
            samples=self.eval_samples,
            seed=self.seed,
            classifier=self.classifier,
            features=self.features,
            scores=all_scores(None, self.judge),
        )
        failures += [
            Failure(reason, records[k].line, records[k].id, records[k].prompt, records[k].image)
            for k, reason in reasons.items()
        ]
        if is_main():
            write_jsonl(self.folder / "failures.jsonl", [failure.row for failure in failures])
        return measure, {
            "models": {},
            "stages": self.stages,
            "real": real,
            "measured_by": measure.described,
            "failed": len(failures),
        }

    def _measured(
        self, measure: RandomNoiseMeasure, name: str, path: Path, tracker: Tracker
    ) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            return measure.kept(path) or measure.measure(self.generator(name), path)

        result = main_first(make)
        tracker.log(result, 0)
        tracker.images([path.with_name(path.name + ".png")], 0)
        return result
