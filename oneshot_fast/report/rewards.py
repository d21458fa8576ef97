"""The page and the picture of trainings on rewards: what rose, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot_fast.report.optimize import found_section
from oneshot_fast.report.page import (
    Cell,
    Mood,
    Page,
    Plot,
    Row,
    Section,
    Table,
    duration,
    number,
    percent,
    picture,
    write_page,
)
from oneshot_fast.report.plots import PALETTE, inline_svg
from oneshot_fast.report.sections import training_section
from oneshot_fast.runtime.files import read_json, read_jsonl, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]
_GRID_SIDE = 1280
_OF_THE_STEPS = ("epoch", "samples", "step", "loss", "matching", "preserve", "gradient_norm")
_LAST = ("accuracy", "diversity", "drift")


def write_reward_report(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``folder``/curves.png and ``folder``/report.html of a training on rewards.

    Args:
        folder: Finished run folder of ``RewardRun``.
        settings: The command's flags and their values.
    """
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
    _write(folder, "Training on rewards", f"{summary['steps']} steps", sections, summary, settings)


def write_em_reward_report(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``folder``/curves.png and ``folder``/report.html of an em run by rewards.

    Args:
        folder: Finished run folder of ``RewardEmRun``.
        settings: The command's flags and their values.
    """
    summary = read_json(folder / "summary.json")
    noise, cycles = summary["random_noise"], summary["cycles"]
    names = ["base", *(f"cycle-{row['cycle']:02d}" for row in cycles)]
    rows = [{"epoch": k, **noise[name]} for k, name in enumerate(names)]
    draw_histories({"": rows}, folder / "curves.png", "cycle")
    run = summary["settings"]
    text = f"On {run['eval_samples']} random noises, the same ones every time."
    grids = {name: folder / "eval" / f"{name}.png" for name in (names[0], names[-1])}
    sections = [
        rewards_section(rows, text, grids, "cycle"),
        _searches_section(cycles),
        found_section(folder / names[-1] / "assign", f" of cycle {len(cycles)}"),
        training_section([folder / name / "sft" for name in names[1:]]),
    ]
    _write(folder, "EM by rewards", f"{len(cycles)} cycles", sections, summary, settings)


def _searches_section(cycles: Sequence[Mapping[str, Any]]) -> Section:
    """What each E-step found."""
    rows = []
    for cycle in cycles:
        before, after = (cycle["search"][name] for name in ("initial_reward", "best_reward"))
        cells = [Cell(number(before)), Cell(number(after)), Cell(number(after - before))]
        rows.append(Row(f"cycle {cycle['cycle']}", cells))
    text = "Mean reward of random noises and of the best found from each: the M-step's targets."
    return Section("Search", [text], Table(("", "random noise", "found", "gain"), rows))


def _write(
    folder: Path,
    title: str,
    fact: str,
    sections: Sequence[Section | None],
    summary: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    run = summary["settings"]
    facts = [fact, f"seed {run['seed']}", f"device {run['device']}", duration(summary["seconds"])]
    model = settings.get("initial_model_id") or settings.get("model_id") or "the generator"
    page = Page(
        f"{title}: {model}",
        facts,
        [section for section in sections if section is not None],
        {**settings, **run},
        read_jsonl(folder / "failures.jsonl"),
    )
    write_page(page, folder / "report.html")


def history(folder: Path) -> list[dict[str, Any]]:
    """What was measured in a finished run of ``RewardRun``, from epoch 0, the base."""
    base = read_json(folder / "summary.json")["base"]
    return [{"epoch": 0, **base}, *read_jsonl(folder / "history.jsonl")]


def rewards_section(
    rows: History, text: str, grids: Mapping[str, Path], unit: str = "epoch"
) -> Section:
    """Rewards, judges, diversity and drift before and after, and over the epochs.

    Args:
        rows: Of ``history``.
        text: On what was measured.
        grids: Pictures by caption.
        unit: After what each row was measured.
    """
    plot = Plot(
        inline_svg(_draw)({"": rows}, unit, 2),
        f"Measured after each {unit}. Bad: a reward that rises while a judge or the diversity "
        f"falls, which is over-optimisation; take fewer {unit}s, or a larger preserve weight.",
    )
    table = Table(
        ("mean", "base", "final", "change"),
        [_row(name, rows[0][name], rows[-1][name]) for name in _measures(rows)],
    )
    pictures = [picture(path, _GRID_SIDE, name) for name, path in grids.items()]
    words = [text, *costs(rows, unit)]
    return Section("Rewards, and what they cost", words, table, pictures, plots=[plot])


def costs(rows: History, unit: str = "epoch") -> list[str]:
    """In words how the judges and the diversity fared; rows of ``history``."""
    found = []
    for name in _measures(rows):
        values = [row[name] for row in rows]
        if name.startswith("judge ") or name == "accuracy":
            turn = "fell" if values[-1] < values[0] else "did not fall"
            best = max(range(len(values)), key=values.__getitem__)
            when = f"after {unit} {rows[best]['epoch']}" if best else "before training"
            found.append(
                f"{name}, which was not trained on, {turn}: {number(values[0])} to "
                f"{number(values[-1])}; highest {when}."
            )
        if name == "diversity":
            change = percent(values[-1], values[0])
            found.append(f"The diversity within a prompt changed by {change}.")
    return found


def draw_histories(histories: Mapping[str, History], path: Path, unit: str = "epoch") -> None:
    """Write ``path``, a PNG: every measure over the epochs, a line per training.

    Args:
        histories: Rows of ``history`` by the training's name.
        path: The picture.
        unit: After what each row was measured.
    """
    with replacing(path) as temporary:
        _draw(histories, unit, 3).savefig(temporary, format="png", dpi=110)


def _measures(rows: History) -> list[str]:
    """Names of what was measured: rewards, judges, then what they cost."""
    names = [name for name in rows[0] if name not in (*_OF_THE_STEPS, *_LAST)]
    if len([name for name in names if not name.startswith("judge ")]) == 2:
        names.remove("reward")  # it is but the one there is, times its weight
    return [*names, *(name for name in _LAST if name in rows[0])]


def _row(name: str, base: float, final: float) -> Row:
    mood: Mood = "" if final == base or name == "drift" else "good" if final > base else "bad"
    label = "weighted sum" if name == "reward" else name
    change = f"{'+' if final > base else ''}{number(final - base)}"
    return Row(label, [Cell(number(base)), Cell(number(final)), Cell(change, mood)])


def _draw(histories: Mapping[str, History], unit: str, columns: int) -> Figure:
    """A panel per measure, a line per training."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    measures = _measures(next(iter(histories.values())))
    rows = -(-len(measures) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False).flat
    for axes, measure in zip(panels, measures, strict=False):
        for k, (name, found) in enumerate(histories.items()):
            epochs, values = [row["epoch"] for row in found], [row[measure] for row in found]
            color = PALETTE[k % len(PALETTE)]
            axes.plot(epochs, values, color=color, label=name, marker="o", markersize=3)
        title = "weighted sum" if measure == "reward" else measure
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(measures) :]:
        axes.set_visible(False)
    if len(histories) > 1:
        lines, names = panels[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False)
    return figure
