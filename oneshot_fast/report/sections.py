"""Sections of the reports that speak of images and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from oneshot_fast.report import plots
from oneshot_fast.report.page import (
    Cell,
    Example,
    Mood,
    Plot,
    Row,
    Section,
    Strip,
    Table,
    number,
    percent,
    picture,
)
from oneshot_fast.runtime.files import Json, read_jsonl

_SHOWN = 16
_EXAMPLE_SIDE, _GRID_SIDE = 192, 1280


def random_noise_section(folder: Path, summary: Json) -> Section | None:
    """What a user of the generator gets: quality on random noise, before and after."""
    noise = summary["random_noise"]
    if "base" not in noise or "final" not in noise:
        return None
    names = [name for name in noise if name.startswith("cycle-")]
    last = names[-1] if names else "final"
    columns = {"base": "base", **{name: f"cycle {int(name[-2:])}" for name in names}}
    columns[last] = "final" if last == "final" else f"{columns[last]} (final)"
    columns |= {"direct": "direct SFT"} if "direct" in noise else {}
    measured = {**noise, "real": summary.get("real", {})}
    columns |= {"real": "real images"} if measured["real"] else {}
    rows = [found for key in _METRICS if (found := _metric_row(key, columns, measured))]
    text = [
        f"Each column: the same {noise['base']['samples']} fresh random noises and prompts, so "
        "only the generator differs. This is what its users get.",
    ]
    if "direct" in noise:
        text.append(
            "Direct SFT is the baseline: as many training steps on the same targets, with random "
            "noises instead of assigned ones."
        )
    if "best_cycle" in summary and f"cycle-{summary['best_cycle']:02d}" != last:
        text.append(f"checkpoint-best is cycle {summary['best_cycle']}, not the final one.")
    grids = {
        name: picture(path, _GRID_SIDE, label)
        for name, label in columns.items()
        if (path := folder / "eval" / f"{name}.png").is_file()
    }
    main = [grids.pop(name) for name in ("base", last, "direct") if name in grids]
    table = Table(("", *columns.values(), "final against base"), rows)
    return Section("Quality on random noise", text, table, main, list(grids.values()))


# Key: name, which direction is good, plain words.
_METRICS = {
    "accuracy": (
        "Prompt accuracy",
        "↑ higher is better",
        "images that a classifier recognises as what was prompted",
    ),
    "frechet_distance": (
        "Fréchet distance",
        "↓ lower is better",
        "distance to the held-out targets in a classifier's features",
    ),
    "diversity": (
        "Diversity",
        "↑ higher is better",
        "pixel distance between images of one prompt; 0: all alike",
    ),
    "drift": (
        "Drift",
        "neither good nor bad",
        "RMS latent distance to the base generator, same noises",
    ),
}


def _metric_row(key: str, columns: Mapping[str, str], measured: Mapping[str, Json]) -> Row | None:
    name, direction, words = _METRICS[key]
    if key not in measured["base"]:
        return None
    values = [measured[column].get(key) for column in columns]
    is_share = key == "accuracy"
    texts = ["" if v is None else f"{100 * v:.1f} %" if is_share else number(v) for v in values]
    base, final = measured["base"][key], measured["final"][key]
    change = f"{100 * (final - base):+.1f} points" if is_share else percent(final, base)
    mood = _mood(key, base, final, measured["real"].get("diversity", 0.0))
    return Row(name, [*map(Cell, texts), Cell(change, mood)], direction, words)


def _mood(key: str, base: float, final: float, real_diversity: float) -> Mood:
    """Whether a change is good or bad; what is neither, or within tolerance, stays uncoloured."""
    if key == "accuracy":
        return "bad" if final < base - 0.05 else "good" if final > base else ""
    if key == "frechet_distance":
        return "good" if final < base else "bad"
    return "bad" if key == "diversity" and final < real_diversity / 2 else ""


def heldout_section(folder: Path, summary: Json) -> Section | None:
    """Pairs never trained on, assigned with the first and the last generator."""
    heldout = summary.get("heldout")
    if not heldout or "final" not in heldout:
        return None
    base, final = heldout["base"], heldout["final"]
    rows = [
        _row(f"{name} generator", _assigned_cells(part))
        for name, part in (("base", base), ("final", final))
    ]
    change = 100 * (final["best_loss"] / base["best_loss"] - 1)
    text = [
        f"{heldout.get('samples', '')} pairs that the generator never saw, each assigned a noise "
        "with the same number of steps. A generator that has learned the images' style, rather "
        "than the training pairs by heart, comes closer to them. After assignment, the loss of "
        f"the final generator is {abs(change):.1f} % {'lower' if change < 0 else 'higher'} than "
        "the base generator's."
    ]
    lines = {"base generator": base["losses"], "final generator": final["losses"]}
    curve = plots.curves(lines, "assignment step", "mean loss on held-out pairs")
    caption = "Lower is closer to the held-out targets. Bad: the final curve ends above the base."
    table = Table(("", "random noise", "assigned noise", "change"), rows)
    strip = _heldout_strip(folder / "heldout-base", folder / "heldout-final")
    return Section("Held-out pairs", text, table, strip=strip, plots=[Plot(curve, caption)])


def _heldout_strip(base: Path, final: Path) -> Strip | None:
    finals = {row["id"]: row for row in read_jsonl(final / "manifest.jsonl")}
    examples = []
    for row in read_jsonl(base / "manifest.jsonl"):
        files = [base / "images" / f"{row['id']}-{name}.png" for name in ("target", "assigned")]
        files.append(final / "images" / f"{row['id']}-assigned.png")
        if row["id"] in finals and all(file.is_file() for file in files):
            note = f"{number(row['best_loss'])} → {number(finals[row['id']]['best_loss'])}"
            pictures = [picture(file, _EXAMPLE_SIDE) for file in files]
            examples.append(Example(row["prompt"], pictures, note))
    names = ("target", "base generator", "final generator", "loss")
    return Strip(names, examples[:_SHOWN]) if examples else None


def cycles_section(summary: Json) -> Section | None:
    """Assigned loss before and after each E-step, and after each M-step."""
    cycles = summary["cycles"]
    if not cycles:
        return None
    rows, stages = [], []
    for cycle in cycles:
        assign, after = cycle["assign"], cycle["sft"]["matched_loss_after"]
        cells = (*_assigned_cells(assign), number(after), percent(after, assign["best_loss"]))
        rows.append(_row(f"cycle {cycle['cycle']}", cells))
        stages.append((assign["initial_loss"], assign["best_loss"], after))
    lines = {f"cycle {cycle['cycle']}": cycle["assign"]["losses"] for cycle in cycles}
    figures = [
        Plot(
            plots.stages(stages),
            "Mean loss after each half of a cycle. Bad: an E-step or M-step that rises.",
        ),
        Plot(
            plots.curves(lines, "assignment step", "mean loss"),
            "E-steps. Bad: a curve that still falls steeply at its end (give more steps) or rises "
            "(lower the learning rate).",
        ),
    ]
    head = ("", "random noise", "after E-step", "change", "after M-step", "change")
    text = [
        "Mean distance between the generator's output and the targets. The E-step finds a noise "
        "for every target, the M-step trains on the pairs; each cycle starts from fresh noises."
    ]
    return Section("Matching loss, cycle by cycle", text, Table(head, rows), plots=figures)


def targets_section(summary: Json, rows: Sequence[Json]) -> Section:
    """Loss of the targets of an assign run before and after."""
    late = sum(row["best_step"] == summary["settings"]["steps"] for row in rows)
    worse = sum(row["best_loss"] >= row["initial_loss"] for row in rows)
    text = [
        f"{late} of {len(rows)} targets reached their lowest loss at the last step"
        + (": more steps would lower it further." if late > len(rows) / 2 else "."),
        f"{worse} found nothing better than their base noise." if worse else "",
    ]
    table = Table(
        ("", "base noise", "assigned noise", "change"),
        [_row("mean loss", _assigned_cells(summary))],
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
    examples = []
    for row in read_jsonl(folder / "manifest.jsonl"):
        files = [
            folder / "images" / f"{row['id']}-{name}.png" for name in ("target", "base", "assigned")
        ]
        if all(file.is_file() for file in files):
            note = f"{number(row['initial_loss'])} → {number(row['best_loss'])}"
            pictures = [picture(file, _EXAMPLE_SIDE) for file in files]
            examples.append(Example(row["prompt"], pictures, note))
        if len(examples) == _SHOWN:
            break
    if not examples:
        return None
    text = [
        "The same generator for both noises; the assigned one should look more like the target."
    ]
    names = ("target", "base noise", "assigned noise", "loss")
    return Section(f"Assigned examples{of}", text, strip=Strip(names, examples))


def fit_section(summary: Json) -> Section:
    """Loss of an sft run on its matched pairs, before and after."""
    before, after = summary["matched_loss_before"], summary["matched_loss_after"]
    row = _row("mean latent loss", (number(before), number(after), percent(after, before)))
    kind = "lora" if summary["settings"].get("lora_rank") else "checkpoint"
    best = f"{kind}-best holds epoch {summary['best_epoch']}, the one of the lowest loss."
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


def _assigned_cells(part: Json) -> tuple[str, str, str]:
    before, after = part["initial_loss"], part["best_loss"]
    return number(before), number(after), percent(after, before)


def _row(name: str, cells: Sequence[str]) -> Row:
    return Row(name, [Cell(text) for text in cells])
