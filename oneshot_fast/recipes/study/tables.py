"""The study's results as study.md, study.json and plots."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from oneshot_fast.report.plots import BLUE, ORANGE, new_axes
from oneshot_fast.runtime.files import write_json, write_text

Cells = Mapping[str, Sequence[Mapping[str, Any]]]
_COLUMNS = (
    ("frechet_distance", "FD", 2), ("accuracy", "accuracy", 3), ("diversity", "diversity", 3),
    ("sharpness", "sharpness", 2), ("drift", "drift", 3), ("reconstruction", "reconstruction", 3),
    ("matched_loss", "assigned loss", 3),
)  # fmt: skip


def write_study(folder: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write study.json, plots and study.md of results by data set: real, base, speeds, cells."""
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    write_json(folder / "study.json", {"settings": settings, "machine": machine, "results": found})
    lines = [
        f"Settings: {', '.join(f'{k} {v}' for k, v in settings.items() if k != 'command')}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.",
    ]
    for name, results in found.items():
        lines += ["", f"## {name}", "", *quality_table(results), "", *speed_table(results), ""]
        for plot, title in _plots(folder / "plots", name, results):
            lines += [f"![{title}]({plot.relative_to(folder)})", ""]
    write_text(folder / "study.md", "\n".join(lines) + "\n")


def quality_table(results: Mapping[str, Any]) -> list[str]:
    """A row per training: mean and deviation over the seeds; the best change against the base."""
    base = results["base"]
    titles = [title for _, title, _ in _COLUMNS]
    lines = [
        "| training | " + " | ".join([*titles, "FD to base", "NFE", "mean noise"]) + " |",
        "|" + " --- |" * (len(titles) + 4),
        _row("real images", [results["real"]], base),
        _row("base model", [base], base),
    ]
    return lines + [_row(name, rows, base) for name, rows in results["cells"].items()]


def _row(name: str, rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> str:
    cells = [_cell([row.get(key) for row in rows], digits) for key, _, digits in _COLUMNS]
    change = fmean(row["frechet_distance"] for row in rows) / base["frechet_distance"] - 1
    cells.append("" if rows[0] is base else f"{100 * change:+.0f} %")
    cells.append(_cell([row.get("nfe") for row in rows], 0))
    shift = [row.get("typicality", {}).get("mean noise", {}).get("value") for row in rows]
    cells.append(_cell(shift, 2))
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{fmean(known):.{digits}f}"
    return text + (f" ± {stdev(known):.{digits}f}" if len(known) > 1 and digits else "")


def speed_table(results: Mapping[str, Any]) -> list[str]:
    """Loss after a third, two thirds and all of the steps: best fixed step size and lr auto."""
    curves: Mapping[str, list[float]] = results["speeds"]
    last = len(next(iter(curves.values()))) - 1
    at = (last // 3, 2 * last // 3, last)
    lines = [
        "| gradient method | step, radians | " + " | ".join(f"{k} steps" for k in at) + " |",
        "| --- | --- |" + " --- |" * len(at),
    ]
    methods = dict.fromkeys(name.split(" | ")[0] for name in curves)
    for method in methods:
        rates = {n.split(" | ")[1]: c for n, c in curves.items() if n.startswith(f"{method} |")}
        fixed = {k: c for k, c in rates.items() if k not in ("auto", "usual")}
        best = min(fixed, key=lambda k: fixed[k][-1])
        for rate in ("usual", best, "auto"):
            if rate in rates:
                label = f"best: {rate}" if rate == best else rate
                losses = " | ".join(f"{rates[rate][k]:.4f}" for k in at)
                lines.append(f"| {method} | {label} | {losses} |")
    return lines


def _plots(folder: Path, name: str, results: Mapping[str, Any]) -> list[tuple[Path, str]]:
    folder.mkdir(parents=True, exist_ok=True)
    cells = dict(sorted(results["cells"].items(), key=lambda item: _mean_distance(item[1])))
    found = []
    for plot, draw, title in (
        ("quality", _draw_quality, "Frechet distance after each training"),
        ("trade", _draw_trade, "what the loss of the assigned noises says about the training"),
    ):
        path = folder / f"{name}-{plot}.png"
        draw(cells, results).savefig(path, dpi=130)
        found.append((path, f"{name}: {title}"))
    return found


def _draw_quality(cells: Cells, results: Mapping[str, Any]) -> Figure:
    """Mean and standard deviation of every cell's Frechet distance."""
    real = f"{results['real']['frechet_distance']:.2g}"
    label = f"Frechet distance on random noise, lower is better; real images: {real}"
    figure, axes = new_axes(label, "", (8, 0.26 * len(cells) + 1.2))
    axes.grid(alpha=0.3)
    means = [_mean_distance(rows) for rows in cells.values()]
    errors = [stdev([r["frechet_distance"] for r in rows]) if len(rows) > 1 else 0.0
              for rows in cells.values()]  # fmt: skip
    axes.errorbar(means, [*cells], xerr=errors, fmt="o", color=BLUE, ecolor="#444444")
    axes.axvline(results["base"]["frechet_distance"], color=ORANGE, label="base model")
    _logarithmic(axes, "x")
    axes.invert_yaxis()
    axes.legend()
    return figure


def _draw_trade(cells: Cells, results: Mapping[str, Any]) -> Figure:
    """Frechet distance over the loss of the assigned noises."""
    labels = "loss of the assigned noises", "Frechet distance on random noise"
    figure, axes = new_axes(*labels, (10, 7))
    axes.grid(alpha=0.3)
    for cell, rows in cells.items():
        if rows[0]["matched_loss"] is not None:
            loss = fmean(row["matched_loss"] for row in rows)
            axes.scatter(loss, _mean_distance(rows), color=BLUE, s=18)
            axes.annotate(f" {cell}", (loss, _mean_distance(rows)), fontsize=7, rotation=15)
    axes.axhline(results["base"]["frechet_distance"], color=ORANGE, label="base model")
    for side in ("x", "y"):
        _logarithmic(axes, side)
    axes.legend()
    return figure


def _logarithmic(axes: Any, side: str) -> None:
    """Make an axis logarithmic, with plain numbers."""
    axes.set(**{f"{side}scale": "log"})
    axis = getattr(axes, f"{side}axis")
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(3, 1)))


def _mean_distance(rows: Sequence[Mapping[str, Any]]) -> float:
    return fmean(row["frechet_distance"] for row in rows)
