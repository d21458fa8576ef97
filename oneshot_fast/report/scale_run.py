"""The page and the curves of ``python -m oneshot_fast.scale run``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oneshot_fast.jobs.scale.run import TERA, by_prompt
from oneshot_fast.jobs.scale.simulate import interval
from oneshot_fast.report.page import Cell, Plot, Row, Section, Table, number, strip, write_run
from oneshot_fast.report.plots import BLUE, GREY, ORANGE, inline_svg, new_axes, whole_numbers
from oneshot_fast.runtime.files import Json, read_json, read_jsonl, replacing
from oneshot_fast.search.pruning import best_of_n

_SIDE, _DETAILED = 256, 12
_NAMES = {"prune": "pruned", "best_of_n": "Best-of-N", "fk": "FK steering", "svdd": "SVDD"}


def write_run_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write curves.png and report.html of the run in ``folder``."""
    summary = read_json(folder / "metrics_summary.json")
    rows = read_jsonl(folder / "manifest.jsonl")
    method = _NAMES[summary["settings"]["method"]]
    figure, axes = new_axes("TFLOP per image", "reward of the winner", (7, 4.2))
    _draw_budget(axes, summary, rows, method)
    with replacing(folder / "curves.png") as path:
        figure.savefig(path, format="png", dpi=120)
    facts = [
        f"{summary['prompts']} prompts, {summary['samples']} images",
        f"{method}, {summary['candidates']} candidates",
    ]
    sections = [
        _result(summary, rows, method), _on_the_way(summary, rows, method), _images(folder, rows),
        _details(rows),
    ]  # fmt: skip
    write_run(folder, "Test-time scaling: {model}", facts, sections, summary, flags)


def _result(summary: Json, rows: Sequence[Json], method: str) -> Section:
    beside = summary.get("compare")
    arms = {method: summary} | ({} if beside is None else {"Best-of-N": beside})
    head = [
        "arm", "candidates", "reward", "95 %", "TFLOP per image", "evaluations", "verifications",
        "seconds per image",
    ]  # fmt: skip
    table = [
        Row(
            name,
            [
                *map(Cell, (
                    str(arm["candidates"]), number(arm["best_reward"]),
                    f"{number(arm['low'])} to {number(arm['high'])}",
                    number(arm["tflop_per_image"]), str(arm["evaluations"]),
                    str(arm["verifications"]), number(arm["seconds_per_image"]),
                ))
            ],
        )
        for name, arm in arms.items()
    ]  # fmt: skip
    title, text = "Reward", []
    if beside is not None:
        gain = beside["gain"]
        title = f"{method} and Best-of-N cannot be told apart"
        if gain["low"] > 0:
            title = f"{method} is better than Best-of-N"
        elif gain["high"] < 0:
            title = "Best-of-N is better here"
        text.append(
            f"Paired difference {gain['mean']:+.4g}, 95 % {gain['low']:+.4g} to {gain['high']:+.4g}"
            f": {beside['better']} of {len(rows)} images are better, {beside['equal']} the same. "
            "Best-of-N starts from the same noises and was given at least as much."
        )
    if "decoder_spearman" in summary:
        text.append(
            "Scores by the tiny decoder rank as those by the full one with a correlation of "
            f"{number(summary['decoder_spearman'])}."
        )
    plot = Plot(
        _budget(summary, rows, method),
        "Mean reward of the winner over what an image costs, with 95 % intervals over prompts. "
        "The line is Best-of-N of fewer noises, of the same run.",
    )
    return Section(title[0].upper() + title[1:], text, Table(head, table), plots=[plot])


def _draw_budget(axes: Axes, summary: Json, rows: Sequence[Json], method: str) -> None:
    if (beside := summary.get("compare")) is not None:
        finals = numpy.array([row["compare"]["steps"][-1]["scores"] for row in rows], float)
        finals = numpy.where(numpy.isfinite(finals), finals, numpy.nanmin(finals))
        sizes = range(1, finals.shape[1] + 1)
        exact = [by_prompt(rows, best_of_n(finals, n)[0].tolist()) for n in sizes]
        low, high = numpy.array([interval(values) for values in exact]).T
        costs = [n * beside["tflop_per_image"] / finals.shape[1] for n in sizes]
        axes.plot(
            costs, [v.mean() for v in exact], "o-", color=GREY, markersize=4, label="Best-of-N"
        )
        axes.fill_between(costs, low, high, color=GREY, alpha=0.15, linewidth=0)
    mean, cost = summary["best_reward"], summary["tflop_per_image"]
    ends = [[mean - summary["low"]], [summary["high"] - mean]]
    axes.errorbar([cost], [mean], ends, fmt="o", color=BLUE, capsize=4, label=method)
    axes.legend(fontsize=8)


@inline_svg
def _budget(summary: Json, rows: Sequence[Json], method: str) -> Figure:
    figure, axes = new_axes("TFLOP per image", "reward of the winner")
    _draw_budget(axes, summary, rows, method)
    return figure


def _on_the_way(summary: Json, rows: Sequence[Json], method: str) -> Section | None:
    """How many lived, and what their estimates promised."""
    steps = [one["step"] for one in rows[0]["steps"]]
    if len(steps) < 2:
        return None
    alive = [
        float(numpy.mean([len({*r["steps"][k]["kept"]}) for r in rows])) for k in range(len(steps))
    ]
    plots = [
        Plot(
            _survivors(steps, [len({*rows[0]["steps"][0]["candidates"]}), *alive]),
            "Noises of an image from which something is alive, after each scored step; in the end "
            "the winner.",
        ),
        Plot(
            _scores(steps, rows),
            "Scores of the estimates of one image: what went on, and what did not.",
        ),
    ]
    return Section("On the way", plots=plots)


@inline_svg
def _survivors(steps: Sequence[int], alive: Sequence[float]) -> Figure:
    figure, axes = new_axes("step", "noises alive")
    axes.step([-1, *steps], alive, where="post", color=BLUE, marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    whole_numbers(axes)
    return figure


@inline_svg
def _scores(steps: Sequence[int], rows: Sequence[Json]) -> Figure:
    figure, axes = new_axes("step", "reward of the estimate")
    for index, step in enumerate(steps):
        one = rows[0]["steps"][index]
        kept = {*one["kept"]}
        for color, goes_on in ((GREY, False), (ORANGE, True)):
            values = [
                score
                for k, score in zip(one["candidates"], one["scores"], strict=True)
                if (k in kept) == goes_on and score is not None
            ]
            label = ("went on" if goes_on else "dropped") if index == 0 else None
            axes.scatter([step] * len(values), values, s=16, color=color, linewidths=0, label=label)
    whole_numbers(axes)
    axes.legend()
    return figure


def _images(folder: Path, rows: Sequence[Json]) -> Section | None:
    images = folder / "images"
    kinds = ["best_of_n", "best"] if "compare" in rows[0] else ["best"]
    names = ["Best-of-N", "winner", "reward"] if len(kinds) == 2 else ["winner", "reward"]
    shown = strip(
        names,
        (
            (
                row["prompt"],
                [images / f"{row['id']}-{kind}.png" for kind in kinds],
                " → ".join(
                    number(arm["best"]["total"]) for arm in (row.get("compare"), row) if arm
                ),
            )
            for row in rows
        ),
        _SIDE,
    )
    return None if shown is None else Section("Images", strip=shown)


def _details(rows: Sequence[Json]) -> Section:
    """What was pruned and what won, of the first images."""
    steps = [one["step"] for one in rows[0]["steps"]]
    head = ["image", *(f"after step {step}" for step in steps[:-1]), "winner", "reward", "TFLOP"]
    table = []
    for row in rows[:_DETAILED]:
        cells = [
            f"{len({*one['candidates']})} → {len({*one['kept']})}" for one in row["steps"][:-1]
        ]
        cells += [f"noise {row['candidate']}", number(row["best"]["total"])]
        cells.append(number(row["flops"] / TERA))
        table.append(Row(row["id"], [*map(Cell, cells)], row["prompt"]))
    text = [
        "How many noises went on, and which one won; all candidates and their scores are in "
        "manifest.jsonl."
    ]
    return Section("What was dropped and what won", text, Table(head, table, dense=True))
