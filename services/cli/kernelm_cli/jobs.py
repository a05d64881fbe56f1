"""`kernelm jobs list | show | why | plan | timeline | cancel`: the job table. An id may be a job's or a run's."""

import asyncio
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.text import Text

from kernelm_cli import faults, outlook
from kernelm_cli.session import Common, Output, connection, print_json, stdout
from kernelm_cli.tables import columns, pairs
from kernelm_cli.timeline import Lane, cut, draw, lanes
from kernelm_cli.view import MARKS, RunDrawing, duration, metrics, outcome, plain, took
from kernelm_contracts.jobs import JobList, JobName, JobQuery, JobRecord, Jobs, JobState, RunName, RunRecord, RunView
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.events import Event, received
from kernelm_sdk.system import Empty, Kernel, Node, NodeReport, SystemState

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

app = App(name="jobs", help="The jobs: durable, resumable work.", version_flags=[])
app.command(outlook.why)
app.command(outlook.plan)


@app.default
@app.command(name="list")
def list_(*, output: Output = Output(), state: JobState | None = None, run: str = "", limit: int = 30) -> int:
    """List jobs, the latest first.

    Parameters
    ----------
    state
        Only those in this state.
    run
        Only those of the run with this id.
    limit
        At most so many.
    """

    async def work() -> int:
        async with connection(output.folder) as bus:
            found: JobList = await bus.call(Jobs.find, JobQuery(state or "", run, limit))
        if output.json:
            print_json(found.jobs)
            return 0
        table = columns("", "job", "name", "uses", "state", "node", "took", "progress or result", right=("took",))
        now = time.time()
        for job in found.jobs:
            said = outcome(job) if job.finished else f"{job.progress.fraction:.0%} {job.progress.phase} {metrics(job.progress)}"
            table.add_row(MARKS.get(job.state, Text(">", "cyan")), job.id, job.spec.name, job.spec.uses, job.state, job.node,
                          duration(took(job, now)), Text(said if job.started else job.why))  # fmt: skip
        stdout().print(table if found.jobs else "no jobs")
        return 0

    return asyncio.run(work())


@app.command
def show(id: Annotated[str, Parameter(name="ID")], /, *, output: Output = Output()) -> int:
    """Show a job or a run with all that is known about it."""
    return asyncio.run(_show(output.folder, id, output.json))


async def _show(home: Path, id: str, json: bool) -> int:
    async with connection(home) as bus:
        found = await _either(bus, id)
    console = stdout()
    if json:
        print_json(found)
    elif isinstance(found, RunView):
        console.print(RunDrawing().draw(found, time.time()))
        if found.run.fault:
            faults.show(found.run.fault)
    else:
        _print_job(found, console)
    return 0


async def _either(bus: Bus, id: str) -> JobRecord | RunView:
    try:
        job: JobRecord = await bus.call(Jobs.get, JobName(id))
        return job
    except ClientFault as fault:
        if fault.code != "not_found":
            raise
    view: RunView = await bus.call(Jobs.get_run, RunName(id))
    return view


def _attempt(job: JobRecord) -> str:
    """The present or last one; a record counts those that have failed."""
    if not job.started:
        return ""
    return f"{min(job.attempt + (job.state != 'dead'), job.spec.attempts) or 1} of {job.spec.attempts}, epoch {job.epoch}"


def _print_job(job: JobRecord, console: Console) -> None:
    rows = pairs()
    times = {n: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t)) for n, t in
             (("submitted", job.submitted), ("started", job.started), ("finished", job.finished)) if t}  # fmt: skip
    state, why = plain(job, time.time()), job.why
    if job.fault and job.state == "dead":  # the panel below has the reason
        state, why = f"FAILED after {duration(took(job, time.time()))}", "" if why == job.fault.message else why
    facts = {"job": job.id, "name": job.spec.name, "uses": job.spec.uses, "run": job.spec.run, "parent": job.spec.parent,
             "state": state, "attempt": _attempt(job),
             "where": f"{job.instance} on {job.node}" if job.instance else "", "why": why, "checkpoint": job.checkpoint,
             **times}  # fmt: skip
    for name, value in facts.items():
        if value:
            rows.add_row(name, Text(value))
    console.print(rows)
    if job.spec.request:
        console.print("[bold]request[/]")
        console.print_json(data=job.spec.request)
    if job.result:
        console.print("[bold]result[/]")
        console.print_json(data=job.result)
    if job.fault:
        faults.show(job.fault)


@app.command
def timeline(*, out: Path = Path("timeline.png"), last: str = "1h", output: Output = Output()) -> int:
    """Draw the schedule over time: the cores that tenants and models held, and a line for each job, waiting and running.

    Parameters
    ----------
    out
        The picture, .png or .svg.
    last
        So far back, e.g. 90s, 15m, 2h.
    """
    since = time.time() - _seconds(last)

    async def work() -> tuple[list[Lane], float]:
        async with connection(output.folder) as bus:
            system: SystemState = await bus.call(Kernel.state, Empty(), timeout_s=5.0)
            nodes = [i.id for i in system.instances if i.state == "ready" and "node/1" in i.contracts]
            reports: list[NodeReport] = [await bus.call(Node.report, Empty(), instance=node, timeout_s=5.0) for node in nodes]
            found: list[tuple[float, Event]] = []
            for pattern in ("evt.job.state.jobs", "evt.model.scaled.jobs"):
                async for number, subject, body, headers in bus.read("EVT", pattern):
                    event = received(subject, body, headers, number)
                    if event.event is not None:
                        found.append((datetime.fromisoformat(event.time).timestamp(), event.event))
            return cut(lanes(sorted(found, key=lambda f: f[0]), time.time()), since), sum(r.capacity.cpu for r in reports)

    found, cores = asyncio.run(work())
    draw(out, found, cores)
    if output.json:
        print_json(found)
    else:
        stdout().print(f"{out}: {len(found)} jobs and models of the last {last}")
    return 0


def _seconds(text: str) -> float:
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS_S or not number.replace(".", "", 1).isdigit():
        raise ClientFault("invalid", f"--last {text!r} is no duration", "e.g. 90s, 15m, 2h, 1d")
    return float(number) * UNITS_S[unit]


@app.command
def cancel(id: Annotated[str, Parameter(name="ID")], /, *, common: Common = Common()) -> int:
    """Cancel a job with its children, or a run with its jobs."""

    async def work() -> int:
        async with connection(common.folder) as bus:
            try:
                job: JobRecord = await bus.call(Jobs.cancel, JobName(id))
                stdout().print(f"job {job.id} ({job.spec.name}) is {job.state}")
            except ClientFault as fault:
                if fault.code != "not_found":
                    raise
                record: RunRecord = await bus.call(Jobs.cancel_run, RunName(id))
                stdout().print(f"run {record.id} ({record.spec.name}) is {record.state}")
        return 0

    return asyncio.run(work())
