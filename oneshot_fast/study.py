"""`python -m oneshot_fast.study`: compare ways to assign noise by the trainings they give."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from oneshot_fast.cli import OK, run_command
from oneshot_fast.errors import require

Name = Literal["digits", "shapes"]


@dataclass(frozen=True)
class StudyCommand:
    """Train small generators on noises assigned in every way, with equal compute, and compare.

    Finished parts are kept: an interrupted study goes on when the same command is repeated.
    """

    output_dir: Path = Path("runs/study")
    """Folder of models, measures, table (study.md) and plots."""
    quick: bool = False
    """A few trainings of short-lived models, in 3 minutes: shows that it runs, proves nothing."""
    datasets: tuple[Name, ...] = ("digits", "shapes")
    """Generators to study."""
    seeds: int = 3
    """Trainings per method."""
    budget: int = 192
    """Generator evaluations per target and training, assignment included; a backward pass counts
    two."""
    samples: int = 1000
    """Random noises per measure; there are five."""
    overwrite: bool = False
    """Delete what an earlier study left in output_dir."""


def execute(command: StudyCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    require(command.seeds >= 1, "seeds must be at least 1")
    require(command.samples >= 100, "samples must be at least 100")
    require(command.budget >= 130, "budget must be at least 130")
    if command.quick:
        command = dataclasses.replace(command, seeds=1, samples=200)

    from oneshot_fast.recipes.study.tables import write_study
    from oneshot_fast.runtime.folder import RunFolder

    settings = {"command": "study", **dataclasses.asdict(command)}
    for key in ("output_dir", "overwrite", "datasets"):
        del settings[key]
    outputs = ("digits", "shapes", "study.md", "study.json", "plots")
    with RunFolder(command.output_dir, settings, outputs, command.overwrite):
        found: dict[str, Any] = {name: study(command, name) for name in command.datasets}
        write_study(command.output_dir, found, settings)
    print(f"table and plots: {command.output_dir / 'study.md'}")
    return OK


def study(command: StudyCommand, name: str) -> dict[str, Any]:
    """All results of one generator."""
    from oneshot_fast.recipes.study.cells import cells
    from oneshot_fast.recipes.study.run import kept, measured, reconstruction, speeds, train
    from oneshot_fast.recipes.study.subjects import Subject

    folder = command.output_dir / name
    subject = Subject(name, folder, command.quick)
    base = subject.base()
    found: dict[str, Any] = {
        "real": kept(folder / "results" / "real.json", subject.real_quality),
        "base": kept(
            folder / "results" / "base.json",
            lambda: (
                measured(subject, base, command.samples)
                | {"reconstruction": reconstruction(subject, base)}
            ),
        ),
        "speeds": kept(
            folder / "results" / "speeds.json",
            lambda: speeds(subject, 10 if command.quick else 30, 16 if command.quick else 64),
        ),
        "cells": {},
    }
    for cell in cells(subject.recipe, command.quick):
        rows = []
        for seed in range(command.seeds):
            label = cell.name.replace(",", "").replace(" ", "-")
            print(f"[{name}] {cell.name}, seed {seed}", file=sys.stderr)
            rows.append(
                kept(
                    folder / "results" / f"{label}-{seed}.json",
                    lambda cell=cell, seed=seed, label=label: train(  # type: ignore[misc]
                        subject,
                        cell,
                        folder / "work" / f"{label}-{seed}",
                        seed=seed,
                        budget=command.budget,
                        samples=command.samples,
                    ),
                )
            )
        found["cells"][cell.name] = rows
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m oneshot_fast.study``."""
    return run_command("study", StudyCommand, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
