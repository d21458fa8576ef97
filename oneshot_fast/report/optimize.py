"""The page and the curves of ``python -m oneshot_fast.optimize``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.figure import Figure

from oneshot_fast.report.noise import noise_section
from oneshot_fast.report.page import (
    Cell,
    Plot,
    Row,
    Section,
    Table,
    gain_cell,
    number,
    strip,
    write_run,
)
from oneshot_fast.report.plots import BLUE, GREY, inline_svg, of_one_length
from oneshot_fast.runtime.files import read_json, read_jsonl, replacing

_SIDE = 256

Curves = Mapping[str, Sequence[Sequence[float]]]


def write_optimize_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write curves.png and report.html of the optimize run in ``folder``."""
    summary = read_json(folder / "metrics_summary.json")
    images = [
        image
        for group in read_json(folder / "metrics_per_prompt.json", list)
        for image in group["images"]
    ]
    curves = {
        name: of_one_length([image["scores"][name] for image in images])
        for name in summary["rewards"]
    }
    with replacing(folder / "curves.png") as path:
        _draw(curves).savefig(path, format="png", dpi=120)
    facts = [
        f"{summary['prompts']} prompts, {summary['samples']} images",
        f"method {summary['settings']['method']}",
    ]
    sections = [_rewards_section(summary, curves), found_section(folder), noise_section(folder)]
    write_run(folder, "Noise optimisation: {model}", facts, sections, summary, flags)


def _rewards_section(summary: Mapping[str, Any], curves: Curves) -> Section:
    rows = []
    for name, found in summary["rewards"].items():
        first, best = found["initial"], found["best"]
        cells = [Cell(number(first)), Cell(number(best)), gain_cell(first, best)]
        rows.append(Row("weighted sum" if name == "total" else name, cells))
    text = [
        f"{summary['improved']} of {summary['samples']} images score higher than their base "
        f"noise's. The noises were turned by {summary['angle']:.0f} degrees on average, and have "
        f"{number(summary['energy'])} times the energy of Gaussian noise."
    ]
    kind = "candidate" if summary["settings"]["method"] == "best_of_n" else "step"
    plot = Plot(
        _svg(curves),
        f"Rewards at each {kind}: mean, and the middle 80 % of images. A sum that rises while one "
        "of its rewards falls trades that one away; a reward that goes on rising while images get "
        "worse is being exploited: take fewer steps, weigh the drift, or combine rewards.",
    )
    table = Table(("mean over all images", "base noise", "best noise", "gain"), rows)
    return Section("Rewards", text, table, plots=[plot])


def found_section(folder: Path, of: str = "") -> Section | None:
    """Images of base and best noises of an optimize run, ``of`` this name."""
    images, rows = folder / "images", read_jsonl(folder / "manifest.jsonl")
    saved = images.glob(f"{rows[0]['id']}-step-*.png") if rows else ()
    steps = sorted(path.stem.removeprefix(f"{rows[0]['id']}-") for path in saved)
    shown = strip(
        ["base noise", *(step.replace("-", " ") for step in steps), "best noise", "reward"],
        (
            (
                row["prompt"],
                [images / f"{row['id']}-{kind}.png" for kind in ("initial", *steps, "best")],
                f"{number(row['initial']['total'])} → {number(row['best']['total'])}",
            )
            for row in rows
        ),
        _SIDE,
    )
    return None if shown is None else Section(f"Images{of}", strip=shown)


def _draw(curves: Curves) -> Figure:
    """A panel per reward: mean and 10 to 90 % band over images."""
    names = [*curves] if len(curves) > 2 else [name for name in curves if name != "total"]
    figure = Figure(figsize=(max(5.6, 2.8 * len(names)), 2.9), layout="constrained")
    panels: Any = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        table = numpy.asarray(curves[name])
        low, high = numpy.quantile(table, [0.1, 0.9], axis=0)
        axes.fill_between(range(len(low)), low, high, color=GREY, alpha=0.25, linewidth=0)
        axes.plot(table.mean(0), color=BLUE)
        axes.set_title("weighted sum" if name == "total" else name, fontsize=10)
        axes.set_xlabel("evaluation")
    return figure


_svg = inline_svg(_draw)
