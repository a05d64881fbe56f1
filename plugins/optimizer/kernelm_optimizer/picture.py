"""The picture of a search: accuracy against latency, with sizes and with the uncertainty of few documents."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernelm_contracts.optimizer import Row

# Okabe and Ito's colours, which people with any colour vision can tell apart
COLORS = {"encoder": "#0072B2", "frozen-linear": "#E69F00", "tfidf-linear": "#009E73", "": "#888888"}
INK, FAINT = "#222222", "#8a8a8a"
LARGEST_PT2 = 1500.0  # area of the largest disc, square points
LINE_PT = 24.0  # height of a label of two lines


def wilson(accuracy: float, documents: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share of `documents` (Wilson 1927): lower and upper bound, 0 to 1."""
    if documents == 0:
        return 0.0, 1.0
    center = (accuracy + z * z / (2 * documents)) / (1 + z * z / documents)
    spread = z / (1 + z * z / documents) * math.sqrt(
        accuracy * (1 - accuracy) / documents + z * z / (4 * documents * documents))
    return max(0.0, center - spread), min(1.0, center + spread)


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions as close to `wanted` as it takes to keep them `gap` apart, in the same order (isotonic regression by
    pooling neighbours)."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[float, int]] = []  # mean of (wanted - rank * gap), members
    for rank, i in enumerate(order):
        mean, size = wanted[i] - rank * gap, 1
        while groups and groups[-1][0] > mean:
            other, count = groups.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        groups.append((mean, size))
    placed = [0.0] * len(wanted)
    means = [mean for mean, size in groups for _ in range(size)]
    for rank, (i, mean) in enumerate(zip(order, means, strict=True)):
        placed[i] = mean + rank * gap
    return placed


def draw(rows: Sequence[Row], winner: str, max_drop: float, path: Path) -> None:
    """Draw the measured of `rows` to the PNG file `path`. There must be one at least."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.measurement]
    figure = Figure(figsize=(10, 6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: its state is global, and this runs in a worker thread
    axes = figure.add_subplot()
    _axes(axes, measured, max_drop)
    _points(axes, measured, winner)
    figure.canvas.draw()  # settles the layout, so that labels can be placed in points
    _labels(axes, measured, winner, 72 / figure.dpi)
    figure.savefig(path)


def _axes(axes: Any, measured: Sequence[Row], max_drop: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    latencies = [row.measurement.latency_ms for row in measured if row.measurement]
    accuracies = [row.measurement.scores.accuracy for row in measured if row.measurement]
    documents = max(row.measurement.scores.documents for row in measured if row.measurement)
    bounds = [wilson(a, documents) for a in accuracies]
    low, high = min(b[0] for b in bounds), min(1.0, max(b[1] for b in bounds))
    margin = 0.08 * max(high - low, 0.01)
    axes.set_xscale("log")
    axes.set_xlim(min(latencies) / 1.7, max(latencies) * 5)  # room for the labels at the right
    axes.set_ylim(low - margin, high + margin)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    best = max(accuracies)
    axes.axhspan(best - max_drop, best, color="#009E73", alpha=0.10, lw=0, zorder=0)
    axes.text(0.995, best - max_drop / 2, f"within {100 * max_drop:g} points of the best", va="center", ha="right",
              transform=axes.get_yaxis_transform(), color="#00664a", fontsize=8)
    axes.set_xlabel("latency of one document, ms (median, log scale)", color=INK)
    axes.set_ylabel(f"accuracy on the validation split ({documents} documents)", color=INK)
    axes.set_title("Accuracy against latency", loc="left", fontsize=14, fontweight="bold", color=INK, pad=26)
    axes.text(0, 1.02, "The area of a disc is the model's size on disk; bars are 95 % intervals; the upper left is better",
              transform=axes.transAxes, fontsize=9, color=FAINT)
    axes.grid(axis="both", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _points(axes: Any, measured: Sequence[Row], winner: str) -> None:
    from matplotlib.lines import Line2D

    largest = max(row.measurement.bytes for row in measured if row.measurement)
    for row in measured:
        m = row.measurement
        assert m is not None
        color = COLORS.get(row.structure, COLORS[""])
        x, y = m.latency_ms, m.scores.accuracy
        axes.vlines(x, *wilson(y, m.scores.documents), color=color, lw=1.2, alpha=0.45, zorder=2)
        axes.scatter([x], [y], s=max(LARGEST_PT2 * m.bytes / max(largest, 1), 30), color=color, alpha=0.55, lw=0, zorder=3)
        axes.scatter([x], [y], s=18, color=color, lw=0, zorder=4)
        if row.name == winner:
            axes.scatter([x], [y], s=max(LARGEST_PT2 * m.bytes / max(largest, 1), 30) + 160, facecolors="none",
                         edgecolors=INK, lw=1.8, zorder=5)
    kinds = sorted({row.structure for row in measured})
    handles = [Line2D([], [], marker="o", ls="", ms=9, color=COLORS.get(k, COLORS[""]), label=k or "unknown") for k in kinds]
    handles.append(Line2D([], [], marker="o", ls="", ms=11, mfc="none", mec=INK, mew=1.8, label="winner"))
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=9)


def _labels(axes: Any, measured: Sequence[Row], winner: str, points_a_pixel: float) -> None:
    largest = max(row.measurement.bytes for row in measured if row.measurement)
    spots = [axes.transData.transform((row.measurement.latency_ms, row.measurement.scores.accuracy))
             for row in measured if row.measurement]
    heights = apart([spot[1] * points_a_pixel for spot in spots], LINE_PT)
    for row, spot, height in zip(measured, spots, heights, strict=True):
        m = row.measurement
        assert m is not None
        radius = math.sqrt(max(LARGEST_PT2 * m.bytes / max(largest, 1), 30) / math.pi)
        axes.annotate(
            f"{row.name}\n{100 * m.scores.accuracy:.1f} %, {m.latency_ms:.3g} ms, {m.bytes / 1e6:.3g} MB",
            (m.latency_ms, m.scores.accuracy), xytext=(radius + 8, height - spot[1] * points_a_pixel),
            textcoords="offset points", va="center", fontsize=8.5, color=INK, zorder=6,
            fontweight="bold" if row.name == winner else "normal",
            bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "alpha": 0.75, "lw": 0},
            arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.6, "shrinkA": 0, "shrinkB": 2})
