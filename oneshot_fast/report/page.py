"""The parts of a report page, and how they become one self-contained HTML file."""

import base64
import functools
import io
import itertools
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image
from torch import Tensor

from oneshot_fast.data.images import to_pil
from oneshot_fast.runtime.files import Json, read_jsonl, write_text
from oneshot_fast.runtime.units import duration

# Images up to this side are few pixels shown large; larger ones are shown smooth.
_PIXEL_ART = 128
_KEPT_BYTES = 300_000
_SHOWN = 16
_PACKAGES = (
    "oneshot-fast", "torch", "diffusers", "transformers", "accelerate", "safetensors", "triton",
)  # fmt: skip


Mood = Literal["", "good", "bad"]


@dataclass(frozen=True)
class Cell:
    """Text of a table cell, coloured by ``mood``."""

    text: str
    mood: Mood = ""


@dataclass(frozen=True)
class Row:
    """A table row: its name, one cell per column, a hint beside the name and words about it."""

    name: str
    cells: Sequence[Cell]
    hint: str = ""
    words: str = ""


@dataclass(frozen=True)
class Table:
    """A table; ``head`` names all columns, that of the rows' names included."""

    head: Sequence[str]
    rows: Sequence[Row]
    dense: bool = False
    """Words beside the names instead of below."""


@dataclass(frozen=True)
class Picture:
    """An image as a data URI under a caption."""

    uri: str
    caption: str = ""
    pixelated: bool = False


@dataclass(frozen=True)
class Example:
    """One column of a strip: the images of one target, one under the other."""

    caption: str
    pictures: Sequence[Picture]
    note: str = ""


@dataclass(frozen=True)
class Strip:
    """Targets side by side; ``rows`` names the images of each."""

    rows: Sequence[str]
    examples: Sequence[Example]


@dataclass(frozen=True)
class Plot:
    """Inline SVG, made by us, with one sentence on what it shows and what would be bad."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A titled part of the page; whatever is empty is left out."""

    title: str
    text: Sequence[str] = ()
    table: Table | None = None
    grids: Sequence[Picture] = ()
    more_grids: Sequence[Picture] = ()
    strip: Strip | None = None
    plots: Sequence[Plot] = ()


def write_run(
    folder: Path,
    title: str,
    facts: Sequence[str],
    sections: Sequence[Section | None],
    summary: Json,
    flags: Mapping[str, Any],
) -> None:
    """Write ``folder``/report.html, which needs no other file, no network and no scripts.

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
    data = flags.get("data_root") or flags.get("target_image_path")
    data = "/".join(Path(data).parts[-2:]) if data else "the embedded digits"
    page = {
        "title": title.format(model=model, data=data),
        "facts": [*facts, *_common_facts(summary, settings)],
        "sections": [section for section in sections if section is not None],
        "settings": settings,
        "failures": read_jsonl(folder / "failures.jsonl"),
        "versions": versions(),
    }
    write_text(folder / "report.html", template().render(page=page))


@functools.cache
def template() -> Template:
    """Compiled once in a process, as that takes longer than a page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _common_facts(summary: Json, settings: Json) -> list[str]:
    names = ("seed", "resolution", "width", "height", "device")
    facts = [f"{name} {settings[name]}" for name in names if settings.get(name) is not None]
    for key, text in (
        ("seconds", duration),
        ("failed", "{} failed".format),
        ("truncated_prompts", "{} prompts cut off".format),
        ("cut_images", str),
        ("images_per_second", "{:.2f} images/s".format),
    ):
        facts += [text(summary[key])] if summary.get(key) else []
    return facts


def versions() -> dict[str, str]:
    """What this process runs on; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def picture(path: Path, limit: int, caption: str = "") -> Picture:
    """Embed an image, made smaller if it is larger than ``limit`` pixels a side or 300 kB.

    One that cannot be read is said to be so, in a page that has all else.
    """
    try:
        with Image.open(path) as image:
            pixelated = max(image.size) <= _PIXEL_ART
            if max(image.size) <= limit and path.stat().st_size <= _KEPT_BYTES:
                data, kind = path.read_bytes(), "png"
            else:
                small = image.convert("RGB")
                small.thumbnail((limit, limit), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=85, optimize=True)
                data, kind = buffer.getvalue(), "jpeg"
    except (OSError, SyntaxError, ValueError):  # what PIL raises for damaged files
        return Picture("data:,", f"{caption} (cannot be read)".strip())
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(uri, caption, pixelated)


def picture_of(image: Tensor, caption: str = "") -> Picture:
    """Embed an RGB image [3, H, W], uint8 or floats in [0, 1]."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(uri, caption, max(image.shape) <= _PIXEL_ART)


def number(value: float | None) -> str:
    """Four significant digits without an exponent, where that is readable; None is not finite."""
    if value is None:
        return "not finite"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def percent(after: float | None, before: float | None) -> str:
    """Relative change, signed."""
    return f"{100 * (after / before - 1):+.1f} %" if before and after is not None else ""


def change(before: float | None, after: float | None) -> tuple[str, str, str]:
    """Two numbers and the relative change between them: cells of a table."""
    return number(before), number(after), percent(after, before)


def gain_cell(before: float, after: float, mood: Mood | None = None) -> Cell:
    """The absolute change, signed; by default a rise is good."""
    gain = after - before
    judged: Mood = "good" if gain > 0 else "bad"
    return Cell(f"{'+' if gain > 0 else ''}{number(gain)}", judged if mood is None else mood)


def row(name: str, cells: Sequence[str]) -> Row:
    """A table row of plain cells."""
    return Row(name, [Cell(text) for text in cells])


def strip(
    names: Sequence[str], examples: Iterable[tuple[str, Sequence[Path], str]], side: int = 192
) -> Strip | None:
    """At most 16 examples whose images are all there; None if there is none.

    ``names`` are of the images of each and of the note, ``examples`` caption, images and note of
    each, ``side`` is the largest image side in pixels.
    """
    there = (example for example in examples if all(path.is_file() for path in example[1]))
    shown = [
        Example(caption, [picture(path, side) for path in paths], note)
        for caption, paths, note in itertools.islice(there, _SHOWN)
    ]
    return Strip(names, shown) if shown else None
