"""Plots of the reports as inline SVG whose text takes the page's colour, light or dark."""

import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy
import scipy.stats
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

# Readable on white and on near-black.
BLUE, ORANGE, GREEN, GREY = "#3b82f6", "#e8730c", "#14a375", "#8b909a"
PALETTE = (BLUE, ORANGE, GREEN, "#c2528b", "#8b6fd6", "#b59a1b")
# Stands for the page's text colour until the SVG is written.
_INK = "#010203"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "oneshot_fast",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "axes.formatter.useoffset": False,
    "savefig.transparent": True,
}


P = ParamSpec("P")


def inline_svg(draw: Callable[P, Figure]) -> Callable[P, str]:
    """Make a function that draws a figure return it as an <svg> element.

    The style has to hold while drawing too: matplotlib makes ticks late. The same data give the
    same text.
    """

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> str:
        buffer = io.StringIO()
        with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
            draw(*args, **kwargs).savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :].replace(_INK, "currentColor")

    return wrapped


def new_axes(
    xlabel: str, ylabel: str, size: tuple[float, float] = (5.6, 2.9)
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot(xlabel=xlabel, ylabel=ylabel)


def _log_if_wide(axes: Axes, values: Sequence[float | None]) -> None:
    """Logarithmic y axis for positive values that span more than a factor of 30."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if known and min(known) > 0 and max(known) > 30 * min(known):
        axes.set_yscale("log")


@inline_svg
def curves(
    lines: Mapping[str, Sequence[float | None]], xlabel: str, ylabel: str, first: int = 0
) -> Figure:
    """One line per name over the steps ``first``, ``first`` + 1, ...."""
    figure, axes = new_axes(xlabel, ylabel)
    for color, (name, values) in zip(itertools.cycle(PALETTE), lines.items(), strict=False):
        steps = range(first, first + len(values))
        marker = "o" if len(values) < 30 else None
        known = [math.nan if value is None else value for value in values]
        axes.plot(steps, known, color=color, label=name, marker=marker, markersize=3)
    _log_if_wide(axes, [v for values in lines.values() for v in values])
    whole_numbers(axes)
    axes.legend()
    return figure


def of_one_length(curves: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """Searches that ended early stay at their last value; None becomes NaN."""
    known = [[math.nan if value is None else value for value in curve] for curve in curves]
    length = max(map(len, known))
    return [[*curve, *curve[-1:] * (length - len(curve))] for curve in known]


@inline_svg
def loss_band(losses: Sequence[Sequence[float | None]]) -> Figure:
    """Median and 10 to 90 % band of the loss curves of all targets; ended ones stay as they are."""
    table = torch.tensor(of_one_length(losses), dtype=torch.float64)
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    low, middle, high = table.nanquantile(levels, 0).tolist()
    figure, axes = new_axes("step", "loss")
    axes.fill_between(
        range(len(low)), low, high, color=BLUE, alpha=0.2, linewidth=0, label="10 to 90 %"
    )
    axes.plot(middle, color=BLUE, label="median target")
    _log_if_wide(axes, [*low, *high])
    whole_numbers(axes)
    axes.legend()
    return figure


@inline_svg
def before_after(before: Sequence[float | None], after: Sequence[float]) -> Figure:
    """A dot per target: its loss before and after; the diagonal is no change."""
    figure, axes = new_axes("loss on the base noise", "loss on the assigned noise")
    known = [(x, y) for x, y in zip(before, after, strict=True) if x is not None]
    places = [value for pair in known for value in pair] or [1.0]
    ends = [min(places), max(places)]
    axes.plot(ends, ends, color=GREY, linewidth=1, linestyle="--", label="no change")
    dots = [x for x, _ in known], [y for _, y in known]
    axes.scatter(*dots, s=14, color=BLUE, alpha=0.6, linewidths=0, label="target")
    if ends[0] > 0 and ends[1] > 30 * ends[0]:
        axes.loglog()
    axes.legend()
    return figure


@inline_svg
def stages(values: Sequence[Sequence[float]]) -> Figure:
    """Loss on random noise, after the E-step and after the M-step, cycle by cycle."""
    figure, axes = new_axes("", "mean loss")
    names = ("random noise", "E-step", "M-step")
    for cycle, (losses, color) in enumerate(zip(values, itertools.cycle(PALETTE), strict=False)):
        places = [4 * cycle + k for k in range(3)]
        axes.plot(places, losses, color=color, marker="o", label=f"cycle {cycle + 1}")
        for place, loss in zip(places, losses, strict=True):
            axes.annotate(
                f"{loss:.3g}", (place, loss), (5, 5), textcoords="offset points",
                fontsize=9, color=_INK,
            )  # fmt: skip
    _log_if_wide(axes, [loss for losses in values for loss in losses])
    axes.margins(0.08, 0.18)
    ticks = [4 * cycle + k for cycle in range(len(values)) for k in range(3)]
    axes.set_xticks(ticks, [*names] * len(values), fontsize=9)
    if len(values) > 2:
        axes.tick_params("x", rotation=90)
    axes.legend()
    return figure


@inline_svg
def norms(values: Sequence[float], elements: int) -> Figure:
    """Histogram of ||z||^2 / d beside the density of chi-square(d) / d."""
    spread = math.sqrt(2 / elements)
    edges = _edges(values, 1 - 4 * spread, 1 + 4 * spread)
    figure, axes = new_axes("energy of the noise, ||z||² / d", "density")
    axes.hist(list(values), edges, density=True, color=BLUE, alpha=0.5, label="targets")
    law = scipy.stats.chi2(elements, scale=1 / elements)
    x = numpy.linspace(edges[0], edges[-1], 300)
    axes.plot(x, law.pdf(x), color=ORANGE, label="chi-square law (Gaussian noise)")
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
    axes.legend()
    return figure


@inline_svg
def eigenvalues(values: Mapping[str, Sequence[float]]) -> Figure:
    """Sorted patch covariance eigenvalues of z and base noise within the band of sampling noise."""
    figure, axes = new_axes("eigenvalue, largest first", "variance along it")
    index = range(1, len(values["z"]) + 1)
    axes.fill_between(
        index, values["low"], values["high"], color=GREY, alpha=0.25, linewidth=0,
        label="allowed by sampling noise",
    )  # fmt: skip
    few = len(index) <= 64
    for name, label, color in (("base", "base noise", GREY), ("z", "assigned noise", BLUE)):
        axes.plot(
            index, values[name], color=color, label=label, marker="o" if few else None, markersize=3
        )
    whole_numbers(axes)
    axes.legend()
    return figure


@inline_svg
def angles(values: Sequence[float]) -> Figure:
    """Histogram of the angles from the base noises (rotations: RMS), in degrees."""
    figure, axes = new_axes("angle from the base noise per target, degrees", "targets")
    limit = math.degrees(math.pi / math.sqrt(3))
    axes.hist(list(values), _edges(values, 0, 115), color=BLUE, alpha=0.6)
    axes.axvline(limit, color=ORANGE, linestyle="--", label="random rotations")
    axes.legend()
    return figure


@inline_svg
def mean_shift(errors: Tensor) -> Figure:
    """Maps of the mean noise [C, H, W] in standard errors, one per latent channel."""
    if errors[0].numel() == 1:  # a plain vector
        errors = errors.view(1, 1, -1)
    figure = Figure(figsize=(5.6, 2.2), layout="constrained")
    axes: Any = figure.subplots(1, errors.shape[0], squeeze=False)[0]
    aspect = "auto" if errors.shape[1] == 1 else "equal"
    for channel, axis in enumerate(axes):
        image = axis.imshow(errors[channel].numpy(), "RdBu_r", vmin=-4, vmax=4, aspect=aspect)
        axis.set_title(f"channel {channel + 1}", fontsize=10)
        axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(image, ax=list(axes), orientation="horizontal", aspect=40)
    bar.set_label("standard errors")
    return figure


def _edges(values: Sequence[float], low: float, high: float) -> list[float]:
    """Histogram edges that hold ``values``, and [low, high] with 24 bins at least."""
    width = (high - low) / 24
    first = math.floor((min(*values, low) - low) / width)
    last = math.ceil((max(*values, high) - low) / width)
    stride = max(1, (last - first) // 60)
    return [low + width * k for k in range(first, last + stride, stride)]


def whole_numbers(axes: Axes) -> None:
    """Mark only those on the x axis."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
