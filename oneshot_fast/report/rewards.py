"""What trainings on rewards raised, and what it cost: a section and a picture."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from oneshot_fast.report.page import (
    Cell,
    Mood,
    Plot,
    Row,
    Section,
    Table,
    gain_cell,
    number,
    percent,
    picture,
)
from oneshot_fast.report.plots import PALETTE, inline_svg, whole_numbers
from oneshot_fast.runtime.files import Json, read_json, read_jsonl, replacing
from oneshot_fast.runtime.units import decimals

History = Sequence[Mapping[str, Any]]
_GRID_SIDE = 1280
_OF_THE_STEPS = (
    "epoch", "samples", "errors", "step", "loss", "matching", "preserve", "gradient_norm",
)  # fmt: skip
_LAST = ("accuracy", "diversity", "drift")


def history(folder: Path) -> list[dict[str, Any]]:
    """What was measured in a finished run of ``RewardRun``, from epoch 0, the base."""
    base = read_json(folder / "summary.json")["base"]
    rows = [{"epoch": 0, **base}, *read_jsonl(folder / "history.jsonl")]
    return [{key: math.nan if v is None else v for key, v in row.items()} for row in rows]


def rewards_section(
    rows: History, text: str, grids: Mapping[str, Path], unit: str = "epoch"
) -> Section:
    """Rewards, judges, diversity and drift before and after, and over the epochs.

    Args:
        rows: Of ``history``.
        text: On what was measured.
        grids: Pictures by caption.
        unit: After what each row was measured.
    """
    plot = Plot(
        inline_svg(_draw)({"": rows}, unit, 2),
        f"Measured after each {unit}. Bad: a reward that rises while a judge or the diversity "
        f"falls, which is over-optimisation; take fewer {unit}s, or a larger preserve weight.",
    )
    table = Table(
        ("mean", "base", "final", "change"),
        [_row(name, rows[0][name], rows[-1][name]) for name in _measures(rows)],
    )
    pictures = [picture(path, _GRID_SIDE, name) for name, path in grids.items()]
    words = [text, *costs(rows, unit)]
    return Section("Rewards, and what they cost", words, table, pictures, plots=[plot])


def print_change(summary: Json) -> None:
    """Print what was measured, before and at the end."""
    for name, before in summary["base"].items():
        print(f"{name:24}{decimals(before):>10} -> {decimals(summary['final'][name])}")


def costs(rows: History, unit: str = "epoch") -> list[str]:
    """In words how the judges and the diversity fared; rows of ``history``."""
    found = []
    for name in _measures(rows):
        values = [row[name] for row in rows]
        if name.startswith("judge ") or name == "accuracy":
            turn = "fell" if values[-1] < values[0] else "did not fall"
            best = max(range(len(values)), key=values.__getitem__)
            when = f"after {unit} {rows[best]['epoch']}" if best else "before training"
            found.append(
                f"{name}, which was not trained on, {turn}: {number(values[0])} to "
                f"{number(values[-1])}; highest {when}."
            )
        if name == "diversity":
            change = percent(values[-1], values[0])
            found.append(f"The diversity within a prompt changed by {change}.")
    return found


def draw_histories(histories: Mapping[str, History], path: Path, unit: str = "epoch") -> None:
    """Write a PNG: every measure of ``history`` over the epochs, a line per named training."""
    with replacing(path) as temporary:
        _draw(histories, unit, 3).savefig(temporary, format="png", dpi=110)


def _measures(rows: History) -> list[str]:
    """Names of what was measured: rewards, judges, then what they cost."""
    names = [name for name in rows[0] if name not in (*_OF_THE_STEPS, *_LAST)]
    if len([name for name in names if not name.startswith("judge ")]) == 2:
        names.remove("reward")  # it is but the one there is, times its weight
    return [*names, *(name for name in _LAST if name in rows[0])]


def _row(name: str, base: float, final: float) -> Row:
    mood: Mood | None = "" if final == base or name == "drift" else None
    label = "weighted sum" if name == "reward" else name
    return Row(label, [Cell(number(base)), Cell(number(final)), gain_cell(base, final, mood)])


def _draw(histories: Mapping[str, History], unit: str, columns: int) -> Figure:
    """A panel per measure, a line per training."""
    measures = _measures(next(iter(histories.values())))
    rows = -(-len(measures) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False).flat
    for axes, measure in zip(panels, measures, strict=False):
        for color, (name, found) in zip(itertools.cycle(PALETTE), histories.items(), strict=False):
            epochs, values = [row["epoch"] for row in found], [row[measure] for row in found]
            axes.plot(epochs, values, color=color, label=name, marker="o", markersize=3)
        title = "weighted sum" if measure == "reward" else measure
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(unit)
        whole_numbers(axes)
    for axes in panels[len(measures) :]:
        axes.set_visible(False)
    if len(histories) > 1:
        lines, names = panels[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False)
    return figure
