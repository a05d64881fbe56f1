"""The picture of a classifier's confusions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kernelm_contracts.trainer import Scores

INK, MUTED, PAPER, EMPTY = "#1f2933", "#66727f", "#ffffff", "#f3f5f7"


def draw(scores: Sequence[Scores], labels: Sequence[str], title: str, path: Path) -> None:
    """Write confusion matrices side by side to the PNG `path`: counts, shaded by the share of their row, errors in orange."""
    side = max(3.2, 0.72 * len(labels) + 1.2)
    figure = Figure(figsize=(side * len(scores) + 0.6, side + 0.4), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    panels = np.atleast_1d(figure.subplots(1, len(scores), sharey=True))
    for axes, one in zip(panels, scores, strict=True):
        _matrix(axes, one, labels)
    panels[0].set_ylabel("true", color=MUTED, fontsize=9)
    figure.savefig(path)


def _matrix(axes: Axes, scores: Scores, labels: Sequence[str]) -> None:
    counts = np.array(scores.confusion)
    # The square root spreads the small shares, which are the errors that one looks for.
    depth = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))
    right = np.eye(len(labels), dtype=bool)
    axes.set_facecolor(EMPTY)
    axes.imshow(np.ma.masked_where(~right | (counts == 0), depth), cmap="Blues", vmin=0.0, vmax=1.15)
    axes.imshow(np.ma.masked_where(right | (counts == 0), depth), cmap="Oranges", vmin=-0.15, vmax=1.15)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axes.text(column, row, str(count), ha="center", va="center", fontsize=10,
                      fontweight="bold" if row == column else "normal",
                      color=PAPER if depth[row, column] > 0.6 else INK)  # fmt: skip
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, labels)
    axes.set_xticks(np.arange(0.5, len(labels) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(labels) - 1), minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=2)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", color=MUTED, fontsize=9)
    axes.set_title(f"{scores.split}: {scores.documents} documents\n"
                   f"accuracy {scores.accuracy:.3f}, macro F1 {scores.macro_f1:.3f}",
                   fontsize=9, color=MUTED, loc="left")  # fmt: skip
