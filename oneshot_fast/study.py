"""`python -m oneshot_fast.study`: compare ways to assign noise by the trainings they give."""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from oneshot_fast.cli import OK, run_command
from oneshot_fast.errors import require

Name = Literal["digits", "shapes", "letters"]


@dataclass(frozen=True)
class StudyCommand:
    """Train small generators on noises assigned in every way, with equal compute, and compare.

    With --outcome the rows are whole runs of `em` and of what it is compared with, over several
    sets of targets, judged by a classifier that no training has seen.

    Finished parts are kept: an interrupted study goes on when the same command is repeated.
    """

    output_dir: Path = Path("runs/study")
    """Folder of models, measures, table (study.md, outcome.md) and plots."""
    outcome: bool = False
    """Whole runs of em instead of single trainings."""
    quick: bool = False
    """A few trainings of short-lived models, in minutes: shows that it runs, proves nothing."""
    datasets: tuple[Name, ...] = ("digits", "shapes")
    """Generators to study; letters takes hours, most of them for its generator."""
    seeds: int = 3
    """Trainings per method, and with --outcome on each set of targets."""
    data_seeds: int = 3
    """With --outcome: sets of targets."""
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
    require(command.data_seeds >= 1, "data_seeds must be at least 1")
    for name in ("data_seeds",) if not command.outcome else ("budget",):
        require(
            getattr(command, name) == getattr(StudyCommand, name),
            f"--{name} has no effect {'with' if command.outcome else 'without'} --outcome",
        )
    for name in ("seeds", "data_seeds", "samples") if command.quick else ():
        require(
            getattr(command, name) == getattr(StudyCommand, name),
            f"--{name} has no effect with --quick",
        )
    if command.quick:
        command = dataclasses.replace(command, seeds=1, data_seeds=1, samples=200)

    from oneshot_fast.recipes.study.outcome import outcomes, write_outcomes
    from oneshot_fast.recipes.study.run import study
    from oneshot_fast.recipes.study.tables import write_study
    from oneshot_fast.runtime.folder import RunFolder

    names = ("quick", "seeds", "data_seeds" if command.outcome else "budget", "samples")
    given: dict[str, Any] = {name: getattr(command, name) for name in names}
    settings = {"command": "study", **given} | ({"outcome": True} if command.outcome else {})
    file = "outcome" if command.outcome else "study"
    outputs = ("digits", "shapes", "letters", f"{file}.md", f"{file}.json", "plots")
    run, write = (outcomes, write_outcomes) if command.outcome else (study, write_study)
    with RunFolder(command.output_dir, settings, outputs, command.overwrite):
        results: dict[str, Any] = {
            name: run(name, command.output_dir / name, **given) for name in command.datasets
        }
        write(command.output_dir, results, settings)
    print(f"results: {command.output_dir / file}.md")
    return OK


main = functools.partial(run_command, "study", StudyCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
