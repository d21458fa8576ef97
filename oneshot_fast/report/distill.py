"""The page of ``python -m oneshot_fast.distill``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oneshot_fast.report import plots
from oneshot_fast.report.page import Plot, Section, write_run
from oneshot_fast.report.rewards import draw_histories, history, print_change, rewards_section
from oneshot_fast.runtime.files import Json, read_json, read_jsonl

_LOSSES = ("dmd", "fake loss", "fake fake", "fake consistency")


def write_distill_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write curves.png and report.html of the finished ``DistillRun`` in ``folder``."""
    summary, rows = read_json(folder / "summary.json"), history(folder)
    rows = [{k: v for k, v in row.items() if k not in _LOSSES} for row in rows]
    draw_histories({"": rows}, folder / "curves.png")
    run, last = summary["settings"], rows[-1]["epoch"]
    grids = {"base": "base.png", f"epoch {last}": f"epoch-{last:03d}.png"}
    sections = [
        rewards_section(
            rows,
            f"On {run['eval_samples']} random noises that no step saw, the same ones every time; "
            "the base is the teacher's network by the student's steps.",
            {name: folder / "eval" / file for name, file in grids.items()},
        ),
        _training(folder),
    ]
    facts = [f"{summary['steps']} steps of the student, {run['ttur']} of the fake to each"]
    write_run(folder, "Distillation of {model}", facts, sections, summary, flags)


def _training(folder: Path) -> Section:
    found = read_jsonl(folder / "history.jsonl")
    losses = {"student": [row["dmd"] for row in found], "fake": [row["fake loss"] for row in found]}
    return Section(
        "Training",
        [],
        plots=[
            Plot(
                plots.curves(losses, "epoch", "mean loss of the epoch", first=1),
                "The fake's should settle: it follows the student. The student's says only how far "
                "fake and teacher are apart, not how good the images are.",
            )
        ],
    )


def print_summary(summary: Json, folder: Path) -> None:
    """Say what was reached, and where it is."""
    print(f"distilled in {summary['steps']} steps, {summary['seconds']:.0f} s")
    print_change(summary)
    print(f"checkpoint: {folder / 'checkpoint-final'}")
    if (folder / "lora-final").exists():
        print(f"LoRA: {folder / 'lora-final'}")
