"""The page and the curves of ``python -m oneshot_fast.optimize``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot_fast.report.noise import noise_section
from oneshot_fast.report.page import (
    Cell,
    Example,
    Page,
    Plot,
    Row,
    Section,
    Strip,
    Table,
    duration,
    number,
    picture,
    write_page,
)
from oneshot_fast.report.plots import BLUE, GREY, inline_svg
from oneshot_fast.runtime.files import read_json, read_jsonl, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN, _SIDE = 16, 256

Curves = Mapping[str, Sequence[Sequence[float]]]


def write_optimize_report(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``folder``/curves.png and ``folder``/report.html of an optimize run.

    Args:
        folder: Run folder with its metrics and manifest; images that are missing are left out.
        settings: The command's flags and their values.
    """
    summary = read_json(folder / "metrics_summary.json")
    images = [
        image
        for group in read_json(folder / "metrics_per_prompt.json")
        for image in group["images"]
    ]
    curves = {name: [image["scores"][name] for image in images] for name in summary["rewards"]}
    with replacing(folder / "curves.png") as path:
        _draw(curves).savefig(path, format="png", dpi=120)
    run = summary["settings"]
    facts = [
        f"{summary['prompts']} prompts, {summary['samples']} images",
        f"method {run['method']}",
        f"seed {run['seed']}",
        f"device {run['device']}",
        duration(summary["seconds"]),
    ]
    sections = [
        _rewards_section(summary, curves),
        found_section(folder),
        noise_section(folder),
    ]
    page = Page(
        f"Noise optimisation: {settings.get('model_id') or 'the generator'}",
        facts,
        [section for section in sections if section is not None],
        {**run, **settings},
        read_jsonl(folder / "failures.jsonl"),
    )
    write_page(page, folder / "report.html")


def _rewards_section(summary: Mapping[str, Any], curves: Curves) -> Section:
    rows = []
    for name, found in summary["rewards"].items():
        gain = found["best"] - found["initial"]
        cells = [Cell(number(found["initial"])), Cell(number(found["best"]))]
        cells.append(
            Cell(f"{'+' if gain > 0 else ''}{number(gain)}", "good" if gain > 0 else "bad")
        )
        label = "weighted sum" if name == "total" else name
        rows.append(Row(label, cells))
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
    rows = [
        row
        for row in read_jsonl(folder / "manifest.jsonl")
        if (folder / row["target_image_path"]).is_file()
    ][:_SHOWN]
    if not rows:
        return None
    saved = (folder / "images").glob(f"{rows[0]['id']}-step-*.png")
    steps = sorted(path.stem.removeprefix(f"{rows[0]['id']}-") for path in saved)
    kinds = ["initial", *steps, "best"]
    examples = []
    for row in rows:
        files = [folder / "images" / f"{row['id']}-{kind}.png" for kind in kinds]
        note = f"{number(row['initial']['total'])} → {number(row['best']['total'])}"
        examples.append(Example(row["prompt"], [picture(file, _SIDE) for file in files], note))
    names = ["base noise", *(step.replace("-", " ") for step in steps), "best noise", "reward"]
    return Section(f"Images{of}", strip=Strip(names, examples))


def _draw(curves: Curves) -> Figure:
    """A panel per reward: mean and 10 to 90 % band over images."""
    import numpy
    from matplotlib.figure import Figure

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
