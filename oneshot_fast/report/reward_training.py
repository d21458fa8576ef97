"""The picture of trainings on rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.report.plots import PALETTE
from oneshot_fast.runs import replacing


def draw_histories(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write ``path``, a PNG: every measure over the epochs, a line per training.

    A reward that rises while the judge, the diversity or both fall is over-optimised.

    Args:
        histories: Rows of ``train_on_rewards`` by the training's name.
        path: The picture.
    """
    from matplotlib.figure import Figure

    rows = next(iter(histories.values()))
    measures = [name for name in rows[0] if name not in ("epoch", "loss", "reward")]
    figure = Figure(figsize=(3.1 * len(measures), 3), layout="constrained", dpi=110)
    panels: Any = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for k, (name, history) in enumerate(histories.items()):
            values = [row[measure] for row in history]
            axes.plot(values, color=PALETTE[k % len(PALETTE)], label=name, marker="o", markersize=3)
        axes.set(title=measure, xlabel="epoch")
    panels[0].legend(fontsize=8, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
