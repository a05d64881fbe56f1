"""The pictures of the data card. They use no pyplot, whose state threads share, and carry no version or time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kernelm_contracts.data import DatasetCard

INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
KEPT, LOST = "#2f6f9f", "#d1495b"
SPLIT_COLORS = {"train": "#2f6f9f", "validation": "#edae49", "test": "#66a182"}
WIDTH, DPI = 9.0, 130
MAX_CLASSES = 40  # drawn one by one; more would not be legible


def draw_account(card: DatasetCard, path: Path) -> None:
    """Documents in and out of each step, and what was dropped for which reason."""
    figure, axes = _figure(1.2 + 0.62 * len(card.steps), "Documents in and out of each step")
    widest = max(max(step.documents_in for step in card.steps), 1)
    for y, step in enumerate(card.steps):
        lost = step.documents_in - step.documents_out
        axes.barh(y, step.documents_out, height=0.62, color=KEPT)
        axes.barh(y, lost, left=step.documents_out, height=0.62, color=LOST)
        axes.text(widest * 0.012, y, f"{step.documents_out:,}", va="center", color="white", fontsize=10, fontweight="bold")
        notes = [f"\N{MINUS SIGN}{count:,} {reason}" for reason, count in step.reasons.items()]
        notes += [f"{count:,} {what}" for what, count in step.changed.items()]
        shown = "\n".join(_short(note, 38) for note in notes[:3]) + (f"\n+ {len(notes) - 3} more" if len(notes) > 3 else "")
        axes.text(step.documents_in + widest * 0.012, y, shown, va="center", color=LOST if lost else MUTED, fontsize=8)
    axes.set_yticks(range(len(card.steps)), [step.name for step in card.steps])
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.38)
    axes.set_xticks([t for t in axes.get_xticks() if t <= widest * 1.05])
    axes.set_xlabel("documents", color=MUTED)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    _save(figure, path)


def draw_classes(card: DatasetCard, path: Path) -> None:
    """Documents of each class in each split, largest class first."""
    totals = {label: sum(s.per_label[label] for s in card.splits.values()) for label in card.labels}
    shown = sorted(card.labels, key=lambda label: (-totals[label], label))[:MAX_CLASSES]
    rest = len(card.labels) - len(shown)
    beside = f" (the {MAX_CLASSES} largest; {rest} more)" if rest else ""
    figure, axes = _figure(1.6 + 0.5 * len(shown), f"Documents of each class{beside}")
    left = np.zeros(len(shown))
    for name, split in card.splits.items():
        counts = np.array([split.per_label[label] for label in shown])
        axes.barh(range(len(shown)), counts, left=left, height=0.66, color=SPLIT_COLORS[name],
                  label=f"{name} ({split.documents:,})")  # fmt: skip
        left += counts
    everything = max(sum(totals.values()), 1)
    for y, label in enumerate(shown):
        note = f" {totals[label]:,}  ({totals[label] / everything:.0%})"
        axes.text(left[y], y, note, va="center", color=MUTED, fontsize=9)
    axes.set_yticks(range(len(shown)), [_short(label, 28) for label in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, left.max() * 1.18)
    axes.set_xlabel("documents", color=MUTED)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(card.splits), frameon=False,
                  labelcolor=INK, fontsize=9)  # fmt: skip
    _save(figure, path)


def draw_lengths(characters: dict[str, list[int]], tokens: Sequence[int] | None, max_tokens: int, path: Path) -> None:
    """Length in characters by class (box: quartiles, whiskers: 5 and 95 percent) and, if tokenized, all lengths in tokens."""
    shown = {label: lengths for label, lengths in characters.items() if lengths}
    shown = dict(sorted(shown.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_CLASSES])
    height = max(3.6, 1.2 + 0.5 * len(shown))
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    left, *right = figure.subplots(1, 1 if tokens is None else 2, squeeze=False)[0]
    _style(left, "Characters, by class")
    left.boxplot(list(shown.values()), orientation="horizontal", whis=(5, 95), showfliers=False, widths=0.55, patch_artist=True,
                 boxprops={"facecolor": "#c9dcea", "edgecolor": KEPT}, medianprops={"color": LOST, "linewidth": 1.8},
                 whiskerprops={"color": KEPT}, capprops={"color": KEPT})  # fmt: skip
    left.set_yticks(range(1, len(shown) + 1), [_short(label, 20) for label in shown])
    left.invert_yaxis()
    left.set_xlim(left=0)
    left.set_xlabel("characters (median, quartiles, 5th and 95th percentile)", color=MUTED, fontsize=9)
    left.grid(axis="x", color=GRID, linewidth=0.8)
    for axes in right:
        _draw_tokens(axes, np.asarray(tokens), max_tokens)
    _save(figure, path)


def _draw_tokens(axes: Axes, tokens: "np.ndarray[tuple[int], np.dtype[np.int64]]", max_tokens: int) -> None:
    _style(axes, "Tokens, before the cut")
    top = max(float(np.percentile(tokens, 99.5)), max_tokens * 1.1)
    _, edges, bars = axes.hist(np.minimum(tokens, top), bins=40, range=(0, top), color=KEPT, edgecolor="white", linewidth=0.4)
    for edge, bar in zip(edges, bars, strict=False):
        if edge >= max_tokens:
            bar.set_facecolor("#a9c6da")
    cut = int((tokens > max_tokens).sum())
    axes.axvline(max_tokens, color=LOST, linewidth=1.5)
    axes.margins(y=0.18)
    axes.annotate(f"max_tokens {max_tokens}: {cut:,} of {tokens.size:,} cut ({cut / tokens.size:.0%})", (max_tokens, 0.96),
                  xycoords=("data", "axes fraction"), xytext=(5, 0), textcoords="offset points", color=LOST, fontsize=8.5, va="top",
                  ha="left" if max_tokens < top / 2 else "right")  # fmt: skip
    axes.set_xlabel(f"tokens (the last bar holds all from {top:,.0f})", color=MUTED, fontsize=9)
    axes.set_ylabel("documents", color=MUTED, fontsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def _figure(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    _style(axes, title)
    return figure, axes


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.set_axisbelow(True)


def _short(text: str, width: int) -> str:
    # "$" would start a formula
    text = text if len(text) <= width else text[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return text.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})
