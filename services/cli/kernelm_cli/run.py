"""`kernelm run FILE`: check, store what it names, submit, follow to the end."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.live import Live
from rich.text import Text

from kernelm_authority.identity import admin
from kernelm_cli import faults, results
from kernelm_cli.home import last_lines, read_up
from kernelm_cli.run_file import RunFile, read
from kernelm_cli.session import Common, connection, stdout
from kernelm_cli.sources import visible
from kernelm_cli.swapping import readable
from kernelm_cli.tables import columns
from kernelm_cli.view import FINISHED, MARKS, PlainRun, RunDrawing, duration, ended, lines, outcome, serves, took
from kernelm_contracts.deployments import Deployed
from kernelm_contracts.jobs import Jobs, RunName, RunRecord, RunSpec, RunView
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.system import Artifact, Artifacts, PutArtifact

PATIENCE_S = 120.0  # for a broker, kernel or job table that is being restarted
PAUSE_S, PAUSE_MAX_S = 0.2, 2.0
PUT_S = 300.0
LOG_LINES, TRACEBACK = 40, "Traceback (most recent call last)"  # of an instance's log: so many are looked at for the last traceback
COMMANDS = {"generator": "chat {}", "vllm": "chat {}", "retriever": 'search {} "..."'}  # plugin of a deployment -> what asks it


def run(file: Annotated[Path, Parameter(name="FILE")], /, *, common: Common = Common(), follow: bool = True) -> int:
    """Submit a run (a pipeline of jobs described in a TOML file) and follow it to its end.

    The same file again goes on where it was: finished stages are found by their content and not repeated.

    Parameters
    ----------
    file
        The run file, e.g. deploy/runs/news.toml.
    follow
        Draw its progress and wait for its end; --no-follow only submits it.
    """
    checked = read(file)
    started: list[RunRecord] = []
    try:
        return asyncio.run(_run(common.folder, checked, follow, started.append))
    except KeyboardInterrupt:
        _interrupted(file, started)
        return faults.INTERRUPTED


async def _run(home: Path, file: RunFile, follow: bool, started: Callable[[RunRecord], None]) -> int:
    console = stdout()
    async with connection(home) as bus:
        spec = file.resolved(await _store(bus, home, file, console))
        record = await _submit(bus, spec)
    started(record)
    if not follow:
        console.print(f"run {record.id} of {spec.name!r} was submitted; `kernelm run {file.path}` follows it")
        return 0
    view = await _watch(home, record, console)
    _summary(view, console)
    if view.run.state == "done":
        return 0
    faults.show(_fault_of(view, home))
    return faults.FAILURE


async def _store(bus: Bus, home: Path, file: RunFile, console: Console) -> dict[Path, str]:
    """Put the folders of the run file into the artifact store; folder -> digest."""
    digests: dict[Path, str] = {}
    for source in file.sources:
        if source.folder in digests:
            continue
        where = source.origin.get("package") or source.origin.get("folder", "")
        with console.status(f"storing {where}"), visible(source.folder, home) as folder:
            request = PutArtifact(str(folder), "source", metadata=source.origin)
            artifact: Artifact = await bus.call(Artifacts.put, request, timeout_s=PUT_S, patience_s=PATIENCE_S)
        digests[source.folder] = artifact.digest
        console.print(f"{where}: {len(artifact.files):,} files, {artifact.bytes / 2**20:.1f} MB, {results.short(artifact.digest)}")
    return digests


async def _submit(bus: Bus, spec: RunSpec) -> RunRecord:
    """Submit; asked twice since the first answer was lost, the job table finds the same jobs by their content."""
    record: RunRecord = await bus.call(Jobs.submit_run, spec, timeout_s=30.0, patience_s=PATIENCE_S)
    return record


async def follow_run(home: Path, name: RunName, away: Callable[[str], None]) -> AsyncIterator[RunView]:
    """Every new state of the run until it is finished. What is restarted meanwhile (job table, kernel, broker, the whole
    launcher under another address) is waited for; `away` hears why, and "" once it is back."""
    lost, pause = 0.0, PAUSE_S
    bus: Bus | None = None
    url = ""
    try:
        while True:
            try:
                up = read_up(home)
                if up is not None and (bus is None or up.url != url):
                    bus, old, url = await Bus.connect(up.url, admin(home)), bus, up.url
                    if old is not None:
                        await old.close()
                if bus is None:
                    raise KernelFault("not_running", f"nothing runs on {home}", retriable=True)
                async for view in bus.stream(Jobs.follow_run, name):
                    lost, pause = 0.0, PAUSE_S
                    away("")
                    yield view
                    if view.run.state != "running":
                        return
                raise KernelFault("stream_ended", "the job table stopped", retriable=True)
            except Fault as fault:
                if not fault.retriable and fault.code != "unauthorized":  # the account is not there until the kernel is
                    raise
                lost = lost or time.monotonic()
                if time.monotonic() - lost > PATIENCE_S:
                    raise KernelFault(fault.code, f"lost the run for {PATIENCE_S:g} s: {fault.message}",
                                      "`kernelm doctor`, `kernelm up`; then the same `kernelm run` goes on") from None  # fmt: skip
                away(f"reconnecting for {duration(time.monotonic() - lost)}: {fault.message}")
            await asyncio.sleep(pause)
            pause = min(pause * 2, PAUSE_MAX_S)
    finally:
        if bus is not None:
            await bus.close()


async def _watch(home: Path, record: RunRecord, console: Console) -> RunView:
    """Draw the run until it ends; its last state."""
    if console.is_terminal:
        return await _watch_live(home, record, console)
    console.print(f"run {record.spec.name} {record.id}")
    plain, view = PlainRun(), RunView(record)
    noticed = False

    def away(notice: str) -> None:
        nonlocal noticed
        if notice and not noticed:
            console.print(notice)
        noticed = bool(notice)

    async for view in follow_run(home, RunName(record.id), away):
        for line in plain.update(view, time.time()):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return view


async def _watch_live(home: Path, record: RunRecord, console: Console) -> RunView:
    drawing, latest, notice = RunDrawing(), RunView(record), ""

    def away(text: str) -> None:
        nonlocal notice
        notice = text

    with Live(get_renderable=lambda: drawing.draw(latest, time.time(), notice), console=console, refresh_per_second=8):
        async for view in follow_run(home, RunName(record.id), away):
            latest = view  # the picture refreshes itself from it
    return latest


def _summary(view: RunView, console: Console) -> None:
    """The tables at the end."""
    whole = duration(view.run.finished - view.run.submitted)
    title = f"Run {view.run.spec.name}: {view.run.state} after {whole}"
    table = columns("", "stage", "took", "result", right=("took",), title=title)
    for line in lines(view):
        if line.job is None:
            table.add_row("·", line.name, "", "not started")
        elif line.job.state in FINISHED:
            name = "  " * line.depth + line.name
            table.add_row(MARKS[line.job.state], name, duration(took(line.job, time.time())), Text(ended(line, view.run)))
        elif serves(line.job):
            table.add_row(MARKS["done"], "  " * line.depth + line.name, "", Text(f"serves: {outcome(line.job)}"))
    console.print(table)
    for figures in results.tables(view):
        console.print(figures)
    for job in view.jobs:
        if serves(job):
            command = COMMANDS.get(job.spec.request.get("plugin", ""), 'call {} "..."')
            console.print(f"try it: kernelm {command.format(msgspec.convert(job.result, Deployed).model)}", markup=False)


def _fault_of(view: RunView, home: Path) -> Fault:
    """Why the run did not end well; of what was no client's fault with the end of the instance's log, where that is in the home."""
    body = view.run.fault or next((j.fault for j in view.jobs if j.state == "dead" and j.fault), None)
    if body is None:
        return ClientFault(f"run_{view.run.state}", f"run {view.run.id} was {view.run.state}", "submit it again to go on")
    broken = next((j for j in view.jobs if j.state == "dead"), None)
    details = body.details | ({"stage": broken.spec.name, "job": broken.id, "instance": broken.instance} if broken else {})
    if broken and broken.instance and body.whose != "client" and (log := last_lines(home, broken.instance, count=LOG_LINES)):
        before, mark, traceback = log.rpartition(TRACEBACK)
        details["log"] = readable(mark + traceback, None) if before or mark else log
    remedy = body.remedy or "the log of the instance says more; the same run goes on once it is mended"
    return Fault(body.code, body.message, remedy, **details)


def _interrupted(file: Path, started: list[RunRecord]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    console = Console(stderr=True)
    if not started:
        console.print("interrupted before anything was submitted")
        return
    console.print(f"[bold]run {started[0].id} goes on in the background[/]\n"
                  f"  follow it   kernelm run {file}\n"
                  f"  look at it  kernelm jobs show {started[0].id}\n"
                  f"  cancel it   kernelm jobs cancel {started[0].id}", highlight=False)  # fmt: skip
