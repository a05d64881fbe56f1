"""The picture of a search's trials: how it got better, or what it found between two objectives."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelm_optimizer.picture import FAINT, INK

if TYPE_CHECKING:
    from kernelm_optimizer.study import Trial

UNITS = {"accuracy": "accuracy", "loss": "cross-entropy, nats", "latency": "latency of one document, ms", "size": "size, bytes",
         "memory": "memory, MB"}  # fmt: skip
DONE, FRONT, PRUNED = "#0072B2", "#D55E00", "#E69F00"


def draw_trials(trials: "Sequence[Trial]", objectives: Sequence[str], path: Path) -> None:
    """Draw the `trials` to the PNG file `path`: by one objective in their order, by several the first two against each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    done = [trial for trial in trials if trial.state == "done"]
    if len(objectives) == 1:
        _history(axes, trials, done, objectives[0])
    else:
        _front(axes, done, objectives)
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _history(axes: Any, trials: "Sequence[Trial]", done: "Sequence[Trial]", objective: str) -> None:
    pruned = [t for t in trials if t.state == "pruned" and t.reports]
    if pruned:
        axes.scatter([t.number for t in pruned], [t.reports[max(t.reports)] for t in pruned], s=22, marker="x", color=PRUNED,
                     label="given up early", zorder=2)  # fmt: skip
    if done:
        better = max if objective == "accuracy" else min
        best = [better(t.values[0] for t in done[: i + 1]) for i in range(len(done))]
        numbers = [t.number for t in done]
        axes.scatter(numbers, [t.values[0] for t in done], s=22, color=DONE, alpha=0.6, lw=0, label="trial", zorder=3)
        axes.step(numbers, best, where="post", color=INK, lw=1.2, label="best so far", zorder=4)
    _named(axes, "trial", UNITS[objective], "The trials of the search")


def _front(axes: Any, done: "Sequence[Trial]", objectives: Sequence[str]) -> None:
    signs = [-1 if o == "accuracy" else 1 for o in objectives[:2]]
    points = sorted({(signs[1] * t.values[1], signs[0] * t.values[0]) for t in done})
    edge, lowest = [], float("inf")
    for across, up in points:  # from the cheapest in the second objective on, what is better in the first
        if up < lowest:
            lowest = up
            edge.append((across * signs[1], up * signs[0]))
    values = [t.values[1] for t in done], [t.values[0] for t in done]
    axes.scatter(*values, s=26, color=DONE, alpha=0.5, lw=0, label="trial", zorder=2)
    axes.plot(*zip(*edge, strict=True) if edge else ((), ()), marker="o", ms=6, color=FRONT, lw=1.2, drawstyle="steps-post",
              label="Pareto front of these two", zorder=3)  # fmt: skip
    if done and objectives[1] != "accuracy" and min(t.values[1] for t in done) > 0:
        axes.set_xscale("log")
    _named(axes, UNITS[objectives[1]], UNITS[objectives[0]], "What was found between the objectives")


def _named(axes: Any, across: str, up: str, title: str) -> None:
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK)
    axes.tick_params(colors=FAINT)
