"""The one writer of a run's page: its own sections, and what every page says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.report.page import Page, Section, write_page
from oneshot_fast.runtime.files import Json, read_jsonl
from oneshot_fast.runtime.units import duration


def write_run(
    folder: Path,
    title: str,
    facts: Sequence[str],
    sections: Sequence[Section | None],
    summary: Json,
    flags: Mapping[str, Any],
) -> None:
    """Write ``folder``/report.html.

    Args:
        folder: The run's folder; whatever is missing from it is left out of the page.
        title: With {model} and {data} where their names belong.
        facts: What else to say below the title.
        sections: Of the page; None is left out.
        summary: The run's summary, with its settings.
        flags: The command's flags and their values; the run's settings go before them.
    """
    settings = {**flags, **summary.get("settings", {})}
    model = flags.get("initial_model_id") or flags.get("model_id") or "the generator"
    names = [name for name in ("seed", "resolution", "device") if name in settings]
    facts = [*facts, *(f"{name} {settings[name]}" for name in names)]
    for key, text in (
        ("seconds", duration),
        ("failed", "{} failed".format),
        ("truncated_prompts", "{} prompts cut off at 77 tokens".format),
        ("images_per_second", "{:.2f} images/s".format),
    ):
        facts += [text(summary[key])] if summary.get(key) else []
    page = Page(
        title.format(model=model, data=_data_name(flags)),
        facts,
        [section for section in sections if section is not None],
        settings,
        read_jsonl(folder / "failures.jsonl"),
    )
    write_page(page, folder / "report.html")


def _data_name(flags: Mapping[str, Any]) -> str:
    name = flags.get("data_root") or flags.get("target_image_path")
    return "/".join(Path(name).parts[-2:]) if name else "the embedded digits"
