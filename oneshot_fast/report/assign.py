"""The page of ``python -m oneshot_fast.assign``."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.report import page, plots
from oneshot_fast.report.noise import noise_section
from oneshot_fast.report.page import Plot, Section, Table, number, strip, write_run
from oneshot_fast.runtime.files import Json, read_json, read_jsonl
from oneshot_fast.runtime.units import decimals

_KINDS = ("target", "base", "assigned")


def write_assign_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write ``folder``/report.html of an assign run: all that is there of it, and the flags."""
    summary, rows = read_json(folder / "summary.json"), read_jsonl(folder / "manifest.jsonl")
    sections = [targets_section(summary, rows), examples_section(folder), noise_section(folder)]
    facts = [f"{summary['samples']} targets"]
    write_run(folder, "Noise assignment: {data} on {model}", facts, sections, summary, flags)


def targets_section(summary: Json, rows: Sequence[Json]) -> Section:
    """Loss of the targets of an assign run before and after."""
    late = sum(row["best_step"] == summary["settings"]["steps"] for row in rows)
    worse = sum(
        row["initial_loss"] is not None and row["best_loss"] >= row["initial_loss"] for row in rows
    )
    text = [
        f"{late} of {len(rows)} targets reached their lowest loss at the last step"
        + (": more steps would lower it further." if late > len(rows) / 2 else "."),
        f"{worse} found nothing better than their base noise." if worse else "",
    ]
    table = Table(
        ("", "base noise", "assigned noise", "change"),
        [page.row("mean loss", page.change(summary["initial_loss"], summary["best_loss"]))],
    )
    figures = [
        Plot(
            plots.loss_band([row["losses"] for row in rows]),
            "Loss over the search. Bad: a curve that rises or jumps (lower the learning rate).",
        ),
        Plot(
            plots.before_after(
                [row["initial_loss"] for row in rows], [row["best_loss"] for row in rows]
            ),
            "Each dot is a target. Bad: dots on the diagonal, which found no better noise.",
        ),
    ]
    return Section("Loss", [line for line in text if line], table, plots=figures)


def examples_section(folder: Path, of: str = "") -> Section | None:
    """Targets beside what the generator makes of their base and assigned noise."""
    shown = strip(
        ("target", "base noise", "assigned noise", "loss"),
        (
            (
                row["prompt"],
                [folder / "images" / f"{row['id']}-{name}.png" for name in _KINDS],
                f"{number(row['initial_loss'])} → {number(row['best_loss'])}",
            )
            for row in read_jsonl(folder / "manifest.jsonl")
        ),
    )
    if shown is None:
        return None
    text = "The same generator for both noises; the assigned one should look more like the target."
    return Section(f"Assigned examples{of}", [text], strip=shown)


def print_summary(summary: Json, folder: Path) -> None:
    """Say what was reached and where it is."""
    print(
        f"assigned {summary['samples']} of {summary['samples'] + summary['failed']} targets: mean "
        f"loss {decimals(summary['initial_loss'])} -> {decimals(summary['best_loss'])} "
        f"in {summary['seconds']:.0f} s ({summary['images_per_second']:.2f} images/s)"
    )
    if summary.get("cut_images"):
        print(f"warning: {summary['cut_images']}", file=sys.stderr)
