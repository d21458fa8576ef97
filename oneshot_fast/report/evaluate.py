"""The page of ``python -m oneshot_fast.evaluate``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oneshot_fast.report.measures import answer, measures_table, noises_strip, print_measures
from oneshot_fast.report.page import Section, picture, write_run
from oneshot_fast.runtime.files import Json, read_json

_GRID_SIDE = 1280


def write_evaluate_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write report.html of the finished ``EvaluateRun`` in ``folder``."""
    summary = read_json(folder / "summary.json")
    names = [*summary["models"]]
    sections = [_answers(folder, summary), *(_table(folder, summary, name) for name in names[1:])]
    if len(names) == 1:
        sections.append(_table(folder, summary, names[0]))
    facts = [f"{len(names)} models", f"{summary['models'][names[0]]['samples']} noises"]
    facts.append(f"{summary['measured_by']['real']} held-out images")
    title = "Evaluation on fresh noise, against {data}"
    write_run(folder, title, facts, sections, summary, flags)


def _answers(folder: Path, summary: Json) -> Section:
    names, by = [*summary["models"]], summary["measured_by"]
    text = [
        line
        for name in names[1:]
        for line in answer(_short(summary, name), _said(summary, name), by)
    ]
    if len(names) == 1:
        text = [f"One model; images are compared by {by['features']}."]
    else:
        text = [f"The base is {names[0]}.", *text]
    strip = noises_strip(
        {_short(summary, name): _path(folder, summary, name) for name in names}, by["prompts"]
    )
    title = "Which is better?" if len(names) > 1 else "What it makes"
    return Section(title, text, strip=strip)


def _table(folder: Path, summary: Json, name: str) -> Section:
    first = next(iter(summary["models"]))
    key = summary["stages"][name]  # the name may be "base" or "real"
    measured = {"base": summary["models"][first], key: summary["models"][name]}
    measured |= {"real": summary["real"]}
    columns = {"base": _short(summary, first)} | (
        {} if name == first else {key: _short(summary, name)}
    )
    columns |= {"real": "real images"}
    table = measures_table(columns, measured, key, _said(summary, name))
    shown = dict.fromkeys((first, name))
    grids = [picture(_grid(folder, summary, n), _GRID_SIDE, _short(summary, n)) for n in shown]
    text = ["Mean ± standard error by bootstrap over images; changes on the same noises."]
    return Section(f"Measures: {_short(summary, name)}", text, table, grids)


def _said(summary: Json, name: str) -> Mapping[str, Mapping[str, Any]] | None:
    return summary["verdicts"].get(name)


def _path(folder: Path, summary: Json, name: str) -> Path:
    return folder / "eval" / summary["stages"][name]


def _grid(folder: Path, summary: Json, name: str) -> Path:
    path = _path(folder, summary, name)
    return path.with_name(f"{path.name}.png")


def _short(summary: Json, name: str) -> str:
    """The end of a model's name, or all of it where another ends alike."""
    ends = ["/".join(Path(other).parts[-2:]) for other in summary["models"]]
    end = "/".join(Path(name).parts[-2:])
    return end if ends.count(end) == 1 else name


def print_summary(summary: Json, folder: Path) -> None:
    """Say which is better, what was measured and where it is."""
    names, by = [*summary["models"]], summary["measured_by"]
    print(f"on {summary['models'][names[0]]['samples']} random noises:")
    columns = {_short(summary, name): summary["models"][name] for name in names}
    print_measures(columns | {"real images": summary["real"]})
    for name in names[1:]:
        print(
            "\n"
            + "\n".join(answer(_short(summary, name), _said(summary, name), by))
            .replace("→", "->")
            .replace("é", "e")
        )
    print(f"\npictures: {folder / 'comparison.png'}")
