"""`kernelm jobs why ID | plan FILE`: why jobs wait and when they would start, as the scheduler sees it now."""

import asyncio
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from kernelm_cli import run_file
from kernelm_cli.session import Output, connection, print_json, stdout
from kernelm_cli.tables import pairs
from kernelm_cli.view import FINISHED, duration
from kernelm_contracts.deployments import WAITS
from kernelm_contracts.jobs import JobName, Jobs, Outlook, Plan, RunName, RunView
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault

SAID = (WAITS, "can never run: ")  # what a reason begins with that stands beside a column that says so


def why(id: Annotated[str, Parameter(name="ID")], /, *, output: Output = Output()) -> int:
    """Say why a job waits and what would start it, as the scheduler sees it now; of a run, for each of its jobs that is not over.

    Parameters
    ----------
    id
        A job's or a run's.
    """

    async def work() -> int:
        async with connection(output.folder) as bus:
            outlooks = await _asked(bus, id)
        if output.json:
            print_json(outlooks[0] if len(outlooks) == 1 else outlooks)
            return 0
        for number, outlook in enumerate(outlooks):
            stdout().print(*[""] * (number > 0), _drawn(outlook), sep="\n")
        if not outlooks:
            stdout().print(f"run {id} has no job that waits or runs")
        return 0

    return asyncio.run(work())


async def _asked(bus: Bus, id: str) -> list[Outlook]:
    try:
        return [await bus.call(Jobs.why, JobName(id))]
    except ClientFault as fault:
        if fault.code != "not_found":
            raise
    try:
        view: RunView = await bus.call(Jobs.get_run, RunName(id))
    except ClientFault as fault:
        if fault.code != "not_found":
            raise
        raise ClientFault("not_found", f"there is no job and no run {id!r}", "`kernelm jobs` lists the jobs") from None
    return [await bus.call(Jobs.why, JobName(job.id)) for job in view.jobs if job.state not in FINISHED]


def plan(file: Annotated[Path, Parameter(name="FILE")], /, *, output: Output = Output()) -> int:
    """Say when and where the stages of a run file would start if it were submitted now, each as if what it needs of the others were
    there already. Nothing is submitted or stored.

    Parameters
    ----------
    file
        The run file, e.g. deploy/runs/news.toml.
    """
    spec = run_file.read(file).spec

    async def work() -> int:
        async with connection(output.folder) as bus:
            found: Plan = await bus.call(Jobs.plan, spec)
        if output.json:
            print_json(found)
            return 0
        table = Table()
        for name in ("stage", "would start", "on", "why", "what would start it"):
            table.add_column(name, overflow="fold")
        for stage in found.stages:
            table.add_row(stage.name, _when(stage), stage.node, Text(_because(stage)), Text(stage.remedy))
        stdout().print(table)
        return 0

    return asyncio.run(work())


def _when(outlook: Outlook) -> str:
    """When it starts, by what the scheduler says and the estimates that there are."""
    if outlook.action == "place":
        return "now"
    if outlook.action == "reject":
        return "never"
    return f"in {duration(outlook.starts - time.time())}" if outlook.starts else "not known"


def _because(outlook: Outlook) -> str:
    for prefix in SAID if outlook.action else ():
        if outlook.reason.startswith(prefix):
            return outlook.reason.removeprefix(prefix)
    return outlook.reason


def _drawn(outlook: Outlook) -> Table:
    """An outlook on one job, a fact a line."""
    rows = pairs()
    facts = {"job": f"{outlook.job} ({outlook.name})", "state": outlook.state, "why": _because(outlook)}
    if outlook.action == "wait":
        facts["state"] += ", without a place for what it serves" * (outlook.state == "running")
        facts["what would start it"] = outlook.remedy or "not known"
        facts["waits behind"] = f"{outlook.ahead} job{'s' * (outlook.ahead > 1)}" if outlook.ahead else "nobody"
        known = "by the estimates of what runs" if outlook.starts else "no estimate says when that is"
        facts["starts"] = f"{_when(outlook)}: {known}"
    elif outlook.action:
        says = {"place": f"it starts now, on node {outlook.node}", "reject": "it is refused"}
        facts["the scheduler says"] = says.get(outlook.action, outlook.action)
    else:
        facts["state"] += f" on {outlook.node}" * bool(outlook.node)
        facts["remedy"] = outlook.remedy
    for name, value in facts.items():
        if value:
            rows.add_row(name, Text(value))
    return rows
