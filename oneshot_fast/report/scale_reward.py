"""The page of ``python -m oneshot_fast.scale train_reward``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from oneshot_fast.report.page import Cell, Plot, Row, Section, Table, number, write_run
from oneshot_fast.report.plots import PALETTE, curves, inline_svg, new_axes, whole_numbers
from oneshot_fast.runtime.files import Json, read_json, read_jsonl

# arms of the summary, and what they are called
ARMS = {
    "base": "base reward", "clean": "trained on finished images", "own_level": "the step's level",
    "kept": "what is kept",
}  # fmt: skip
_SHARE = "0.50"


def write_reward_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write report.html of the finished ``RewardRun`` in ``folder``."""
    summary = read_json(folder / "summary.json")
    arms = {name: summary[name] for name in ARMS if name in summary}
    steps = sorted(summary["kept"], key=int)
    text = [
        f"On {summary['held_out_prompts']} prompts kept aside. What is kept for a step, a "
        "level or the base reward, was chosen on these prompts, too: its numbers flatter it; those "
        "of the step's own level do not.",
    ]
    head = ["step", *(f"Kendall, {ARMS[name]}" for name in arms), "kept"]
    rows = [
        Row(step, [
            *(Cell(number(arm[step]["kendall"]) if step in arm else "") for arm in arms.values()),
            Cell(summary["best"].get(step, "base reward")),
        ])
        for step in steps
    ]  # fmt: skip
    words = {
        "kendall": "Kendall's tau-b with the final reward, within prompts. Training pays where its "
        "line is above that of the base reward, noise-awareness where it is above that of finished "
        "images alone.",
        "tacc": "How often the best image is in the better half.",
        "tgap": "What the best image of the better half lacks to the best.",
    }
    plots = [Plot(_over_steps(arms, measure), text) for measure, text in words.items()]
    found = read_jsonl(folder / "history.jsonl")
    losses = {
        level: [row["loss"] for row in found if row["level"] == level]
        for level in dict.fromkeys(row["level"] for row in found)
    }
    training = Section(
        "Training",
        plots=[
            Plot(
                curves(losses, "epoch", "loss", first=1),
                "Mean loss of an epoch, in units of the rewards' variance, by level.",
            )
        ],
    )
    sections = [Section("What early scores tell", text, Table(head, rows), plots=plots), training]
    facts = [f"{summary['images']} images of {summary['prompts']} prompts"]
    title = f"A reward for estimates: {summary['reward']}"
    write_run(folder, title, facts, sections, summary, flags)


@inline_svg
def _over_steps(arms: Mapping[str, Mapping[str, Any]], measure: str) -> Figure:
    figure, axes = new_axes("step", measure)
    for colour, (name, arm) in zip(PALETTE, arms.items(), strict=False):
        steps = sorted(map(int, arm))
        found = [arm[str(step)][measure] for step in steps]
        values = [one[_SHARE] if isinstance(one, dict) else one for one in found]
        axes.plot(steps, values, "o-", color=colour, label=ARMS[name], markersize=3)
    whole_numbers(axes)
    axes.legend(fontsize=8)
    return figure


def print_summary(summary: Json, folder: Path) -> None:
    """Say what was reached, and how the reward is used."""
    print(f"{summary['network']} learnt {summary['reward']} in {summary['steps']} steps, "
          f"{summary['seconds']:.0f} s")  # fmt: skip
    arms = [name for name in ARMS if name in summary]
    for step in sorted(summary["kept"], key=int):
        found = (
            f"{ARMS[name]} {summary[name][step]['kendall']:.3f}"
            for name in arms
            if step in summary[name]
        )
        print(f"step {step}: Kendall {', '.join(found)}")
    print(f"reward: --prune_reward {folder}")
