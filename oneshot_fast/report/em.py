"""The pages of ``python -m oneshot_fast.em``: by targets, and by rewards."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.jobs.em.trials import said_of_recipe
from oneshot_fast.report import page, plots
from oneshot_fast.report.assign import examples_section
from oneshot_fast.report.measures import (
    answer_section,
    measures_table,
    print_answers,
    print_measures,
    verdict_of,
)
from oneshot_fast.report.noise import noise_section
from oneshot_fast.report.optimize import found_section
from oneshot_fast.report.page import (
    Plot,
    Section,
    Strip,
    Table,
    number,
    percent,
    picture,
    strip,
    write_run,
)
from oneshot_fast.report.rewards import draw_histories, rewards_section
from oneshot_fast.report.sft import training_section
from oneshot_fast.runtime.files import Json, read_json, read_jsonl
from oneshot_fast.runtime.units import decimals, duration

_GRID_SIDE = 1280


def write_em_report(folder: Path, flags: Mapping[str, Any]) -> None:
    """Write report.html of the finished em run in ``folder``, and by rewards curves.png."""
    summary = read_json(folder / "summary.json")
    by_reward = "search" in summary["cycles"][0]
    title = "EM by rewards: {model}" if by_reward else "EM: {model} aligned with {data}"
    sections = (_reward_sections if by_reward else _target_sections)(folder, summary)
    facts = [f"{len(summary['cycles'])} cycles"]
    samples = summary.get("settings", {}).get("samples")
    facts += [f"{samples} training pairs"] if samples else []
    write_run(folder, title, facts, sections, summary, flags)


def _target_sections(folder: Path, summary: Json) -> list[Section | None]:
    count, trained = len(summary["cycles"]), _trained(folder, summary)
    last, of = folder / f"cycle-{count:02d}" / "assign", f" of cycle {count}"
    return [
        answer_section(folder, summary, *_last_and_best(summary)),
        trials_section(summary),
        random_noise_section(folder, summary),
        heldout_section(folder, summary),
        cycles_section(summary),
        examples_section(last, of),
        training_section(trained),
        noise_section(last, of),
    ]


def _reward_sections(folder: Path, summary: Json) -> list[Section | None]:
    noise, cycles = summary["random_noise"], summary["cycles"]
    names = ["base", *(f"cycle-{row['cycle']:02d}" for row in cycles)]
    rows = [{"epoch": k, **noise[name]} for k, name in enumerate(names)]
    draw_histories({"": rows}, folder / "curves.png", "cycle")
    text = f"On {noise['base']['samples']} random noises, the same ones every time."
    grids = {name: folder / "eval" / f"{name}.png" for name in (names[0], names[-1])}
    return [
        rewards_section(rows, text, grids, "cycle"),
        _searches_section(cycles),
        found_section(folder / names[-1] / "assign", f" of cycle {len(cycles)}"),
        training_section(_trained(folder, summary)),
    ]


def _trained(folder: Path, summary: Json) -> list[Path]:
    return [folder / f"cycle-{row['cycle']:02d}" / "sft" for row in summary["cycles"]]


def _searches_section(cycles: Sequence[Mapping[str, Any]]) -> Section:
    """What each E-step found."""
    rows = []
    for cycle in cycles:
        before, after = (cycle["search"][name] for name in ("initial_reward", "best_reward"))
        cells = [number(value) for value in (before, after, after - before)]
        rows.append(page.row(f"cycle {cycle['cycle']}", cells))
    text = "Mean reward of random noises and of the best found from each: the M-step's targets."
    return Section("Search", [text], Table(("", "random noise", "found", "gain"), rows))


def _last_and_best(summary: Json) -> tuple[str, str | None]:
    """Names of the last cycle, and of the best."""
    best = summary.get("best_cycle")
    named = "base" if best == 0 else None if best is None else f"cycle-{best:02d}"
    return f"cycle-{len(summary['cycles']):02d}", named


def random_noise_section(folder: Path, summary: Json) -> Section:
    """What a user of the generator gets: quality on random noise, before and after."""
    noise = summary["random_noise"]
    names = [name for name in noise if name.startswith("cycle-")]
    last = names[-1]
    columns = {"base": "base", **{name: f"cycle {int(name[-2:])}" for name in names}}
    columns[last] += " (final)"
    columns |= {"direct": "direct SFT"} if "direct" in noise else {}
    measured = {**noise, "real": summary.get("real", {})}
    columns |= {"real": "real images"} if measured["real"] else {}
    text = [
        f"Each column: the same {noise['base']['samples']} fresh random noises and prompts, so "
        "only the generator differs. This is what its users get.",
    ]
    if "direct" in noise:
        text.append(
            "Direct SFT is the baseline: as many training steps on the same targets, with random "
            "noises instead of assigned ones."
        )
    grids = {
        name: picture(path, _GRID_SIDE, label)
        for name, label in columns.items()
        if (path := folder / "eval" / f"{name}.png").is_file()
    }
    main = [grids.pop(name) for name in ("base", last, "direct") if name in grids]
    table = measures_table(columns, measured, last, summary.get("verdicts", {}).get(last))
    return Section("Quality on random noise", text, table, main, list(grids.values()))


def trials_section(summary: Json) -> Section | None:
    """What the trials of --recipe auto said, and what they took."""
    found = summary.get("recipe")
    if not found:
        return None
    rows = []
    for trial in found["trials"]:
        name = f"{trial['method']}, {trial['lr']:.2g}"
        if trial["verdict"] is None:
            rows.append(page.row(name, ("", "", "", trial["reason"])))
            continue
        verdict = verdict_of(trial["verdict"])
        change, word = percent(verdict.after, verdict.before), verdict.word
        rows.append(page.row(name, (number(verdict.before), number(verdict.after), change, word)))
    text = [
        said_of_recipe(found).capitalize() + ".",
        f"Trials: a cycle with half the E-step on {found['trained_on']} of the targets, judged by "
        f"{found['judged_by']} other images; {duration(found['seconds'])} of "
        f"{duration(summary['seconds'])} in all. The first ones find noises in two ways, the "
        "others take the better one with other learning rates.",
    ]
    head = ("method, learning rate", "base", "trial", "change of energy score", "verdict")
    return Section("Which recipe", text, Table(head, rows))


def heldout_section(folder: Path, summary: Json) -> Section | None:
    """Pairs never trained on, assigned with the first and the last generator."""
    heldout = summary.get("heldout")
    if not heldout or "final" not in heldout:
        return None
    base, final = heldout["base"], heldout["final"]
    rows = [
        page.row(f"{name} generator", page.change(part["initial_loss"], part["best_loss"]))
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
    return strip(
        ("target", "base generator", "final generator", "loss"),
        (
            (
                row["prompt"],
                [
                    base / "images" / f"{row['id']}-target.png",
                    base / "images" / f"{row['id']}-assigned.png",
                    final / "images" / f"{row['id']}-assigned.png",
                ],
                f"{number(row['best_loss'])} → {number(finals[row['id']]['best_loss'])}",
            )
            for row in read_jsonl(base / "manifest.jsonl")
            if row["id"] in finals
        ),
    )


def cycles_section(summary: Json) -> Section:
    """Assigned loss before and after each E-step, and after each M-step."""
    cycles = summary["cycles"]
    rows, stages = [], []
    for cycle in cycles:
        assign, after = cycle["assign"], cycle["sft"]["matched_loss_after"]
        cells = (
            *page.change(assign["initial_loss"], assign["best_loss"]),
            *page.change(assign["best_loss"], after)[1:],
        )
        rows.append(page.row(f"cycle {cycle['cycle']}", cells))
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


def print_summary(summary: Json, folder: Path) -> None:
    """Say what the run in ``folder`` has reached and where it is, as the command does."""
    noise = {**summary["random_noise"], "real images": summary.get("real")}
    names = ("base", "final", "direct", "real images")
    cycles, by_reward = summary["cycles"], "search" in summary["cycles"][0]
    if summary.get("recipe"):
        print(f"\n{said_of_recipe(summary['recipe'])}")
    if not by_reward:
        print()
        print_answers(summary, *_last_and_best(summary))
    print(f"\nOn {noise['base']['samples']} random noises:")
    print_measures({name: noise[name] for name in names if noise.get(name)})
    if not by_reward:
        print("\nMatching loss, before -> after the E-step -> after the M-step:")
    for row in cycles:
        if by_reward:
            found = (row["search"][name] for name in ("initial_reward", "best_reward"))
            gain = " -> ".join(map(decimals, found))
            print(f"search of cycle {row['cycle']}: mean reward {gain}")
        else:
            losses = [row["assign"][name] for name in ("initial_loss", "best_loss")]
            losses.append(row["sft"]["matched_loss_after"])
            print(f"cycle {row['cycle']:<4}     {' -> '.join(map(decimals, losses))}")
    if "heldout" in summary:
        base, final = (summary["heldout"][name]["best_loss"] for name in ("base", "final"))
        print(
            f"{summary['heldout']['samples']} held-out pairs, assigned: {base:.4f} with the base "
            f"model, {final:.4f} with the final one ({100 * (final / base - 1):+.0f} %)"
        )
    if cut := cycles[0].get("cut_images"):
        print(f"warning: {cut}", file=sys.stderr)
    print(f"\ntook {summary['seconds']:.0f} s; checkpoint: {folder / 'checkpoint-final'}")
