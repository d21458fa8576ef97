"""The study's runs: every training, its measures, and how fast each method lowers the loss."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.objective import MatchingObjective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.jobs.assign.targets import Preparer, problem_of
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.noise.diagnose import diagnose
from oneshot_fast.recipes.study.cells import Cell, cells
from oneshot_fast.recipes.study.subjects import Subject
from oneshot_fast.runtime.files import read_json, write_json
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.seeds import derived_seed
from oneshot_fast.search.gradient import Search

_KEPT = ("mean noise", "mean patch", "patch covariance", "nearest noises")
RECONSTRUCTION = AssignOptions(steps=20, sphere_optimizer="adam")


def study(
    name: str, folder: Path, *, quick: bool, seeds: int, budget: int, samples: int
) -> dict[str, Any]:
    """All results of one generator, "digits" or "shapes"; each is kept as it is finished.

    Args:
        name: Of the two.
        folder: For models, targets and results.
        quick: Few and short trainings.
        seeds: Trainings per cell.
        budget: Generator evaluations per target and training.
        samples: Random noises per measure.
    """
    subject, results = Subject(name, folder, quick), folder / "results"
    base = subject.base()

    def trained(cell: Cell, seed: int) -> dict[str, Any]:
        say(f"[{name}] {cell.name}, seed {seed}")
        label = f"{cell.name.replace(',', '').replace(' ', '-')}-{seed}"
        work = folder / "work" / label
        return kept(
            results / f"{label}.json",
            lambda: train(subject, cell, work, seed=seed, budget=budget, samples=samples),
        )

    return {
        "real": kept(results / "real.json", subject.real_quality),
        "base": kept(
            results / "base.json",
            lambda: (
                measured(subject, base, samples) | {"reconstruction": reconstruction(subject, base)}
            ),
        ),
        "speeds": kept(results / "speeds.json", lambda: speeds(subject, quick)),
        "cells": {
            cell.name: [trained(cell, seed) for seed in range(seeds)]
            for cell in cells(subject.recipe, quick)
        },
    }


def kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON at ``path``; where it is not there yet, what ``compute`` gives is written first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, compute())
    return dict(read_json(path))


def measured(subject: Subject, generator: Generator, samples: int) -> dict[str, Any]:
    """Quality on five sets of random noises, mean and deviation of the Frechet distance."""
    rows = [subject.quality(generator, samples, seed) for seed in range(5)]
    result: dict[str, Any] = {key: sum(row[key] for row in rows) / 5 for key in rows[0]}
    distances = torch.tensor([row["frechet_distance"] for row in rows])
    return result | {"noise": distances.std().item(), "frechet_distances": distances.tolist()}


def train(
    subject: Subject, cell: Cell, folder: Path, *, seed: int, budget: int, samples: int
) -> dict[str, Any]:
    """Train from the base model as ``cell`` says and measure the result on ``samples`` noises.

    The E- and M-steps run in ``folder``, which is removed in the end; ``budget`` is in generator
    evaluations per target, assignment included.
    """
    generator = subject.base()
    targets = TargetImages(generator)
    result: dict[str, Any] = {"nfe": 0.0, "matched_loss": None}
    for cycle in range(cell.cycles):
        noises = derived_seed(seed, cycle) if cell.new_noise else seed
        # without an E-step the pairs still need some noise, which is not used
        options = cell.assign or AssignOptions("best_of_n", 1)
        found = AssignRun(
            generator, subject.records, folder / f"assign-{cycle}", options, seed=noises,
            num_images=0, batch_size=64, targets=targets,
        ).run()  # fmt: skip
        pairs, _ = read_manifest(folder / f"assign-{cycle}" / "manifest.jsonl")
        trained = SftRun(
            generator, pairs, folder / f"sft-{cycle}", cell.training(budget), seed=noises,
            targets=targets, save_minutes=1e9,
        ).run()  # fmt: skip
        if cell.assign is not None:
            result["nfe"] += found["nfe"]
            result["matched_loss"] = found["best_loss"]
            checks = diagnose(folder / f"assign-{cycle}")["checks"]
            result["typicality"] = {c["name"]: c for c in checks if c["name"] in _KEPT}
        result["nfe"] += 3 * cell.training(budget).epochs * (2 if cell.preserve else 1)
        result["steps"] = result.get("steps", 0) + trained["steps"]
    result |= measured(subject, generator, samples)
    result["reconstruction"] = reconstruction(subject, generator)
    shutil.rmtree(folder)
    return result


def reconstruction(subject: Subject, generator: Generator) -> float:
    """Mean loss of held-out images after a short assignment with this generator."""
    return sum(curve(generator, RECONSTRUCTION, subject.heldout)[-1:])


def curve(generator: Generator, options: AssignOptions, records: Sequence[Any]) -> list[float]:
    """Mean over the records of the best loss so far, after every step."""
    preparer = Preparer(generator, TargetImages(generator), options, seed=0, resize_mode="crop")
    problem = problem_of(preparer.prepare([*enumerate(records)])[0])
    losses = Search(problem, options, MatchingObjective(generator, options)).run().losses
    return losses.cummin(0).values.mean(1).tolist()


def speeds(subject: Subject, quick: bool) -> dict[str, list[float]]:
    """Loss curves of the gradient methods: at several fixed step sizes and with ``lr auto``."""
    recipe = subject.recipe
    steps, count = (4, 4) if quick else (30, 64)
    methods: dict[str, dict[str, Any]] = {
        "rotation, raw Adam": {"method": "rotation", "rotation_optimizer": "raw_adam"},
        "rotation, Riemannian": {"method": "rotation"},
        "sphere": {"method": "sphere", "sphere_optimizer": "adam"},
        "sphere, L-BFGS": {"method": "sphere"},
        "white": {"method": "white", "sphere_optimizer": "adam"},
        "white, L-BFGS": {"method": "white"},
    }
    if recipe.tiles > 1:
        for tiles in (2, recipe.tiles):
            name = f"rotation, Riemannian, {tiles} x {tiles} tiles"
            methods[name] = {"method": "rotation", "rotation_groups": tiles}
    base, found = subject.base(), {}
    for name, changes in methods.items():
        fixed = (0.05, 0.4) if quick else (0.05, 0.1, 0.2, 0.4, 0.8)
        rates: list[float | Literal["auto"]] = [*fixed, "auto"]
        if "raw" in name:
            rates.insert(0, recipe.usual_step)
        for lr in rates:
            options = AssignOptions(steps=steps, patch_size=recipe.patch_size, lr=lr, **changes)
            label = "usual" if lr == recipe.usual_step else lr
            found[f"{name} | {label}"] = curve(base, options, subject.records[:count])
    return found
