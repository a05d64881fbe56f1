"""Pictures of simulations: for each scheduler the devices that jobs hold over time, and the distributions of all of them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from kernelm_sdk.errors import ClientFault
from kernelm_simulator.cluster import Cluster
from kernelm_simulator.engine import Result
from kernelm_simulator.metrics import fairness

HOUR = 3600.0
LEGEND = 12  # groups with a colour of their own; the others are grey
WAITING, OTHERS = "#d62728", "#bbbbbb"


def draw(path: Path, results: Sequence[tuple[str, Result]], cluster: Cluster, by: str = "job") -> None:
    """Write a PNG or SVG: one band a scheduler, coloured by "job", "tenant" or "type", the same in all, with the number of waiting
    jobs as a line, and below the distributions of completion time and fairness. ClientFault if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ClientFault("missing_package", "pictures need matplotlib", "pip install kernelm-simulator[picture]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 2.2 * len(results) + 3.5), layout="constrained")
    grid = figure.add_gridspec(len(results) + 1, 2, height_ratios=[2.2] * len(results) + [3.2])
    longest = max((result.makespan for _, result in results), default=0.0) / HOUR
    colours = _colours([result for _, result in results], by)
    for row, (name, result) in enumerate(results):
        axes = figure.add_subplot(grid[row, :])
        _bands(axes, result, by, colours, legend=row == 0)
        axes.set(title=name, ylabel="devices", xlim=(0, longest), ylim=(0, cluster.devices))
    axes.set_xlabel("hours")
    for column, (title, values) in enumerate((("completion time, hours", _hours), ("finish-time fairness ratio", fairness))):
        axes = figure.add_subplot(grid[-1, column])
        for name, result in results:
            found = sorted(values(result.runs, cluster))
            axes.step(found, [(i + 1) / len(found) for i in range(len(found))], where="post", label=name)
        axes.set(xlabel=title, ylabel="part of the jobs", xscale="log", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _hours(runs: Sequence[Any], cluster: Cluster) -> list[float]:
    return [(run.finished - run.job.submitted) / HOUR for run in runs if run.finished >= 0]


def _bands(axes: Any, result: Result, by: str, colours: dict[str, Any], legend: bool) -> None:
    groups, moments, levels = held(result, by)
    order = [group for group in colours if group in groups]
    hours = [moment / HOUR for moment in moments]
    axes.stackplot(hours, [levels[g] for g in order], step="post", colors=[colours[g] for g in order], linewidth=0)
    waits = axes.twinx()
    waits.step(*_waiting(result), where="post", color=WAITING, linewidth=0.8)
    waits.set_ylim(bottom=0)
    waits.yaxis.get_major_locator().set_params(integer=True)
    waits.set_ylabel("waiting jobs", color=WAITING)
    waits.tick_params(axis="y", colors=WAITING)
    if legend and by != "job":
        from matplotlib.patches import Patch

        shown = [Patch(color=colour, label=group or "any") for group, colour in list(colours.items())[:LEGEND]]
        waits.legend(handles=shown, loc="upper right", fontsize=7, ncols=2)


def held(result: Result, by: str) -> tuple[list[str], list[float], dict[str, list[int]]]:
    """(groups, moments, group -> devices from each moment on)."""
    tenants = {run.job.id: run.job.tenant for run in result.runs}
    moments = sorted({change.time for change in result.changes} | {0.0})
    at = {moment: i for i, moment in enumerate(moments)}
    steps: dict[str, list[int]] = {}
    now: dict[str, tuple[str, int]] = {}
    for change in result.changes:
        group, members = now.pop(change.job, ("", 0))
        if members:
            steps[group][at[change.time]] -= members
        if change.members:
            group = {"job": change.job, "tenant": tenants[change.job]}.get(by, change.type)
            steps.setdefault(group, [0] * len(moments))[at[change.time]] += change.members
            now[change.job] = (group, change.members)
    for row in steps.values():
        for before, after in pairwise(range(len(moments))):
            row[after] += row[before]
    return list(steps), moments, steps


def _waiting(result: Result) -> tuple[list[float], list[int]]:
    events = [(run.job.submitted, 1) for run in result.runs]
    holding: set[str] = set()
    for change in result.changes:
        if change.members and change.job not in holding:
            holding.add(change.job)
            events.append((change.time, -1))
        elif not change.members and change.job in holding:
            holding.discard(change.job)
            events.append((change.time, 1))
    events += [(run.finished, -1) for run in result.runs if run.finished >= 0]
    times, counts = [0.0], [0]
    for moment, step in sorted(events):
        times.append(moment / HOUR)
        counts.append(counts[-1] + step)
    return times, counts


def _colours(results: Sequence[Result], by: str) -> dict[str, Any]:
    """A colour for each group, those that hold most over all simulations first; for jobs in the order of their submission."""
    from matplotlib import colormaps

    table = colormaps["tab20"].colors
    if by == "job":
        ids = [run.job.id for run in results[0].runs] if results else []
        return {id: table[i % len(table)] for i, id in enumerate(ids)}
    total: dict[str, float] = {}
    for result in results:
        groups, moments, levels = held(result, by)
        for group in groups:
            lasts = zip(levels[group], (after - before for before, after in pairwise(moments)), strict=False)
            total[group] = total.get(group, 0.0) + sum(level * seconds for level, seconds in lasts)
    order = sorted(total, key=lambda group: (-total[group], group))
    return {group: table[i] if i < LEGEND else OTHERS for i, group in enumerate(order)}
