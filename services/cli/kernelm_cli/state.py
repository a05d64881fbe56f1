"""`kernelm ps`, `kernelm events`: what is there, and what happened."""

import asyncio
import contextlib
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernelm.lifecycle import LIVE
from kernelm_cli.home import UpFile
from kernelm_cli.session import Output, connection, print_json, running, stdout
from kernelm_cli.tables import columns
from kernelm_cli.view import duration
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.events import Received, received
from kernelm_sdk.system import Empty, Kernel, SystemState

STATES = {"ready": "green", "joined": "cyan", "starting": "cyan", "draining": "yellow", "exited": "dim", "lost": "red"}
WELL = frozenset({"intact", "in force"})  # what kernel/1.state.health says of what is well; all else says what is not


async def system_state(home: Path) -> SystemState:
    """The kernel's view of the system that runs on `home`."""
    async with connection(home) as bus:
        state: SystemState = await bus.call(Kernel.state, Empty(), patience_s=5.0)
        return state


def ps(*, output: Output = Output(), all: Annotated[bool, Parameter(name=["--all", "-a"], negative="")] = False) -> int:
    """Show what runs: processes of this machine, instances, and how the system is.

    Parameters
    ----------
    all
        Also instances that have ended.
    """
    state = asyncio.run(system_state(output.folder))
    instances = [i for i in state.instances if all or i.state in LIVE]
    up = running(output.folder)
    if output.json:
        print_json({"up": up, "instances": instances, "pools": state.pools, "routes": state.routes, "health": state.health})
        return 0
    console, now = stdout(), time.time()
    if up.pid:  # else an engine lists them
        console.print(_processes(output.folder, up, now))
    table = columns("instance", "plugin", "pool", "node", "state", "for", "contracts and models", "reason", right=("for",))
    for i in sorted(instances, key=lambda i: (i.pool, i.since)):
        table.add_row(i.id, f"{i.plugin} {i.version}".strip(), i.pool, i.node, Text(i.state, STATES.get(i.state, "")),
                      duration(now - i.since), ", ".join((*i.contracts, *(f"model {m}" for m in i.models))), i.reason)  # fmt: skip
    console.print(table)
    _print_health(state, console)
    return 0


def _processes(home: Path, up: UpFile, now: float) -> Table:
    title = f"{home}, up for {duration(now - up.started)}"
    table = columns("process", "pid", "starts", right=("pid", "starts"), title=title)
    for name, process in up.processes.items():
        table.add_row(name, str(process.pid), str(process.restarts + 1))
    return table


def _print_health(state: SystemState, console: Console) -> None:
    for name, value in state.health.items():
        console.print(Text.assemble((f"{name}: ", "bold"), (value, "green" if value in WELL else "red")))


def events(*, output: Output = Output(), follow: Annotated[bool, Parameter(name=["--follow", "-f"], negative="")] = False,
           type: str = "", last: int = 20) -> int:  # fmt: skip
    """Show what happened: the last events, and with --follow the next ones.

    Parameters
    ----------
    follow
        Go on until Ctrl-C.
    type
        Only events of this type ("job.state") or domain ("job").
    last
        So many from the past.
    """
    pattern = _pattern(type)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_events(output.folder, pattern, follow, last, output.json))
    return 0


def _pattern(type: str) -> str:
    if not type:
        return "evt.>"
    if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)?", type):
        raise ClientFault("invalid", f"--type {type!r} is no event type", "e.g. job, job.state, plugin.state, route.changed")
    return f"evt.{type}.>"


async def _events(home: Path, pattern: str, follow: bool, last: int, json: bool) -> None:
    console = stdout()
    async with connection(home) as bus:
        live: asyncio.Queue[Received] = asyncio.Queue()
        if follow:  # before the past is read, so that nothing falls in between
            await bus.follow(live.put, pattern)
        past = await _past(bus, pattern, last)
        for event in past:
            _print_event(event, console, json)
        seen = {event.id for event in past}
        while follow:
            event = await live.get()
            if event.id not in seen:
                _print_event(event, console, json)


async def _past(bus: Bus, pattern: str, last: int) -> list[Received]:
    found: list[Received] = []
    async for sequence, subject, body, headers in bus.read("EVT", pattern):
        found.append(received(subject, body, headers, sequence))
        if len(found) > 2 * last:
            del found[:-last]
    return found[-last:] if last else []


def _print_event(event: Received, console: Console, json: bool) -> None:
    body: dict[str, Any] = msgspec.json.decode(event.body)
    if json:
        line = {"type": event.type, "source": event.source, "id": event.id, "time": event.time, "intact": event.intact}
        line["data"] = body
        sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
        sys.stdout.flush()
        return
    if isinstance(swap := body.get("swap"), dict):  # what it is about; who wants all of it has --json
        body = {k: v for k, v in (swap | body).items() if k not in ("swap", "bounds", "begun", "since")}
    facts = "  ".join(f"{k}={_short(v)}" for k, v in body.items() if v not in ("", None, 0, {}, []))
    damaged = "" if event.intact else "  DAMAGED: its digest does not match"
    console.print(Text.assemble((event.time[11:19], "dim"), (f"  {event.type:<18}", "cyan"), (f"{event.source:<20}", "dim"),
                                facts, (damaged, "bold red")), soft_wrap=not console.is_terminal)  # fmt: skip


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    text = re.sub(r"sha256:([0-9a-f]{12})[0-9a-f]{52}", r"\1", text)
    return text if len(text) <= 120 else text[:117] + "..."
