"""The schedule over time, from the events of the job table: who held how many cores when, and who waited.

Pure but for `draw`, which writes the picture: above the cores that tenants and models held, below one line a job.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from kernelm_contracts.deployments import DEPLOY
from kernelm_contracts.jobs import JobChanged, ModelScaled
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.events import Event

ROWS = 60  # jobs with a line of their own, the latest
# Okabe and Ito's colours, which people with any colour vision can tell apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
WAITING, INK = "#c8c8c8", "#222222"


class Span(Struct, frozen=True):
    """A stretch of time in which a job, or a model, was in one state. Times in Unix seconds."""

    begin: float
    end: float
    cpu: float  # cores held; 0 while it waits
    node: str = ""
    state: str = ""


class Lane(Struct):
    """All of one job, or of one model."""

    name: str
    tenant: str
    spans: list[Span] = []
    model: bool = False

    @property
    def core_s(self) -> float:
        return sum((s.end - s.begin) * s.cpu for s in self.spans)


def lanes(events: Iterable[tuple[float, Event]], end: float) -> list[Lane]:
    """Of every job and every model, in the order of their first event, from (time, event) in order; what is not over ends at
    `end`. A deployment's job shows as its model, with as many cores as its replicas hold."""
    found: dict[str, Lane] = {}
    since: dict[str, tuple[float, float, str, str]] = {}  # lane -> when, cores, node, state
    for at, event in events:
        if isinstance(event, ModelScaled):
            key, lane = f"model {event.model}", Lane(f"model {event.model}", event.tenant, [], True)
            now = (at, event.cpu * event.replicas, event.node, "running" if event.replicas else "asleep")
        elif isinstance(event, JobChanged) and event.uses != DEPLOY:
            key, lane = event.job, Lane(event.name, event.tenant)
            now = (at, event.cpu, event.node, event.state)
        else:
            continue
        lane = found.setdefault(key, lane)
        if key in since and since[key][1:] == now[1:]:  # only its reason is new
            continue
        _close(lane, since.get(key), at)
        since[key] = now
    for key, last in since.items():
        _close(found[key], last, end)
    return list(found.values())


def _close(lane: Lane, last: tuple[float, float, str, str] | None, at: float) -> None:
    if last is not None and last[3] in ("queued", "placed", "running", "asleep") and at > last[0]:
        lane.spans.append(Span(last[0], at, *last[1:]))


def cut(found: Sequence[Lane], since: float) -> list[Lane]:
    """What of them falls behind `since`; lanes without any of it are left out."""
    kept = [Lane(lane.name, lane.tenant, [replace(s, begin=max(s.begin, since)) for s in lane.spans if s.end > since], lane.model)
            for lane in found]  # fmt: skip
    return [lane for lane in kept if lane.spans]


def held(found: Sequence[Lane]) -> tuple[list[float], dict[str, list[float]]]:
    """(moments, tenant or model -> cores that it holds from each moment on)."""
    changes: dict[str, dict[float, float]] = {}
    for lane in found:
        mine = changes.setdefault(lane.name if lane.model else lane.tenant, {})
        for span in lane.spans:
            for at, cpu in ((span.begin, span.cpu), (span.end, -span.cpu)):
                mine[at] = mine.get(at, 0.0) + cpu
    moments = sorted({at for mine in changes.values() for at in mine})
    levels = {}
    for group, mine in changes.items():
        level, row = 0.0, []
        for at in moments:
            level += mine.get(at, 0.0)
            row.append(round(level, 6))
        levels[group] = row
    return moments, levels


def draw(path: Path, found: Sequence[Lane], capacity: float = 0.0, curves: Sequence[tuple[str, Sequence[tuple[float, float]]]] = (),
         title: str = "") -> None:  # fmt: skip
    """Write a PNG or SVG. `capacity`: cores of all nodes, 0 for not known; `curves`: further panels, each a name with (Unix
    seconds, value). ClientFault if matplotlib is not installed, or there is nothing to draw."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ClientFault("missing_package", "pictures need matplotlib", "pip install kernelm-cli[picture]") from None
    shown = [lane for lane in found if lane.spans]
    if not shown:
        raise ClientFault("not_found", "no job has been placed or waited in that time", "take a longer time with --last")
    rows = [*(lane for lane in shown if lane.model), *[lane for lane in shown if not lane.model][-ROWS:]]
    zero, end = min(s.begin for lane in shown for s in lane.spans), max(s.end for lane in shown for s in lane.spans)
    unit, name = _unit(end - zero)
    heights = [2.2, max(0.5 + 0.16 * len(rows), 1.4), *[1.4] * len(curves)]
    figure = Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    colours = _colours(shown)
    _levels(panels[0], shown, colours, capacity, zero, unit)
    _lines(panels[1], rows, colours, zero, unit)
    for axes, (label, points) in zip(panels[2:], curves, strict=True):
        axes.step([(at - zero) / unit for at, _ in points], [value for _, value in points], where="post", color=INK, linewidth=0.9)
        axes.set_ylabel(label, fontsize=8)
        axes.grid(alpha=0.25)
    panels[0].set_title(title, fontsize=10, color=INK)
    panels[-1].set(xlabel=name, xlim=(0, (end - zero) / unit))
    for axes in panels:
        axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=100)


def _unit(seconds: float) -> tuple[float, str]:
    return (3600.0, "hours") if seconds > 2 * 3600 else (60.0, "minutes") if seconds > 180 else (1.0, "seconds")


def _colours(found: Sequence[Lane]) -> dict[str, str]:
    """A colour a tenant, the same for its jobs and its models."""
    tenants = dict.fromkeys(lane.tenant for lane in found)
    return {tenant: COLOURS[i % len(COLOURS)] for i, tenant in enumerate(tenants)}


def _levels(axes: Any, found: Sequence[Lane], colours: dict[str, str], capacity: float, zero: float, unit: float) -> None:
    moments, levels = held(found)
    owner = {lane.name if lane.model else lane.tenant: lane.tenant for lane in found}
    order = sorted(levels, key=lambda group: (not group.startswith("model "), group))
    bottom = [0.0] * len(moments)
    hours = [(at - zero) / unit for at in moments]
    for group in order:
        top = [b + level for b, level in zip(bottom, levels[group], strict=True)]
        axes.fill_between(hours, bottom, top, step="post", color=colours[owner[group]], linewidth=0,
                          hatch="///" if group.startswith("model ") else None, edgecolor="white", label=group)  # fmt: skip
        bottom = top
    if capacity:
        axes.axhline(capacity, color=INK, linewidth=0.8, linestyle="--")
    axes.set(ylim=(0, 1.25 * max(capacity, *bottom, 0.1)))
    axes.set_ylabel("cores held", fontsize=8)
    axes.legend(loc="upper left", fontsize=7, ncols=4, frameon=False)


def _lines(axes: Any, rows: Sequence[Lane], colours: dict[str, str], zero: float, unit: float) -> None:
    for y, lane in enumerate(rows):
        for span in lane.spans:
            left, width = (span.begin - zero) / unit, (span.end - span.begin) / unit
            waits = span.cpu == 0.0
            axes.barh(y, width, 0.3 if waits else 0.8, left, color=WAITING if waits else colours[lane.tenant])
        for one, other in pairwise(lane.spans):
            if not lane.model and one.state == "running" and other.state == "queued":  # it made room, or its attempt failed
                axes.plot((other.begin - zero) / unit, y, marker="|", color=INK, markersize=7)
    axes.set_yticks(range(len(rows)), [lane.name for lane in rows], fontsize=6)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_ylabel("held; grey: waits; bar: gave way", fontsize=7)
