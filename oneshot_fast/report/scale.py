"""The page and the picture of ``python -m oneshot_fast.scale simulate``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oneshot_fast.report.page import Cell, Plot, Row, Section, Table, number, write_run
from oneshot_fast.report.plots import PALETTE, inline_svg, new_axes
from oneshot_fast.runtime.files import replacing

Rows = Sequence[Mapping[str, Any]]


def write_scale_report(folder: Path, found: Mapping[str, Any]) -> None:
    """Write ``folder``/scale.png and ``folder``/report.html of scale.json's content."""
    rows: Rows = found["rows"]
    figure, axes = new_axes("cost per prompt", "reward of the winner", (7, 4.2))
    _draw(axes, rows)
    with replacing(folder / "scale.png") as path:
        figure.savefig(path, format="png", dpi=120)
    plot = Plot(
        _svg(rows),
        "Mean reward of the winner over the cost of a prompt, with 95 % intervals over prompts. "
        "Pruning pays where its line is above that of Best-of-N.",
    )
    facts = [f"{found['prompts']} prompts", f"{found['candidates']} candidates of each"]
    section = Section(_verdict(rows), [], _table(rows), plots=[plot])
    write_run(folder, "Test-time scaling, simulated", facts, [section], dict(found), {})


def _verdict(rows: Rows) -> str:
    gains = [row["gain"] for row in rows if "gain" in row]
    if gains and all(gain["low"] > 0 for gain in gains):
        return "Pruning is better than Best-of-N at every budget"
    if any(gain["low"] > 0 for gain in gains):
        return "Pruning is better than Best-of-N at some budgets"
    if any(gain["high"] < 0 for gain in gains):
        return "Best-of-N is better here"
    return "Pruning and Best-of-N cannot be told apart"


def _table(rows: Rows) -> Table:
    head = ["budget", "arm", "candidates", "cost", "reward", "95 %", "against Best-of-N", "95 %"]
    return Table(head, [Row(number(row["budget"]), _cells(row)) for row in rows])


def _cells(row: Mapping[str, Any]) -> list[Cell]:
    few = " (all of the pool)" if row["pool_too_small"] else ""
    cells = [row["arm"], f"{row['n']}{few}", number(row["cost"]), number(row["mean"])]
    cells.append(f"{number(row['low'])} to {number(row['high'])}")
    if (gain := row.get("gain")) is None:
        return [*map(Cell, cells), Cell(""), Cell("")]
    mood: Any = "good" if gain["low"] > 0 else "bad" if gain["high"] < 0 else ""
    between = f"{number(gain['low'])} to {number(gain['high'])}"
    return [*map(Cell, cells), Cell(f"{gain['mean']:+.4g}", mood), Cell(between)]


def _draw(axes: Axes, rows: Rows) -> None:
    for colour, arm in zip(PALETTE, dict.fromkeys(row["arm"] for row in rows), strict=False):
        own = [row for row in rows if row["arm"] == arm]
        costs = [row["budget"] for row in own]
        axes.plot(costs, [row["mean"] for row in own], "o-", color=colour, label=arm, markersize=4)
        low, high = [row["low"] for row in own], [row["high"] for row in own]
        axes.fill_between(costs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.legend(fontsize=8)


@inline_svg
def _svg(rows: Rows) -> Figure:
    figure, axes = new_axes("cost per prompt", "reward of the winner")
    _draw(axes, rows)
    return figure
