"""The pages and the picture of ``python -m oneshot_fast.scale simulate`` and ``search``."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oneshot_fast.report.page import Cell, Mood, Plot, Row, Section, Table, number, strip, write_run
from oneshot_fast.report.plots import BLUE, GREY, PALETTE, inline_svg, new_axes, whole_numbers
from oneshot_fast.runtime.files import read_json, replacing

Rows = Sequence[Mapping[str, Any]]


def write_scale_report(folder: Path, found: Mapping[str, Any]) -> None:
    """Write ``folder``/scale.png and ``folder``/report.html of scale.json's content."""
    rows: Rows = found["rows"]
    figure, axes = new_axes("cost per prompt", "reward of the winner", (7, 4.2))
    _draw(axes, rows, found["best_of_n_cost"])
    with replacing(folder / "scale.png") as path:
        figure.savefig(path, format="png", dpi=120)
    plot = Plot(
        _svg(rows, found["best_of_n_cost"]),
        "Mean reward of the winner over the cost of a prompt, with 95 % intervals over prompts. "
        "Pruning pays where its line is above that of Best-of-N.",
    )
    facts = [f"{found['prompts']} prompts", f"{found['candidates']} candidates of each"]
    text = [
        f"{arm}: area over the budgets {area:+.1f} % of that of Best-of-N."
        for arm, area in found["areas"].items()
        if area is not None
    ]
    sections = [Section(_verdict(rows), text, _table(rows), plots=[plot]), _early(found)]
    if found["measured"]:
        words = (
            "What runs gave over what the pool says of their schedules, with 95 % intervals over "
            "prompts; on the line both agree."
        )
        plots = [Plot(_against(found["measured"]), words)]
        sections.append(Section("Measured and simulated", plots=plots))
    write_run(folder, "Test-time scaling, simulated", facts, sections, dict(found), {})


def write_data_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write ``folder``/report.html of a pool of one's own."""
    summary = read_json(folder / "summary.json")
    steps = summary["settings"]["steps_saved"]
    plots = [
        Plot(
            _agreement(summary["agreement"], measure),
            f"{measure.capitalize()}'s correlation of a step's reward with the final one, within "
            "prompts.",
        )
        for measure in ("spearman", "kendall")
        if summary["agreement"]
    ]
    table = Table(
        ["reward", "mean of the last step"],
        [Row(name, [Cell(number(value))]) for name, value in summary["rewards"].items()],
    )
    shown = strip(
        [f"step {step}" for step in steps],
        (
            (
                summary["first_prompt"],
                [folder / f"images/p0000/id{j:03d}/s{step:02d}.png" for step in steps],
                f"id{j:03d}",
            )
            for j in range(summary["candidates"])
        ),
        96,
    )
    sections = [
        Section("What early rewards tell", table=table, plots=plots),
        None if shown is None else Section("Estimates", strip=shown),
    ]
    facts = [f"{summary['samples']} prompts, {summary['candidates']} images of each"]
    write_run(folder, "A pool of rewards: {model}", facts, sections, summary, flags)


def write_search_report(folder: Path, found: Mapping[str, Any]) -> None:
    """Write ``folder``/report.html of schedule.json's content."""
    chosen = found["schedule"]
    words = "Best-of-N is better here"
    if chosen["after"]:
        after, keep = (" ".join(map(str, chosen[name])) for name in ("after", "keep"))
        words = f"Recommended: --after {after} --keep {keep}"
    rows = []
    for name, gain in found["held_out"].items():
        mood: Mood = "good" if gain["low"] > 0 else "bad" if gain["high"] < 0 else ""
        between = f"{number(gain['low'])} to {number(gain['high'])}"
        cells = [Cell(str(found["n"][name])), Cell(f"{gain['mean']:+.4g}", mood), Cell(between)]
        rows.append(Row(name, cells))
    text = [
        f"Found on {found['search_prompts']} prompts, judged on the other "
        f"{found['held_out_prompts']}: reward of the winner beside Best-of-N of "
        f"{found['n']['best_of_n']}, at equal cost."
    ]
    plot = Plot(
        _gains(found["held_out"]), "Gain over Best-of-N on prompts kept aside, with 95 % intervals."
    )
    head = ["schedule", "candidates", "gain", "95 %"]
    section = Section(words, text, Table(head, rows), plots=[plot])
    facts = [f"budget {number(found['settings']['budget'])}"]
    write_run(folder, "Test-time scaling: a schedule", facts, [section], dict(found), {})


def _early(found: Mapping[str, Any]) -> Section:
    """What early rewards tell of the final ones, and who lives on."""
    alive = found["alive"]
    plots = [
        Plot(
            _agreement(found["agreement"], measure),
            f"{measure.capitalize()}'s correlation of a step's reward with the final one, within "
            "prompts. Where it is low, a prune there drops good candidates.",
        )
        for measure in ("spearman", "kendall")
    ]
    if alive["after"]:
        plots.append(Plot(_alive(alive), "Candidates alive, at the largest budget."))
    return Section("What early rewards tell", plots=plots)


@inline_svg
def _agreement(rows: Rows, measure: str) -> Figure:
    figure, axes = new_axes("step", f"{measure} with the final reward")
    names = dict.fromkeys((row["reward"], row["kind"]) for row in rows)
    for colour, name in zip(itertools.cycle(PALETTE), names, strict=False):
        own = [row for row in rows if (row["reward"], row["kind"]) == name]
        values = [row[measure] for row in own]
        steps = [row["step"] for row in own]
        axes.plot(steps, values, "o-", color=colour, label=", ".join(name), markersize=3)
    whole_numbers(axes)
    axes.legend(fontsize=8)
    return figure


@inline_svg
def _alive(alive: Mapping[str, Any]) -> Figure:
    figure, axes = new_axes("step", "candidates alive")
    counts = alive["counts"]
    axes.step([-1, *alive["after"]], counts, where="post", color=BLUE, marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    whole_numbers(axes)
    return figure


@inline_svg
def _against(rows: Rows) -> Figure:
    figure, axes = new_axes("simulated reward", "measured reward")
    for colour, row in zip(itertools.cycle(PALETTE), rows, strict=False):
        x, y = row["simulated"], row["measured"]
        axes.errorbar(
            [x], [y],
            xerr=[[x - row["simulated_low"]], [row["simulated_high"] - x]],
            yerr=[[max(0.0, y - row["low"])], [max(0.0, row["high"] - y)]],
            fmt="o", color=colour, capsize=3, markersize=4,
            label=f"{Path(row['run']).name}: {row['arm']}, n = {row['n']}",
        )  # fmt: skip
    axes.axline((rows[0]["simulated"],) * 2, slope=1, color=GREY, linestyle="--", linewidth=1)
    axes.legend(fontsize=8)
    return figure


@inline_svg
def _gains(held_out: Mapping[str, Any]) -> Figure:
    figure, axes = new_axes("gain over Best-of-N", "", (5.6, 1.8))
    for place, gain in enumerate(held_out.values()):
        ends = [[gain["mean"] - gain["low"]], [gain["high"] - gain["mean"]]]
        axes.errorbar([gain["mean"]], [place], xerr=ends, fmt="o", color=BLUE, capsize=4)
    axes.axvline(0, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(held_out)), [*held_out])
    axes.margins(y=0.4)
    return figure


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


def _draw(axes: Axes, rows: Rows, one: float) -> None:
    for colour, arm in zip(PALETTE, dict.fromkeys(row["arm"] for row in rows), strict=False):
        own = [row for row in rows if row["arm"] == arm]
        costs = [row["budget"] for row in own]
        axes.plot(costs, [row["mean"] for row in own], "o-", color=colour, label=arm, markersize=4)
        low, high = [row["low"] for row in own], [row["high"] for row in own]
        axes.fill_between(costs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.legend(fontsize=8)
    scale = (lambda cost: cost / one), (lambda n: n * one)
    axes.secondary_xaxis("top", functions=scale).set_xlabel("equals Best-of-N with N =")


@inline_svg
def _svg(rows: Rows, one: float) -> Figure:
    figure, axes = new_axes("cost per prompt", "reward of the winner", (5.6, 3.3))
    _draw(axes, rows, one)
    return figure
