"""The page of ``python -m oneshot_fast.prefer``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oneshot_fast.report import plots
from oneshot_fast.report.page import Plot, Section, write_run
from oneshot_fast.report.rewards import draw_histories, history, print_change, rewards_section
from oneshot_fast.runtime.files import Json, read_json, read_jsonl


def write_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write curves.png and report.html of the finished ``PreferRun`` in ``folder``."""
    summary, rows = read_json(folder / "summary.json"), history(folder)
    draw_histories({"": rows}, folder / "curves.png")
    last = rows[-1]["epoch"]
    grids = {"base": "base.png", f"epoch {last}": f"epoch-{last:03d}.png"}
    samples = summary["settings"]["eval_samples"]
    stopped = f" Ended early: {summary['stopped']}." if summary["stopped"] else ""
    sections = [
        rewards_section(
            rows,
            f"On {samples} random noises that no step saw, the same ones every time.{stopped}",
            {name: folder / "eval" / file for name, file in grids.items()},
        ),
        _steps(read_jsonl(folder / "history.jsonl")),
    ]
    objective = summary["settings"]["objective"]
    facts = [f"{objective}, {summary['steps']} steps"]
    write_run(folder, "Training on preferences: {model}", facts, sections, summary, flags)


def _steps(rows: list[Any]) -> Section:
    """What the steps drew and did."""
    panels = {
        "reward of what was drawn": {"mean": "sampled", "largest": "sampled max"},
        "squared distance to the images": {"better": "winner", "worse": "loser"},
        "distance to the base": {"moved": "moved"},
        "gradient norm before clipping": {"norm": "gradient_norm"},
    }
    figures = [
        Plot(
            plots.curves(
                {name: [row[key] for row in rows] for name, key in lines.items()},
                "epoch", title, first=1,
            ),
            "Means over the epoch's steps.",
        )
        for title, lines in panels.items()
        if all(key in rows[0] for key in lines.values())
    ]  # fmt: skip
    text = [
        "The loss of a preference says little of progress; rewards and distances do. Bad: "
        "a distance that grows without bound, or a norm that does (lower the learning rate)."
    ]
    return Section("The steps", text, plots=figures)


def print_summary(summary: Json, folder: Path) -> None:
    """Say on stdout what a training brought."""
    print(f"trained {summary['steps']} steps in {summary['seconds']:.0f} s")
    print_change(summary)
    if summary["stopped"]:
        print(f"ended early: {summary['stopped']}")
    print(f"checkpoint: {folder / 'checkpoint-final'}, best epoch: {summary['best_epoch']}")
