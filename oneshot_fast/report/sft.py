"""The pages of ``python -m oneshot_fast.sft``: of a training on pairs, and of one on rewards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.evaluation.distances import HEADLINE
from oneshot_fast.report import page, plots
from oneshot_fast.report.measures import (
    answer_section,
    label,
    measures_table,
    print_answers,
    spoken,
)
from oneshot_fast.report.page import Plot, Section, Table, write_run
from oneshot_fast.report.rewards import draw_histories, history, print_change, rewards_section
from oneshot_fast.runtime.files import Json, read_json, read_jsonl
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.units import decimals


def write_sft_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write report.html of the finished ``SftRun`` in ``folder``."""
    summary = read_json(folder / "summary.json")
    sections = [*_measured(folder, summary), fit_section(summary), training_section([folder])]
    facts = [f"{summary['samples']} pairs, {summary['steps']} steps"]
    write_run(folder, "Training: {model}", facts, sections, summary, flags)


def _measured(folder: Path, summary: Json) -> list[Section]:
    """What a training with --eval_every was measured by; nothing of others."""
    if "measured" not in summary:
        return []
    last, best = _last_and_best(summary)
    measured = {**summary["measured"], "real": summary["real"]}
    columns = {name: spoken(name).lower() for name in dict.fromkeys(("base", best, last))}
    columns |= {"real": "real images"}
    table = measures_table(columns, measured, last, summary["verdicts"][last])
    text = [f"On the same {measured['base']['samples']} fresh noises: mean ± standard error."]
    names = [*summary["measured"]]
    lines = {label(HEADLINE): [measured[name].get(HEADLINE) for name in names]}
    plot = Plot(
        plots.curves(lines, "measure", f"{label(HEADLINE)} for held-out images"),
        "Lower is better; the first is the base. Bad: a curve that rises (fewer epochs).",
    )
    return [
        answer_section(folder, summary, last, best),
        Section("Quality on random noise", text, table, plots=[plot]),
    ]


def _last_and_best(summary: Json) -> tuple[str, str]:
    epoch = summary["best_epoch"]
    return [*summary["measured"]][-1], f"epoch-{epoch:03d}" if epoch else "base"


def write_reward_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write curves.png and report.html of the finished ``RewardRun`` in ``folder``."""
    summary, rows = read_json(folder / "summary.json"), history(folder)
    draw_histories({"": rows}, folder / "curves.png")
    run = summary["settings"]
    last = rows[-1]["epoch"]
    grids = {"base": "base.png", f"epoch {last}": f"epoch-{last:03d}.png"}
    sections = [
        rewards_section(
            rows,
            f"On {run['eval_samples']} random noises that no step saw, the same ones every time.",
            {name: folder / "eval" / file for name, file in grids.items()},
        ),
        training_section([folder], "minus the reward"),
    ]
    facts = [f"{summary['steps']} steps"]
    write_run(folder, "Training on rewards: {model}", facts, sections, summary, flags)


def fit_section(summary: Json) -> Section:
    """Loss of an sft run on its matched pairs, before and after."""
    before, after = summary["matched_loss_before"], summary["matched_loss_after"]
    row = page.row("mean latent loss", page.change(before, after))
    kind = "lora" if summary["settings"].get("lora_rank") else "checkpoint"
    by = "best on held-out images" if "measured" in summary else "one of the lowest loss"
    best = f"{kind}-best holds epoch {summary['best_epoch']}, the {by}."
    return Section(
        "Fit to the matched pairs", [best], Table(("", "before", "after", "change"), [row])
    )


def training_section(folders: Sequence[Path], match: str = "matching") -> Section | None:
    """Training curves of one or more M-steps, one after the other; ``match`` is what they lower."""
    history = [row for folder in folders for row in read_jsonl(folder / "history.jsonl")]
    if not history:
        return None
    names = {match: "matching", "preserve": "preserve"}
    losses = {name: [row[key] for row in history] for name, key in names.items()}
    if not any(losses["preserve"]):
        del losses["preserve"]
    norms = {"gradient norm": [row["gradient_norm"] for row in history]}
    text = ["Epochs of all cycles, one after the other."] if len(folders) > 1 else []
    figures = [
        Plot(
            plots.curves(losses, "epoch", "mean loss of the epoch", first=1),
            f"{match.capitalize()} should fall. Preserve is the distance to the base generator on "
            "random noise: it rises at first, and should settle.",
        ),
        Plot(
            plots.curves(norms, "epoch", "gradient norm before clipping", first=1),
            "Bad: a norm that grows from epoch to epoch (lower the learning rate).",
        ),
    ]
    return Section("Training", text, plots=figures)


def print_summary(summary: Json, folder: Path) -> None:
    """Say what was reached, what else changed, and where it is."""
    steps, seconds = summary["steps"], summary["seconds"]
    if "base" in summary:
        print(f"trained {steps} steps on rewards in {seconds:.0f} s")
        print_change(summary)
    else:
        if "measured" in summary:
            print_answers(summary, *_last_and_best(summary))
        before, after = summary["matched_loss_before"], summary["matched_loss_after"]
        print(
            f"trained {steps} steps on {summary['samples']} pairs in {seconds:.0f} s: latent loss "
            f"on the matched noises {decimals(before)} -> {decimals(after)}"
        )
    if summary.get("cut_images"):
        say(f"warning: {summary['cut_images']}")
    print(f"checkpoint: {folder / 'checkpoint-final'}")
    if (folder / "lora-final").exists():
        print(f"LoRA: {folder / 'lora-final'}")
