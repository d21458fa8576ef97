"""The page and the picture of ``python -m oneshot_fast.theory``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oneshot_fast.report.noise import checks_table
from oneshot_fast.report.page import Plot, Section, number, write_run
from oneshot_fast.report.plots import GREY, PALETTE, inline_svg, new_axes
from oneshot_fast.runtime.files import replacing

Sets = Mapping[str, Mapping[str, Any]]

_WORDS = {
    "base": "Fresh Gaussian noise, for comparison.",
    "fixed rotation": (
        "Every patch turned by a rotation that does not know the noise. The law of N(0, I) is "
        "symmetric under rotations, so nothing may change beyond sampling noise."
    ),
    "chosen rotation": (
        "Each noise is turned as a whole, by the rotation that brings its patches closest to one "
        "pattern. Every single noise keeps its energy and its patch covariance's eigenvalues, but "
        "all of them now share the pattern: together they are not independent Gaussian samples."
    ),
    "assigned noises": (
        "Each of these noises was found for its target. Whatever they have in common beyond the "
        "allowed ranges is what the choice has put there."
    ),
}


def write_theory_report(folder: Path, found: Mapping[str, Any]) -> None:
    """Write ``folder``/theory.png and ``folder``/report.html of theory.json's content."""
    sets = found["sets"]
    with replacing(folder / "theory.png") as path:
        _picture(sets).savefig(path, format="png")
    plots = [Plot(_svg(key, sets), caption) for key, (_, _, caption) in _PANELS.items()]
    settings = found["settings"]
    D = settings["channels"] * settings["patch_size"] ** 2
    facts = [f"{D} elements a patch"]
    sections = [
        Section("The distributions", [], plots=plots),
        *(_section(name, part) for name, part in sets.items()),
    ]
    write_run(folder, "Rotated noise: what stays Gaussian", facts, sections, dict(found), {})


def _section(name: str, part: Mapping[str, Any]) -> Section:
    far = (
        f"{part['noises']} noises, {part['patches']} patches. Distance of the patch covariance "
        f"from I: {number(part['kl'])} nats a patch (by chance {number(part['kl_by_chance'])}). "
        f"What all noises share: {number(part['mean_shift'])} of their deviation at each element "
        f"(by chance {number(part['mean_shift_by_chance'])})."
    )
    title = name[0].upper() + name[1:]
    return Section(title, [_WORDS[name], far], checks_table(part["checks"]))


def _histogram(axes: Axes, sets: Sets, key: str) -> None:
    for k, (name, part) in enumerate(sets.items()):
        bins = part[key]
        # the outermost bins hold the tails
        middles = [(a + b) / 2 for a, b in zip(bins["edges"], bins["edges"][1:], strict=False)]
        inner = slice(1, -1)
        axes.plot(middles[inner], bins["density"][inner], color=PALETTE[k], label=name)
        if k == 0:
            pairs = list(zip(bins["expected"], bins["allowed"], strict=True))[inner]
            low, high = [e - a for e, a in pairs], [e + a for e, a in pairs]
            axes.fill_between(
                middles[inner], low, high, color=GREY, alpha=0.35, linewidth=0, label="allowed"
            )


def _eigenvalues(axes: Axes, sets: Sets, key: str) -> None:
    for k, (name, part) in enumerate(sets.items()):
        curve = part[key]
        index = range(1, len(curve["measured"]) + 1)
        axes.plot(index, curve["measured"], color=PALETTE[k], marker="o", markersize=3, label=name)
        # fewer samples allow more
        axes.fill_between(
            index, curve["low"], curve["high"], color=PALETTE[k], alpha=0.15, linewidth=0
        )


def _elements(axes: Axes, sets: Sets, key: str) -> None:
    for k, (name, part) in enumerate(sets.items()):
        found, color = part[key], PALETTE[k]
        index = range(1, len(found["measured"]) + 1)
        axes.plot(index, found["measured"], "o", color=color, markersize=3, label=name)
        axes.axhspan(found["low"], found["high"], color=color, alpha=0.12, linewidth=0)


# key of what is drawn: axis labels, how it is drawn, caption
_PANELS: dict[str, tuple[tuple[str, str], Callable[[Axes, Sets, str], None], str]] = {
    "values": (
        ("element", "density"),
        _histogram,
        "All elements beside the normal density. Bad: a line outside the band.",
    ),
    "norms": (
        ("energy of a patch, ||x||² / D", "density"),
        _histogram,
        "Energies of the patches beside the chi-square law. No rotation changes them; noise that "
        "was moved freely can leave the band.",
    ),
    "means": (
        ("element of a patch", "mean"),
        _elements,
        "Mean of each element over all patches. Bad: dots outside the band of their colour.",
    ),
    "variances": (
        ("element of a patch", "variance"),
        _elements,
        "Variance of each element over all patches. Bad: dots outside the band of their colour.",
    ),
    "eigenvalues": (
        ("eigenvalue of the patch covariance, largest first", "variance along it"),
        _eigenvalues,
        "A fixed rotation leaves even the eigenvalues measured as they are. Bad: a line outside "
        "the band of its colour, a direction that all noises prefer.",
    ),
}


@inline_svg
def _svg(key: str, sets: Sets) -> Figure:
    labels, draw, _ = _PANELS[key]
    figure, axes = new_axes(*labels)
    draw(axes, sets, key)
    axes.legend(fontsize=8)
    return figure


def _picture(sets: Sets) -> Figure:
    figure = Figure(figsize=(11, 9), layout="constrained", dpi=110)
    places = figure.subplots(3, 2).flatten()
    for axes, (key, (labels, draw, _)) in zip(places, _PANELS.items(), strict=False):
        axes.set(xlabel=labels[0], ylabel=labels[1])
        draw(axes, sets, key)
    places[0].legend(fontsize=8)
    places[-1].axis("off")
    lines = [
        f"{name}: KL {part['kl']:.1e} nats a patch, "
        + ("all checks within" if all(c["ok"] for c in part["checks"]) else "checks outside:")
        + "".join(
            f"\n    {c['name']}, p = {c['p_value']:.1e}" for c in part["checks"] if not c["ok"]
        )
        for name, part in sets.items()
    ]
    places[-1].text(0, 1, "\n".join(lines), va="top", fontsize=9)
    return figure
