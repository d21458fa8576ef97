"""What a user gets: whole runs of `em` and of what it is compared with, over data and run seeds.

Every row trains on 96 targets. Those of ``BESIDE``, but for preserve losses, take as many
evaluations of the denoiser as the cycles of `em` with its defaults, or less, whose trials of a
recipe come on top. A classifier that no training has seen judges fresh noise against 1600 images
of the targets' distribution that are no targets: base and judge were trained on them, as on the
targets.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.records import Record
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.jobs.em.targets import EmRun
from oneshot_fast.jobs.em.trials import evaluations
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.recipes.study.run import kept
from oneshot_fast.recipes.study.subjects import Subject
from oneshot_fast.runtime.files import write_json, write_text
from oneshot_fast.runtime.ledger import say

TARGETS, HELD_OUT = 96, 48


@dataclass(frozen=True)
class Setting:
    """One run: a subject's base generator, some of its data, and a seed.

    Attributes:
        subject: Generator, judge and held-out images.
        targets: Pairs to train on.
        heldout: Pairs that `em` measures by.
        seed: Of the run.
        quick: Whether trainings are cut to almost nothing.
    """

    subject: Subject
    targets: Sequence[Record]
    heldout: Sequence[Record]
    seed: int
    quick: bool

    @classmethod
    def of(cls, subject: Subject, data_seed: int, seed: int, quick: bool) -> "Setting":
        """The targets and held-out pairs of a data seed are other ones for each."""
        count = 32 + 8 if quick else TARGETS + HELD_OUT
        pairs = subject.pairs(count, data_seed * count)
        at = 32 if quick else TARGETS
        return cls(subject, pairs[:at], pairs[at:], seed, quick)

    def em(self, **changes: Any) -> EmOptions:
        """Options of `em`, its defaults but for ``changes``; quick ones take few steps."""
        if self.quick:
            changes |= {"assign_steps": 5, "train_epochs": 2}
        return EmOptions(**changes)

    @property
    def evaluations(self) -> float:
        """Of the denoiser per target, which `em` takes with its defaults."""
        options = self.em().resolve(64)
        each = evaluations(options.assign()) + 3 * options.sft().epochs
        return len(options.schedule()) * each


Row = Callable[[Setting, Path], tuple[Generator, dict[str, Any]]]


def _em(**changes: Any) -> Row:
    def run(setting: Setting, folder: Path) -> tuple[Generator, dict[str, Any]]:
        generator = setting.subject.base()
        job = EmRun(
            generator, setting.targets, folder, setting.em(**changes), heldout=setting.heldout,
            seed=setting.seed, eval_samples=20 if setting.quick else 300, num_images=0,
            save_minutes=1e9,
        )  # fmt: skip
        summary = job.run()
        best = folder / "checkpoint-best"
        generator.load_weights(best)
        found = {key: summary.get(key) for key in ("best_cycle", "recipe", "seconds")}
        return generator, found

    return run


def _rotation(setting: Setting, folder: Path) -> tuple[Generator, dict[str, Any]]:
    """The reference workflow's assignment, Adam on one skew matrix, with em's cycles."""
    recipe = setting.subject.recipe
    changes = {
        "assign_method": "rotation",
        "rotation_optimizer": "raw_adam",
        "assign_lr": 5e-4,
        "assign_lr_unit": "matrix",
        "patch_size": recipe.patch_size,
        "max_angle": None,
    }
    return _em(**changes)(setting, folder)


def _direct(setting: Setting, folder: Path) -> tuple[Generator, dict[str, Any]]:
    """Training on random noise."""
    return _on_random_noise(setting, setting.targets, folder, setting.evaluations)


def _self_training(setting: Setting, folder: Path) -> tuple[Generator, dict[str, Any]]:
    """As RAFT does: on the generator's own images, of 32 that which is nearest to each target."""
    search = AssignOptions("best_of_n", 2 if setting.quick else 32)
    AssignRun(
        setting.subject.base(), setting.targets, folder / "search", search, seed=setting.seed,
        num_images=-1,
    ).run()  # fmt: skip
    pairs, _ = read_manifest(folder / "search" / "manifest.jsonl")
    images = [folder / "search" / "images" / f"{pair.id}-assigned.png" for pair in pairs]
    own = [
        dataclasses.replace(record, image_path=image)
        for record, image in zip(setting.targets, images, strict=True)
    ]
    left = setting.evaluations - evaluations(search)
    return _on_random_noise(setting, own, folder, left)


def _on_random_noise(
    setting: Setting, targets: Sequence[Record], folder: Path, budget: float
) -> tuple[Generator, dict[str, Any]]:
    generator = setting.subject.base()
    lr = EmOptions().resolve(generator.width).train_lr
    assert lr is not None
    AssignRun(  # of which only the pairs are used
        generator, targets, folder / "pairs", AssignOptions("best_of_n", 1), seed=setting.seed,
        num_images=0,
    ).run()  # fmt: skip
    pairs, _ = read_manifest(folder / "pairs" / "manifest.jsonl")
    options = SftOptions(
        epochs=max(1, round(budget / 3)), batch_size=8, lr=lr, lr_scheduler="linear",
        preserve_latent_weight=0, preserve_pixel_weight=0, noise="random",
    )  # fmt: skip
    run = SftRun(
        generator, pairs, folder / "sft", options, targets=TargetImages(generator),
        seed=setting.seed, save_minutes=1e9,
    )  # fmt: skip
    run.run()
    return generator, {}


ROWS: Mapping[str, Row] = {"em, its defaults": _em(recipe="auto")}
BESIDE: Mapping[str, Row] = {  # on each set of targets, with the first seed
    "em, sphere": _em(),
    "em, 2 cycles of 40 steps and 10 epochs": _em(num_cycles=2, assign_steps=40, train_epochs=10),
    "em, best of 32": _em(assign_method="best_of_n"),
    "em, usual rotation": _rotation,
    "direct SFT": _direct,
    "self-training": _self_training,
    "em, sphere without a bound": _em(max_angle=None),
    "em, preserve losses": _em(preserve_latent_weight=0.5, preserve_pixel_weight=0.05),
}


def outcomes(
    name: str, folder: Path, *, quick: bool, data_seeds: int, seeds: int, samples: int
) -> dict[str, Any]:
    """All runs of one subject, each kept as it is finished: "real", "base", and lists by row.

    Args:
        name: Of ``SUBJECTS``.
        folder: For models, data and results.
        quick: Whether all is cut to almost nothing.
        data_seeds: Sets of targets and held-out pairs.
        seeds: Runs on each.
        samples: Random noises per measure; there are five.
    """
    subject = Subject(name, folder, quick)

    def trained(row: str, data_seed: int, seed: int) -> dict[str, Any]:
        label = f"{row.replace(',', '').replace(' ', '-')}-{data_seed}-{seed}"
        return kept(folder / "outcome" / f"{label}.json", lambda: run(row, data_seed, seed, label))

    def run(row: str, data_seed: int, seed: int, label: str) -> dict[str, Any]:
        say(f"[{name}] {row}, data {data_seed}, seed {seed}")
        setting, work = Setting.of(subject, data_seed, seed, quick), folder / "work" / label
        generator, found = {**ROWS, **BESIDE}[row](setting, work)
        judged = subject.judged(generator, samples)
        shutil.rmtree(work)
        return {"data_seed": data_seed, "seed": seed, **judged, **found}

    base = kept(folder / "outcome" / "base.json", lambda: subject.judged(subject.base(), samples))
    real = kept(folder / "outcome" / "real.json", subject.judged_real)
    rows: dict[str, list[dict[str, Any]]] = {row: [] for row in (*ROWS, *BESIDE)}
    for seed in range(seeds):
        for data_seed in range(data_seeds):
            for row in ROWS if seed else rows:
                rows[row].append(trained(row, data_seed, seed))
    return {"real": real, "base": base, "rows": rows}


def write_outcomes(folder: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write outcome.json, and outcome.md with a table per subject."""
    write_json(folder / "outcome.json", {"settings": settings, "results": found})
    lines = [f"Settings: {', '.join(f'{k} {v}' for k, v in settings.items() if k != 'command')}."]
    for name, results in found.items():
        lines += ["", f"## {name}", "", *outcome_table(**results)]
    write_text(folder / "outcome.md", "\n".join(lines) + "\n")


def outcome_table(
    real: Mapping[str, float],
    base: Mapping[str, Any],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[str]:
    """Markdown: mean change against the base, its 95 % interval, and the worst run's.

    The intervals are Student's, of the means of each set of targets.
    """
    lines = [
        "| training | FD to base | worst run | accuracy | diversity | base kept |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| real images | | | {real['accuracy']:.3f} | {real['diversity']:.3f} | |",
        f"| base model: {base['frechet_distance']:.2f} | | | {base['accuracy']:.3f} | "
        f"{base['diversity']:.3f} | |",
    ]
    for name, runs in rows.items():
        change = [100 * (run["frechet_distance"] / base["frechet_distance"] - 1) for run in runs]
        sets = [run["data_seed"] for run in runs]
        cells = [interval(change, sets, "{:+.0f}") + " %", f"{max(change):+.0f} %"]
        for key in ("accuracy", "diversity"):
            cells.append(interval([run[key] - base[key] for run in runs], sets, "{:+.3f}"))
        kept = sum(run["best_cycle"] == 0 for run in runs if "best_cycle" in run)
        cells.append(f"{kept} of {len(runs)}" if "best_cycle" in runs[0] else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def interval(values: Sequence[float], sets: Sequence[int], digits: str) -> str:
    """Mean and Student's 95 % interval, of the means of each of ``sets``, in this format."""
    groups = {k: [v for v, of in zip(values, sets, strict=True) if of == k] for k in sets}
    means = [fmean(group) for group in groups.values()]
    text = digits.format(fmean(means))
    if len(means) < 2:
        return text
    half = student.ppf(0.975, len(means) - 1) * stdev(means) / len(means) ** 0.5
    return f"{text} ± {digits.format(half).lstrip('+')}"
