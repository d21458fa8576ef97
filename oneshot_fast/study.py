"""`python -m oneshot_fast.study`: compare ways to assign noise by the trainings they give."""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from oneshot_fast.cli import OK, run_command
from oneshot_fast.errors import require

Name = Literal["digits", "shapes", "letters", "italics", "centred", "shapes64", "upright"]


@dataclass(frozen=True)
class StudyCommand:
    """Train small generators on noises assigned in every way, with equal compute, and compare.

    With --outcome the rows are whole runs of `em` and of what it is compared with, over several
    sets of targets, judged by a classifier that no training has seen. With --few_step they are
    trainings of the packaged teacher in 4 steps, and of the packaged one-step model: through the
    sampler's loop, and by the usual diffusion loss.

    Finished parts are kept: an interrupted study goes on when the same command is repeated.
    """

    output_dir: Path = Path("runs/study")
    """Folder of models, measures, table (study.md, outcome.md, few_step.md) and plots."""
    outcome: bool = False
    """Whole runs of em instead of single trainings."""
    few_step: bool = False
    """Matched pairs through the few-step loop against the usual diffusion loss."""
    quick: bool = False
    """A few trainings of short-lived models, in minutes: shows that it runs, proves nothing."""
    datasets: tuple[Name, ...] = ("digits", "shapes")
    """Generators to study; those of letters and shapes64 take most of an hour to train. italics
    and centred are targets in narrower styles for the first, upright for the other."""
    seeds: int = 3
    """Trainings per method, and with --outcome on each set of targets; with --few_step each seed
    has targets of its own."""
    data_seeds: int = 3
    """With --outcome: sets of targets."""
    budget: int = 192
    """Generator evaluations per target and training, assignment included; a backward pass counts
    two."""
    samples: int = 1000
    """Random noises per measure; there are five, with --few_step one."""
    overwrite: bool = False
    """Delete what an earlier study left in output_dir."""


def execute(command: StudyCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    require(command.seeds >= 1, "seeds must be at least 1")
    require(command.samples >= 100, "samples must be at least 100")
    require(command.budget >= 130, "budget must be at least 130")
    require(command.data_seeds >= 1, "data_seeds must be at least 1")
    require(not (command.outcome and command.few_step), "give one of --outcome and --few_step")
    unused = {"data_seeds": "without --outcome"}
    if command.outcome:
        unused = {"budget": "with --outcome"}
    elif command.few_step:
        unused = dict.fromkeys(("budget", "data_seeds", "datasets"), "with --few_step")
    for name, where in unused.items():
        require(
            getattr(command, name) == getattr(StudyCommand, name),
            f"--{name} has no effect {where}",
        )
    for name in ("seeds", "data_seeds", "samples") if command.quick else ():
        require(
            getattr(command, name) == getattr(StudyCommand, name),
            f"--{name} has no effect with --quick",
        )
    if command.quick:
        command = dataclasses.replace(command, seeds=1, data_seeds=1, samples=200)

    from oneshot_fast.recipes.study.few_step import SUBJECTS, few_step, write_few_step
    from oneshot_fast.recipes.study.outcome import outcomes, write_outcomes
    from oneshot_fast.recipes.study.run import study
    from oneshot_fast.recipes.study.tables import write_study
    from oneshot_fast.runtime.folder import RunFolder

    file = "few_step" if command.few_step else "outcome" if command.outcome else "study"
    kinds: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
        "study": (study, write_study, ("budget",)),
        "outcome": (outcomes, write_outcomes, ("data_seeds",)),
        "few_step": (few_step, write_few_step, ()),
    }
    run, write, more = kinds[file]
    given = {name: getattr(command, name) for name in ("quick", "seeds", *more, "samples")}
    settings = {"command": "study", **given} | ({} if file == "study" else {file: True})
    outputs = (*get_args(Name), *SUBJECTS, f"{file}.md", f"{file}.json", "plots")
    with RunFolder(command.output_dir, settings, outputs, command.overwrite):
        results: dict[str, Any] = {
            name: run(name, command.output_dir / name, **given)
            for name in (SUBJECTS if command.few_step else command.datasets)
        }
        write(command.output_dir, results, settings)
    print(f"results: {command.output_dir / file}.md")
    return OK


main = functools.partial(run_command, "study", StudyCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
