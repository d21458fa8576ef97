"""What was measured on random noise: whether it is better, by how much, how sure; and a table."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.evaluation.distances import HEADLINE, Verdict
from oneshot_fast.evaluation.random_noise import shown
from oneshot_fast.report.page import (
    Cell,
    Example,
    Mood,
    Row,
    Section,
    Strip,
    Table,
    number,
    percent,
    picture_of,
)
from oneshot_fast.runtime.files import Json

Said = Mapping[str, Mapping[str, Any]]
_UP, _DOWN = "↑ higher is better", "↓ lower is better"
# Key: name, which direction is good, plain words.
METRICS = {
    "accuracy": ("prompt accuracy", _UP, "images that a classifier recognises as what was "
                 "prompted"),
    "energy_score": ("energy score", _DOWN, "mean distance to the held-out images of the same "
                     "prompt, less half of that among themselves: it decides"),
    "mmd": ("MMD", _DOWN, "kernel distance to the held-out images, unbiased; in CLIP's features "
            "the CMMD"),
    "frechet_distance": ("Fréchet distance", _DOWN, "distance to the held-out images of Gaussians "
                         "fitted to both; biased where images are few"),
    "kid": ("KID", _DOWN, "distance to the held-out images by a cubic kernel, unbiased"),
    "precision": ("precision", _UP, "images that lie among the held-out ones"),
    "recall": ("recall", _UP, "held-out images that lie among the generator's"),
    "density": ("density", _UP, "how many held-out images' neighbourhoods an image is in; 1: as "
                "real ones"),
    "coverage": ("coverage", _UP, "held-out images with one of the generator's near them"),
    "alignment": ("prompt alignment", _UP, "cosine of image and prompt in CLIP's space; by "
                  "the VAE, of what a linear probe of held-out images tells"),
    "prompt_diversity": ("diversity in features", "as real images have it", "distance of features "
                         "between images of one prompt"),
    "diversity": ("diversity", _UP, "pixel distance between images of one prompt; 0: all alike"),
    "drift": ("drift from base", "neither good nor bad", "RMS latent distance to the base "
              "generator, same noises"),
}  # fmt: skip
_MOODS: Mapping[str, Mood] = {"better": "good", "worse": "bad"}
_NO_MEASURES = ("samples", "errors")


def answer(name: str, said: Said | None, measured_by: Json) -> list[str]:
    """Whether generator ``name`` is better than the base, by how much and how sure, in words.

    Args:
        name: How it is called.
        said: Its verdicts, as in the summary.
        measured_by: Of the summary.
    """
    if not said or HEADLINE not in said:
        return [
            f"Whether {name[0].lower()}{name[1:]} is better than the base was not measured: that "
            "takes held-out images "
            "(--heldout_root DIR, or 64 pairs, of which some are held out)."
        ]
    found = verdict_of(said[HEADLINE])
    is_told = "cannot" not in found.word
    lines = [
        f"{name} {'is ' if is_told else ''}{found.word} "
        f"{'than' if is_told else 'from'} the base: energy score for {measured_by['real']} "
        f"held-out images {number(found.before)} → {number(found.after)}, {_change(found)}.",
        f"Images are compared by {measured_by['features']}.",
    ]
    if measured_by["is_weak"]:
        lines[-1] += " It sees little of what images show; a better one: --features clip, after "
        lines[-1] += "python -m oneshot_fast.download --only CLIP-ViT-L-14."
    if not is_told:
        lines.append("More held-out images, or more --eval_samples, would tell more.")
    for word in ("better", "worse"):
        names = [label(key) for key, row in said.items() if row["word"] == word and key != HEADLINE]
        lines += [f"Beyond their 95 % intervals {word}: {', '.join(names)}."] if names else []
    return lines


def answers(summary: Json, last: str, best: str | None) -> list[str]:
    """Which checkpoint is the best, and what the final one and it are against the base.

    ``last`` and ``best`` are keys of the summary's verdicts, "base" where nothing beat it.
    """
    said, by = summary.get("verdicts", {}), summary.get("measured_by", {})
    lines = answer("The final generator", said.get(last), by)
    if best == "base":
        first = "Nothing beat the base by a standard error: checkpoint-best is the base."
        return [first, *lines]
    if best is not None and best != last:
        return [*answer(f"{spoken(best)}, checkpoint-best,", said.get(best), by)[:1], *lines]
    return lines


def answer_section(folder: Path, summary: Json, last: str, best: str | None) -> Section:
    """Is it better, by how much, how sure; and the same noises before and after."""
    names = {"base": "base"}
    if best is not None and best not in ("base", last):
        names[f"{spoken(best)} (best)"] = best
    names[f"{spoken(last)} (final)"] = last
    files = {label.lower(): folder / "eval" / name for label, name in names.items()}
    strip = noises_strip(files, summary.get("measured_by", {}).get("prompts", []))
    return Section("Is it better?", answers(summary, last, best), strip=strip)


def print_answers(summary: Json, last: str, best: str | None) -> None:
    """Print ``answers``."""
    print("\n".join(answers(summary, last, best)).replace("→", "->").replace("é", "e"))


def spoken(name: str) -> str:
    """Such as "Cycle 2" of "cycle-02"."""
    kind, _, number = name.partition("-")
    return f"{kind} {int(number)}".capitalize() if number else name.capitalize()


def _change(found: Verdict) -> str:
    """The change with its interval, in percent where the first value is clearly above 0."""
    change, (low, high) = found.after - found.before, found.interval
    if found.before > 2 * found.error:
        change, low, high = (100 * value / found.before for value in (change, low, high))
        return f"{change:+.0f} % (95 % interval {low:+.0f} to {high:+.0f} %)"
    return f"{_signed(change)} (95 % interval {_signed(low)} to {_signed(high)})"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"


def verdict_of(row: Mapping[str, Any]) -> Verdict:
    """A verdict of the summary."""
    return Verdict(**{field.name: row[field.name] for field in dataclasses.fields(Verdict)})


def label(key: str) -> str:
    """How a measure is called."""
    return METRICS[key][0] if key in METRICS else key


def keys_of(measured: Mapping[str, Any]) -> list[str]:
    """The measures that are there, in the tables' order."""
    return [key for key in {**METRICS, **measured} if key in measured and key not in _NO_MEASURES]


def measures_table(
    columns: Mapping[str, str], measured: Mapping[str, Json], last: str, said: Said | None
) -> Table:
    """A row per measure, with standard errors, and a last column of the change.

    Args:
        columns: Names of the columns by their keys in ``measured``; "base" is among them.
        measured: Measures by column.
        last: The column that is compared with the base.
        said: Its verdicts.
    """
    found = (_row(key, columns, measured, last, said or {}) for key in keys_of(measured["base"]))
    change = f"{columns.get(last, last)} against base"
    return Table(("", *columns.values(), change), [row for row in found if row])


def _row(
    key: str, columns: Mapping[str, str], measured: Mapping[str, Json], last: str, said: Said
) -> Row:
    title, direction, words = METRICS.get(key, (key, _UP, ""))
    is_share = key == "accuracy"
    texts = []
    for name in columns:
        value, error = measured[name].get(key), measured[name].get("errors", {}).get(key)
        text = "" if value is None else f"{100 * value:.1f} %" if is_share else number(value)
        texts.append(text if not error or not text else f"{text} ± {_rounded(error)}")
    base, final = measured["base"][key], measured[last][key]
    change = ""
    mood: Mood = ""
    if base is not None and final is not None:  # finite
        change = f"{100 * (final - base):+.1f} points" if is_share else percent(final, base)
        if key in said:
            found = verdict_of(said[key])
            mood = _MOODS.get(found.word, "")
            change = _change(found).split(" (")[0]
            change += ", not told apart" if "cannot" in found.word else ""
        else:
            mood = _mood(key, base, final, measured.get("real", {}).get("diversity") or 0.0)
    title = title[0].upper() + title[1:]
    return Row(title, [*map(Cell, texts), Cell(change, mood)], direction, words)


def _rounded(error: float) -> str:
    return f"{error:.2g}" if error < 100 else f"{error:.0f}"


def _mood(key: str, base: float, final: float, real_diversity: float) -> Mood:
    """Whether a change is good or bad; what is neither, or within tolerance, stays uncoloured."""
    if key == "accuracy":
        return "bad" if final < base - 0.05 else "good" if final > base else ""
    if key == "frechet_distance":
        return "good" if final < base else "bad"
    return "bad" if key == "diversity" and final < real_diversity / 2 else ""


def noises_strip(paths: Mapping[str, Path], prompts: Sequence[str]) -> Strip | None:
    """What generators make of the same first noises, one under the other.

    ``paths`` are results of ``RandomNoiseMeasure`` by what they are called; one that is not there
    is left out.
    """
    there = {n: p for n, p in paths.items() if p.with_name(f"{p.name}.safetensors").is_file()}
    rows = [shown(path) for path in there.values()]
    examples = [
        Example(prompt, [picture_of(images[k]) for images in rows])
        for k, prompt in enumerate(prompts)
    ]
    return Strip([*there], examples) if rows else None


def print_measures(columns: Mapping[str, Json]) -> None:
    """Print measures on random noise, those of the first column, side by side."""
    print(f"{'':24}" + "".join(f"{name[-13:]:>14}" for name in columns))
    for key in keys_of(next(iter(columns.values()))):
        found = [column.get(key) for column in columns.values()]
        cells = [f"{'-':>14}" if value is None else f"{value:14.3f}" for value in found]
        print(f"{label(key).replace('é', 'e'):24}" + "".join(cells))
