"""Draw how many times faster than plain torch the ops are, from a result of the op benchmarks.

``python -m benchmarks.ops.plot benchmarks/results/<device>.json`` writes
docs/images/ops-<device>.svg; without a file it takes the newest.
"""

import argparse
import json
from ast import literal_eval
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.common import RESULTS, ROOT
from benchmarks.ops.results import medians, ours

IMAGES = ROOT / "docs" / "images"
COLOURS = {"forward": "#1f77b4", "both": "#d95f02"}
MARKERS = {"eager": "o", "compile": "D"}
PASSES = {"forward": "forward", "both": "forward + backward"}
OTHERS = {"eager": "plain torch", "compile": "torch.compile of it"}
ROW_INCHES, GAP_ROWS = 0.24, 2.8
WIDTH_INCHES, LABEL_INCHES, HEAD_INCHES = 5.2, 1.75, 1.0


def main(argv: list[str] | None = None) -> int:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("results", nargs="?", type=Path, help="JSON file of benchmarks.ops.bench; the newest")
    add("--output", type=Path, help="SVG or PNG file; docs/images/ops-<device>.svg")
    add("--dtype", default="float32", help="of the records")
    add("--threads", type=int, default=1, help="of the records, on a CPU")
    config = parser.parse_args(argv)
    file = config.results or max(RESULTS.glob("*.json"), key=lambda path: path.stat().st_mtime)
    results = json.loads(file.read_text())
    chosen = [
        record
        for record in results["records"]
        if record.get("dtype", config.dtype) == config.dtype
        and record.get("threads", config.threads) == config.threads
        and record["pass"] in PASSES
    ]
    name = file.stem.removeprefix("ops-")
    output = config.output or IMAGES / f"ops-{name}.svg"
    draw(chosen, results, subtitle(config, results), output)
    print(f"wrote {output}")
    return 0


def subtitle(config: argparse.Namespace, results: dict[str, Any]) -> str:
    """What the numbers hold for."""
    on_gpu = "copy_bandwidth" in results
    build = results["build"]
    where = "GPU time" if on_gpu else f"{build['cpu_isa']}, {config.threads} thread"
    where += "s" if not on_gpu and config.threads > 1 else ""
    return (
        f"{results['device']}, {where}, {config.dtype}, torch {build['torch_running']}, "
        f"{results['date'][:10]}"
    )


def label(op: str, case: tuple[Any, ...]) -> str:
    """A case in words."""
    shape = case[0]
    if op.startswith("patch_"):
        C, H, W = shape[1:]
        return f"{shape[0]} of {C}x{H}x{W}, D = {C * case[1] ** 2}"
    size = "x".join(map(str, shape[1:]))
    return f"{shape[0]} of {size}" + (f", norm {case[1]:g}" if op == "skew_exp" else "")


def draw(records: list[dict[str, Any]], results: dict[str, Any], title: str, output: Path) -> None:
    """A panel per op in two columns, a row per case, ordered by size."""
    panels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        case = label(record["op"], literal_eval(record["case"]))
        panels.setdefault(record["op"], {}).setdefault(case, []).append(record)
    columns = balanced({op: len(cases) + GAP_ROWS for op, cases in panels.items()})
    rows = max(sum(len(panels[op]) + GAP_ROWS for op in column) for column in columns)
    width, height = WIDTH_INCHES * len(columns), rows * ROW_INCHES + HEAD_INCHES
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "ops", "svg.fonttype": "none"})
    figure = plt.figure(figsize=(width, height), facecolor="white")
    ratios = [ratio for record in records for ratio in speed_ups(record, results).values()]
    for i, column in enumerate(columns):
        top = height - HEAD_INCHES
        for op in column:
            inches = len(panels[op]) * ROW_INCHES
            left, bottom = i * WIDTH_INCHES + LABEL_INCHES, top - inches
            place = (left, bottom, WIDTH_INCHES - LABEL_INCHES - 0.25, inches)
            axes = figure.add_axes(
                (place[0] / width, place[1] / height, place[2] / width, place[3] / height)
            )
            draw_panel(axes, op, panels[op], results)
            axes.set_xlim(min(0.9, 0.9 * min(ratios)), 1.15 * max(ratios))
            top = bottom - GAP_ROWS * ROW_INCHES
    key(figure, title)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110, metadata={"Date": None} if output.suffix == ".svg" else None)
    plt.close(figure)


def draw_panel(
    axes: Axes, op: str, cases: dict[str, list[dict[str, Any]]], results: dict[str, Any]
) -> None:
    """A row of markers per case."""
    for y, records in enumerate(cases.values()):
        if y % 2 == 0:
            axes.axhspan(y - 0.5, y + 0.5, color="#f4f4f4", lw=0, zorder=0)
        for record in records:
            colour = COLOURS[record["pass"]]
            shift = -0.16 if record["pass"] == "forward" else 0.16
            for other, ratio in speed_ups(record, results).items():
                face = colour if other == "eager" else "white"
                axes.plot(
                    ratio, y + shift, MARKERS[other], ms=5, color=colour, mfc=face, clip_on=False
                )
    axes.set_yticks(range(len(cases)), list(cases))
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", lw=0.9)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(op, loc="left", fontsize=10, fontweight="bold", fontfamily="monospace")


def speed_ups(record: dict[str, Any], results: dict[str, Any]) -> dict[str, float]:
    """How many times faster ours is than each of the others that was measured."""
    median = medians(record)
    mine = median[ours(record, results)]
    return {other: median[other] / mine for other in OTHERS if other in median}


def balanced(heights: dict[str, int]) -> list[list[str]]:
    """Two columns of about the same height, in order."""
    names = list(heights)
    total = sum(heights.values())
    cut = min(
        range(1, len(names) + 1), key=lambda n: abs(2 * sum(map(heights.get, names[:n])) - total)
    )
    return [column for column in (names[:cut], names[cut:]) if column]


def key(figure: plt.Figure, title: str) -> None:
    """Title and legend above the panels."""
    inch = 1 / figure.get_figheight()
    figure.text(0.012, 1 - 0.24 * inch, "Times faster than ...", fontsize=12, fontweight="bold")
    figure.text(0.012, 1 - 0.46 * inch, title, fontsize=8.5, color="#555555")
    marks = [
        Line2D([], [], ls="", marker=MARKERS[other], color=colour, mfc=face, ms=5.5)
        for other, faces in (("eager", COLOURS.values()), ("compile", ["white"] * 2))
        for colour, face in zip(COLOURS.values(), faces, strict=True)
    ]
    texts = [f"{OTHERS[other]}, {PASSES[name]}" for other in OTHERS for name in COLOURS]
    place = {"loc": "upper right", "bbox_to_anchor": (0.99, 1 - 0.03 * inch)}
    figure.legend(marks, texts, ncols=2, frameon=False, **place)


if __name__ == "__main__":
    raise SystemExit(main())
