"""Training on pairs that is measured on fresh noise against held-out images as it goes."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.data.manifests import MatchedPair
from oneshot_fast.data.records import Record
from oneshot_fast.errors import require
from oneshot_fast.evaluation.distances import HEADLINE, Verdict, best_of, said
from oneshot_fast.evaluation.features import load_features
from oneshot_fast.evaluation.heldout import measure_against
from oneshot_fast.evaluation.random_noise import (
    RandomNoiseMeasure,
    all_scores,
    classifier_for,
    compare,
)
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.rewards import Setup, WeightedRewards
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main, main_first
from oneshot_fast.runtime.seeds import content_id
from oneshot_fast.training.checkpoints import STUDENT
from oneshot_fast.training.trainer import Trainer


class MeasuredSftRun(SftRun):
    """Training on matched pairs whose best checkpoint is the best on held-out images.

    That is the base where no epoch beat it. The summary's
    ``measured`` has what ``RandomNoiseMeasure`` says of each epoch, ``verdicts`` what it is against
    the base.
    """

    outputs = (*SftRun.outputs, "eval")

    def __init__(
        self,
        generator: Generator,
        pairs: Sequence[MatchedPair],
        folder: Path,
        options: SftOptions,
        *,
        heldout: Sequence[Record | MatchedPair],
        eval_every: int = 1,
        eval_samples: int = 64,
        features: str | None = None,
        judge: WeightedRewards | None = None,
        setup: Setup | None = None,
        note: str = "",
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to train, in place; float32 weights.
            pairs: Matched pairs.
            folder: Where everything is written.
            options: Losses and schedule.
            heldout: Pairs that are not among them.
            eval_every: Epochs from one measure to the next; the last is always measured.
            eval_samples: Fresh noises, the same ones every time.
            features: What images are compared by, see ``load_features``.
            judge: Rewards that are measured, too.
            note: Said when the training begins.
            setup: Where the features' models are, see ``load_features``.
            **more: As for ``SftRun``.

        Raises:
            UserError: If an option makes no sense, or the features cannot be loaded.
        """
        super().__init__(generator, pairs, folder, options, **more)
        require(eval_every >= 1, "eval_every must be at least 1")
        require(eval_samples >= 10, "eval_samples must be at least 10")
        require(bool(heldout), "eval_every needs held-out pairs: give --heldout_root or --heldout")
        self.heldout, self.eval_every, self.judge = list(heldout), eval_every, judge
        self.eval_samples, self.note = eval_samples, note
        self.needed_prompts = [pair.prompt for pair in heldout]
        self.classifier = classifier_for(generator, self.needed_prompts)
        self.features = load_features(features, generator, self.classifier, setup)
        if self.features.is_weak:
            self.offloads = False  # the VAE encodes what is made
        self._measured: dict[int, dict[str, Any]] = {}
        self._verdicts: dict[int, dict[str, Verdict]] = {}

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "eval_every": self.eval_every,
            "eval_samples": self.eval_samples,
            "features": self.features.name,
            "judge": sorted(self.judge.weights) if self.judge is not None else [],
            "heldout": content_id(*(pair.id for pair in self.heldout)),
        }

    @property
    def decodes(self) -> bool:
        return True

    @functools.cached_property
    def _measure(self) -> tuple[RandomNoiseMeasure, dict[str, Any]]:
        measure, real, reasons = measure_against(
            self.heldout,
            self.targets,
            self.generator,
            self.folder / "eval",
            self.pairs[0].resize_mode,
            samples=self.eval_samples,
            seed=self.seed,
            classifier=self.classifier,
            features=self.features,
            scores=all_scores(None, self.judge),
        )
        if reasons and is_main():
            first = next(iter(reasons.values()))
            say(f"{len(reasons)} held-out pairs cannot be read, the first: {first}")
        return measure, real

    def learn(self) -> dict[str, Any]:
        if self.note and is_main():
            say(self.note)
        measure, real = self._measure
        self._note(0)
        summary = super().learn()
        for epoch in self._epochs():  # of before an interruption, too
            if measure.kept(self.folder / "eval" / _name(epoch)) is not None:
                self._note(epoch)
        self._measured = dict(sorted(self._measured.items()))
        epochs = [epoch for epoch in self._measured if epoch]
        best = best_of([self._verdicts[epoch].get(HEADLINE) for epoch in epochs])
        return summary | {
            "best_epoch": epochs[best - 1] if best else 0,
            "measured": {_name(epoch): found for epoch, found in self._measured.items()},
            "verdicts": {_name(epoch): said(found) for epoch, found in self._verdicts.items()},
            "real": real,
            "measured_by": measure.described,
        }

    def trainer(self, name: str, steps: int) -> Trainer:
        """One whose best weights are the first ones, until an epoch is better."""
        trainer = super().trainer(name, steps)
        trainer.keep_best(math.inf)
        trainer.chooses = False
        return trainer

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        if epoch not in self._epochs():
            return {}
        trainer = self.trainers[STUDENT]
        with trainer.ended():
            found = self._note(epoch)
        verdict = self._verdicts[epoch].get(HEADLINE)
        if verdict is not None and best_of([verdict]) and verdict.after < trainer.best_loss:
            trainer.keep_best(verdict.after)
        return {name: value for name, value in found.items() if name not in ("samples", "errors")}

    def _epochs(self) -> list[int]:
        """After which epochs it is measured."""
        last = self.options.passes(self.per_epoch)
        return sorted({*range(self.eval_every, last + 1, self.eval_every), last})

    def _note(self, epoch: int) -> dict[str, Any]:
        """Measure the generator as it is after ``epoch``; 0 is the base."""
        measure, path = self._measure[0], self.folder / "eval" / _name(epoch)
        found = main_first(lambda: measure.measure(self.generator, path))
        self._measured[epoch] = found
        if epoch:
            self._verdicts[epoch] = compare(path.with_name("base"), path)
        return found


def _name(epoch: int) -> str:
    return f"epoch-{epoch:03d}" if epoch else "base"
