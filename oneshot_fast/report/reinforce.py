"""The page of ``python -m oneshot_fast.reinforce``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oneshot_fast.report import plots
from oneshot_fast.report.page import Plot, Section, write_run
from oneshot_fast.report.rewards import draw_histories, history, print_change, rewards_section
from oneshot_fast.runtime.files import Json, read_json, read_jsonl

_LOSSES = ("policy", "final", "match", "preserve", "clipped")


def write_reinforce_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write curves.png and report.html of the finished ``ReinforceRun`` in ``folder``."""
    summary, rows = read_json(folder / "summary.json"), history(folder)
    losses = {key for row in rows for key in row if key in _LOSSES or key.startswith("fake ")}
    rows = [{k: v for k, v in row.items() if k not in losses} for row in rows]
    draw_histories({"": rows}, folder / "curves.png")
    run, last = summary["settings"], rows[-1]["epoch"]
    grids = {"base": "base.png", f"epoch {last}": f"epoch-{last:03d}.png"}
    sections = [
        rewards_section(
            rows,
            f"On {run['eval_samples']} random noises that no step saw, the same ones every time.",
            {name: folder / "eval" / file for name, file in grids.items()},
        ),
        _training(folder),
    ]
    facts = [f"{summary['steps']} steps of {run['batch_size']} images"]
    write_run(folder, "Reinforcement of {model}", facts, sections, summary, flags)


def _training(folder: Path) -> Section:
    found = read_jsonl(folder / "history.jsonl")
    norms = {"gradient norm": [row["gradient_norm"] for row in found]}
    words = "Bad: a norm that grows from epoch to epoch (lower the learning rate)."
    plot = Plot(plots.curves(norms, "epoch", "gradient norm before clipping", first=1), words)
    return Section("Training", [], plots=[plot])


def print_summary(summary: Json, folder: Path) -> None:
    """Say what was reached, and where it is."""
    print(f"reinforced in {summary['steps']} steps, {summary['seconds']:.0f} s")
    print_change(summary)
    print(f"checkpoint: {folder / 'checkpoint-final'}")
    if (folder / "lora-final").exists():
        print(f"LoRA: {folder / 'lora-final'}")
