"""A `RunView` as it is drawn on a terminal, and as plain lines where there is none. Pure: the clock is an argument."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from kernelm_cli.curves import Curves
from kernelm_cli.results import key_result, short
from kernelm_contracts.deployments import DEPLOY
from kernelm_contracts.jobs import JobRecord, RunRecord, RunView
from kernelm_sdk.system import Progress

FINISHED = frozenset({"done", "dead", "cancelled"})
MARKS = {"done": Text("✓", "bold green"), "dead": Text("✗", "bold red"), "cancelled": Text("-", "yellow"),
         "queued": Text("·", "dim"), "placed": Text("·", "cyan")}  # fmt: skip
# metric -> (how it reads, format); others are shown as "name value", after these
METRICS = {
    "loss": ("loss {}", "{:.4f}"), "accuracy": ("accuracy {}", "{:.4f}"), "validation_accuracy": ("validation {}", "{:.4f}"),
    "tokens_per_s": ("{} tokens/s", "{:,.0f}"),
    "documents_per_s": ("{} docs/s", "{:,.0f}"), "docs_per_s": ("{} docs/s", "{:,.0f}"), "best": ("best {}", "{:.4f}"),
    "passages_per_s": ("{} passages/s", "{:,.1f}"),
    "latency_ms": ("{} ms", "{:.2f}"), "throughput": ("{} docs/s", "{:,.0f}"), "memory_mb": ("{} MB", "{:,.0f}"),
    "load_s": ("loaded in {} s", "{:.1f}"), "learning_rate": ("rate {}", "{:.1e}"),
}  # fmt: skip
LEFT = ("left_s", "eta_s", "time_left_s", "remaining_s")  # a plugin's own estimate goes before ours
HIDDEN = frozenset({*LEFT, "elapsed_s", "step", "epoch", "gradient_norm", "validation_loss"})  # of no use without the others
PLAIN_EVERY_S = 10.0
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Line(NamedTuple):
    """A stage or a child job, as both kinds of output need it."""

    name: str
    depth: int
    job: JobRecord | None  # None: the stage waits for earlier ones


def lines(view: RunView) -> Iterator[Line]:
    """The stages of the run in order, each followed by its child jobs."""
    by_id = {job.id: job for job in view.jobs}
    children: dict[str, list[JobRecord]] = {}
    for job in view.jobs:
        children.setdefault(job.spec.parent, []).append(job)

    def below(parent: JobRecord, depth: int) -> Iterator[Line]:
        for child in children.get(parent.id, ()):
            yield Line(child.spec.name, depth, child)
            yield from below(child, depth + 1)

    for stage in view.run.spec.stage:
        job = by_id.get(view.run.jobs.get(stage.name, ""))
        yield Line(stage.name, 0, job)
        if job is not None:
            yield from below(job, 1)


def serves(job: JobRecord) -> bool:
    """Whether it is a replica that answers: its stage is over, though it goes on running."""
    return job.spec.uses == DEPLOY and job.state == "running" and bool(job.result)


def duration(seconds: float) -> str:
    """Seconds as people say them: "7 s", "2:05", "1:02:05"."""
    whole = int(max(seconds, 0.0))
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}" if minutes else f"{whole} s"


def took(job: JobRecord, now: float) -> float:
    """Seconds from the job's start to its end, or to now."""
    return (job.finished or now) - job.started if job.started else 0.0


def left(job: JobRecord, now: float) -> str:
    """The time left: the plugin's estimate, or what the fraction done so far suggests; "" while nothing can be said."""
    metrics, fraction = job.progress.metrics, job.progress.fraction
    for name in LEFT:
        if name in metrics:
            return f"{duration(metrics[name])} left"
    if 0.02 < fraction < 1.0 and job.started:
        return f"about {duration(took(job, now) * (1 - fraction) / fraction)} left"
    return ""


def readable(message: str) -> str:
    """A message with its digests cut to the 12 digits that are enough to tell two apart."""
    return DIGEST.sub(lambda found: short(found[0]), message)


def metrics(progress: Progress) -> str:
    """The figures that matter, at most three; a rate of 0 says nothing."""
    known = [METRICS[k][0].format(METRICS[k][1].format(progress.metrics[k])) for k in METRICS if progress.metrics.get(k)]
    others = [f"{k} {v:.4g}" for k, v in progress.metrics.items() if k not in METRICS and k not in HIDDEN]
    return ", ".join((known + others)[:3])


def ended(line: "Line", run: RunRecord) -> str:
    """What a job that is over came to; "failed" where its fault is that of the run, which has a panel of its own."""
    fault = line.job.fault if line.job and line.job.state == "dead" and not line.depth else None
    if fault and run.fault and run.fault.message.endswith(fault.message):
        return "failed"
    return outcome(line.job) if line.job else ""


def outcome(job: JobRecord) -> str:
    """What a job that is over came to."""
    if job.state == "done" or serves(job):
        return ("found, not repeated: " if job.reused else "") + key_result(job)
    if job.state == "dead":
        return job.fault.message if job.fault else job.why or "failed"
    return job.why or "cancelled"


class RunDrawing:
    """The live picture of a run; keeps the spinner's phase and the curves between two frames."""

    def __init__(self) -> None:
        self._spinner, self._curves = Spinner("dots", style="cyan"), Curves()

    def draw(self, view: RunView, now: float, notice: str = "") -> RenderableType:
        """One line a job; `notice` stands below, e.g. while the connection is away."""
        table = Table.grid(padding=(0, 1))
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(width=20)
        table.add_column(overflow="fold", ratio=1)
        table.add_column(justify="right", no_wrap=True)
        for line in lines(view):
            table.add_row(*self._row(line, now, view.run))
            if curve := self._curve(line.job):
                table.add_row("", "", "", Text(curve, "cyan"), "")
        head = Text.assemble((f"run {view.run.spec.name}", "bold"), (f"  {view.run.id}", "dim"))
        return Group(head, table, Text(notice, "yellow")) if notice else Group(head, table)

    def _curve(self, job: JobRecord | None) -> str:
        if job is None:
            return ""
        self._curves.take(job)
        return self._curves.draw(job.id)

    def _row(self, line: Line, now: float, run: RunRecord) -> tuple[RenderableType, ...]:
        name = Text("  " * line.depth + line.name, "default" if line.depth else "bold")
        job = line.job
        if job is None:
            return MARKS["queued"], name, "", Text("waits", "dim"), ""
        if job.state in FINISHED:
            style = {"done": "green", "dead": "red"}.get(job.state, "yellow")
            return MARKS[job.state], name, "", Text(ended(line, run), style), Text(duration(took(job, now)), "dim")
        if serves(job):
            return MARKS["done"], name, "", Text(outcome(job), "green"), ""
        if job.state != "running":
            return MARKS[job.state], name, "", Text(f"{job.state}: {job.why}" if job.why else job.state, "dim"), ""
        progress = job.progress
        bar = ProgressBar(total=1.0, completed=progress.fraction, width=20, pulse=progress.fraction == 0.0)
        text = " · ".join(p for p in (progress.phase, readable(progress.message), metrics(progress)) if p)
        times = " · ".join(p for p in (duration(took(job, now)), left(job, now)) if p)
        return self._spinner, name, bar, Text(text), Text(times, "dim")


class PlainRun:
    """A run as lines for a log: one for each change of a job's state or phase, and one every 10 s of work."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[str, float]] = {}  # job -> what was last said of it, and when
        self._told: set[tuple[str, str]] = set()  # job and reason for which it was queued again: the next attempt may fail alike

    def update(self, view: RunView, now: float) -> list[str]:
        """The lines that `view` adds to what was said before."""
        new: list[str] = []
        for line in lines(view):
            job = line.job
            if job is None:
                continue
            what = "serves" if serves(job) else job.progress.phase if job.state == "running" else job.why
            key = f"{job.state}/{job.attempt}/{what}"
            said, when = self._said.get(job.id, ("", 0.0))
            if key == said and (job.state != "running" or serves(job) or now - when < PLAIN_EVERY_S):
                continue
            self._said[job.id] = key, now
            text = plain(job, now)
            if job.state == "dead" and not line.depth:  # the run ends with it, and with its fault
                text = f"FAILED after {duration(took(job, now))}"
            elif job.state == "queued" and job.attempt and (job.id, job.why) in self._told:
                text = "queued: as before"
            self._told.add((job.id, job.why))
            new.append("  " * line.depth + f"{line.name}: {text}")
        return new


def plain(job: JobRecord, now: float) -> str:
    """One job in one line of text."""
    if job.state in FINISHED:
        mark = {"done": "done", "dead": "FAILED", "cancelled": "cancelled"}[job.state]
        return f"{mark} after {duration(took(job, now))}: {outcome(job)}"
    if serves(job):
        return f"serves: {outcome(job)}"
    if job.state != "running":
        return f"{job.state}: {job.why}" if job.why else job.state
    progress = job.progress
    times = (duration(took(job, now)), left(job, now))
    return "running: " + " · ".join(
        p for p in (progress.phase, f"{progress.fraction:.0%}", readable(progress.message), metrics(progress), *times) if p)
