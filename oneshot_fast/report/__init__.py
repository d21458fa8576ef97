"""Reports of assign, sft and em runs, made from the files of the run folder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.report.noise import noise_section
from oneshot_fast.report.page import Page, Section, duration, write_page
from oneshot_fast.report.sections import (
    cycles_section,
    examples_section,
    fit_section,
    heldout_section,
    random_noise_section,
    targets_section,
    training_section,
)
from oneshot_fast.runtime.files import Json, read_json, read_jsonl


def write_assign_report(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``folder``/report.html of an assign run.

    Args:
        folder: Run folder with summary.json and manifest.jsonl; whatever else is missing from it
            (images, noises, failures) is left out of the page.
        settings: The command's flags and their values.
    """
    summary, rows = read_json(folder / "summary.json"), read_jsonl(folder / "manifest.jsonl")
    facts = [
        f"{summary['samples']} targets",
        *_common_facts(summary, settings),
        f"{summary['images_per_second']:.2f} images/s",
    ]
    sections = [targets_section(summary, rows), examples_section(folder), noise_section(folder)]
    title = f"Noise assignment: {_data_name(settings)} on {_model_name(settings)}"
    _write(folder, title, facts, sections, summary, settings)


def write_sft_report(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``folder``/report.html of an sft run; arguments as in ``write_assign_report``."""
    summary = read_json(folder / "summary.json")
    sections = [fit_section(summary), training_section([folder])]
    facts = [
        f"{summary['samples']} pairs, {summary['steps']} steps",
        *_common_facts(summary, settings),
    ]
    _write(folder, f"Training: {_model_name(settings)}", facts, sections, summary, settings)


def write_em_report(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``folder``/report.html of an em run; arguments as in ``write_assign_report``."""
    summary = read_json(folder / "summary.json")
    last = folder / f"cycle-{len(summary['cycles']):02d}"
    trained = [folder / f"cycle-{cycle['cycle']:02d}" / "sft" for cycle in summary["cycles"]]
    sections = [
        random_noise_section(folder, summary),
        heldout_section(folder, summary),
        cycles_section(summary),
        examples_section(last / "assign", f" of cycle {len(summary['cycles'])}"),
        training_section(trained),
        noise_section(last / "assign", f" of cycle {len(summary['cycles'])}"),
    ]
    run = summary.get("settings", {})
    facts = [f"{len(summary['cycles'])} cycles", *_common_facts(summary, settings)]
    facts[1:1] = [f"{run['samples']} training pairs"] if "samples" in run else []
    title = f"EM: {_model_name(settings)} aligned with {_data_name(settings)}"
    _write(folder, title, facts, sections, summary, settings)


def _write(
    folder: Path,
    title: str,
    facts: Sequence[str],
    sections: Sequence[Section | None],
    summary: Json,
    settings: Mapping[str, Any],
) -> None:
    page = Page(
        title,
        facts,
        [section for section in sections if section is not None],
        {**summary.get("settings", {}), **settings},
        read_jsonl(folder / "failures.jsonl"),
    )
    write_page(page, folder / "report.html")


def _common_facts(summary: Json, settings: Mapping[str, Any]) -> list[str]:
    """Seed, device and time, as far as they are known."""
    run = {**settings, **summary.get("settings", {})}
    facts = [f"{name} {run[name]}" for name in ("seed", "resolution", "device") if name in run]
    if "seconds" in summary:
        facts.append(duration(summary["seconds"]))
    if summary.get("failed"):
        facts.append(f"{summary['failed']} failed")
    if summary.get("truncated_prompts"):
        facts.append(f"{summary['truncated_prompts']} prompts cut off at 77 tokens")
    return facts


def _model_name(settings: Mapping[str, Any]) -> str:
    return str(settings.get("initial_model_id") or settings.get("model_id") or "the generator")


def _data_name(settings: Mapping[str, Any]) -> str:
    name = settings.get("data_root") or settings.get("target_image_path")
    return "/".join(Path(name).parts[-2:]) if name else "the embedded digits"
