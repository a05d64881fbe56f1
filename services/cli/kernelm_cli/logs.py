"""`kernelm logs`: what the processes of this home have written, side by side, and with --follow what they write next."""

import asyncio
import contextlib
import heapq
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from kernelm.lifecycle import LIVE
from kernelm_authority.identity import admin
from kernelm_cli.home import UpFile, read_up
from kernelm_cli.launcher import SERVICES
from kernelm_cli.log_files import Line, Log, find_logs, written
from kernelm_cli.session import Output, stdout
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.nearest import hint
from kernelm_sdk.system import Empty, Kernel, SystemState

CHILDREN = ("broker", "kernel", *SERVICES)
HERE = SERVICES["node"].removeprefix("node-")  # the name of this machine's node
ALONE, TOGETHER = 50, 10  # lines of each by default, where one log is shown and where several are
EARLIER = 5  # logs of earlier lives that a name brings, the newest ones, unless all are wanted
ASK_S = 2.0  # patience with a kernel that may be what one reads the logs for
LOOK_S = 0.2  # between two looks at what is new
INSTANCE = re.compile(r"(?P<plugin>.+)-[0-9a-f]{8}")
COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_cyan", "bright_green", "bright_yellow", "bright_magenta")
Standing = Literal["runs", "ended", "earlier"]  # "ended" in this life of the home, or in its last one where nothing runs


class Life(NamedTuple):
    """A home now: its logs, and what is known of who writes them."""

    home: Path
    up: UpFile | None  # None where nothing runs
    logs: dict[str, tuple[Path, ...]]
    standing: dict[str, Standing]  # of each log
    state: SystemState | None  # None where the kernel did not say


class Choice(NamedTuple):
    """The logs to be shown, in the order in which they are, and what there is to say of them."""

    groups: dict[Standing, list[str]]
    notes: list[str]

    @property
    def names(self) -> list[str]:
        return [name for names in self.groups.values() for name in names]


def logs(*names: Annotated[str, Parameter(name="NAME")],
         lines: Annotated[str, Parameter(name=["--lines", "-n"], show_default=False)] = "",
         follow: Annotated[bool, Parameter(name=["--follow", "-f"], negative="")] = False,
         all: Annotated[bool, Parameter(name=["--all", "-a"], negative="")] = False, output: Output = Output()) -> int:  # fmt: skip
    """Show the last lines of the logs, in order of time: of what is named, or of all that runs.

    Where nothing runs: those of the last life of this home. With --json an object a line.

    Parameters
    ----------
    names
        A process that `kernelm ps` lists, an instance, or a pool, plugin, contract or deployment for all of its instances.
    lines
        So many of each log, or all; by default 50 of one, and 10 of each of several.
    follow
        Go on with what is written next, until Ctrl-C.
    all
        Also of what has ended, in this life of the home and in all earlier ones.
    """
    wanted = _count(lines)
    with contextlib.suppress(KeyboardInterrupt) if follow else contextlib.nullcontext():

        def again() -> tuple[Life, Choice]:
            life = look(output.folder)
            return life, choose(names, life, every=all)

        life, choice = again()
        view = View(choice.names, output.json)
        for note in choice.notes:
            view.tell(note)
        count = wanted if lines else ALONE if len(choice.names) == 1 else TOGETHER
        opened = _show(life, choice, count, view, follow)
        if follow:
            _follow(opened, life, view, again)
        elif not view.shown and count != 0:
            view.tell("nothing was written")
    return 0


def _count(lines: str) -> int | None:
    """How many of each log; None for all of them."""
    if lines in ("", "all"):
        return None
    if not re.fullmatch(r"\d{1,9}", lines, re.ASCII):
        raise ClientFault("invalid", f"--lines {lines!r} is no number of lines", "e.g. 100, or all; 0 for none of the past")
    return int(lines)


def look(home: Path) -> Life:
    """What is there now. ClientFault "deployed" where an engine keeps the logs, KernelFault "not_running" where there are none."""
    up = read_up(home)
    if up is not None and not up.pid:
        raise ClientFault("deployed", f"{home} is run by an engine, as containers, which keeps their output",
                          f"docker compose logs; what plugins wrote is in {home / 'logs'}")  # fmt: skip
    found = find_logs(home)
    if not found:
        raise KernelFault("not_running", f"nothing has run on {home}: there are no logs", f"kernelm up --detach --home {home}")
    # a launcher that was killed leaves up.json behind, every one the lock that it took at its start
    since = up.started if up is not None else written((home / "run" / "lock",))
    up = up if up is not None and up.alive() else None
    state = asyncio.run(_asked(up.url, home)) if up is not None else None
    # the kernel also remembers instances of an earlier life, until their leases run out
    live = {i.id for i in state.instances if i.state in LIVE and i.since >= since} if state else None
    return Life(home, up, found, {name: _standing(name, paths, since, up, live) for name, paths in found.items()}, state)


def _standing(name: str, paths: Iterable[Path], since: float, up: UpFile | None, live: Collection[str] | None) -> Standing:
    if name not in CHILDREN and written(paths) < since and name not in (live or ()):
        return "earlier"
    if up is None:
        return "ended"
    return "runs" if live is None or name in live or not INSTANCE.fullmatch(name) else "ended"


async def _asked(url: str, home: Path) -> SystemState | None:
    """The kernel's view, None if it gives none: its log is then all the more wanted."""
    try:
        bus = await Bus.connect(url, admin(home), timeout_s=ASK_S)
    except (Fault, OSError):
        return None
    try:
        state: SystemState = await bus.call(Kernel.state, Empty(), timeout_s=ASK_S)
        return state
    except Fault:
        return None
    finally:
        await bus.close()


# ---- which ----


def choose(names: Sequence[str], life: Life, *, every: bool) -> Choice:
    """The logs that the names mean, else of all that runs (where nothing does, that ran last); with `every` also of what has
    ended. What runs comes first. ClientFault "not_found" for a name that means none."""
    notes = []
    if life.up is None:
        notes.append(f"nothing runs on {life.home}" + ("" if names else ": what its last life has written"))
    elif life.state is None:
        notes.append("the kernel does not answer: whatever was written to since the start is taken for what runs")
    wanted: set[str] = set()
    for name in names:
        found, note = _named(name, life)
        wanted |= found
        notes += [note] if note else []
    now: Standing = "runs" if life.up is not None else "ended"
    groups: dict[Standing, list[str]] = {"runs": [], "ended": [], "earlier": []}
    for name in life.logs:
        if name in wanted if names else every or life.standing[name] == now:
            groups[life.standing[name]].append(name)
    earlier = sorted(groups["earlier"], key=lambda name: written(life.logs[name]), reverse=True)
    if not every and len(earlier) > EARLIER:
        notes.append(f"of {len(earlier)} logs of earlier lives the {EARLIER} newest; --all shows them all")
        earlier = earlier[:EARLIER]
    return Choice({**groups, "earlier": earlier}, notes)


def _named(name: str, life: Life) -> tuple[set[str], str]:
    """(names of the logs that `name` means, what there is to say of that)."""
    child = next((child for child, instance in SERVICES.items() if instance == name), name)  # as `kernelm ps` calls it, too
    if child in life.logs:
        return {child}, ""
    id = re.compile(re.escape(name) + "(-[0-9a-f]{8}|[0-9a-f]{1,7})")  # of a plugin, or the beginning of an instance's
    found = {log for log in life.logs if id.fullmatch(log)}
    instances = [i for i in life.state.instances if name in (i.id, i.plugin, i.pool, *i.contracts, *i.models)] if life.state else []
    found |= {i.id for i in instances if i.id in life.logs}
    silent = [i for i in instances if i.id not in life.logs and i.state in LIVE]
    if away := [f"{i.id} on {i.node}" for i in silent if i.node not in ("", HERE)]:
        return found, f"{', '.join(away)}: the logs are there"
    if silent and "node" in life.logs:
        return found | {"node"}, f"{', '.join(i.id for i in silent)} runs within the node, whose log has its lines"
    if found:
        return found, ""
    if instances or (life.state and name in {word for pool in life.state.pools for word in (pool.pool, pool.plugin)}):
        raise ClientFault("not_found", f"no instance of {name!r} has written a log here", "kernelm ps --all")
    raise ClientFault("not_found", f"there is no log of {name!r}", hint(name, _known(life)))


def _known(life: Life) -> list[str]:
    """All that can be named, the ids of instances apart: they are many, and nobody types them from memory."""
    ids = [INSTANCE.fullmatch(name) for name in life.logs]
    words = {id["plugin"] if id else name for id, name in zip(ids, life.logs, strict=True)}
    state = life.state
    if state is not None:
        words |= {pool.pool for pool in state.pools} | {name for pool in state.pools for name in pool.models}
        words |= {contract for i in state.instances if i.state in LIVE for contract in i.contracts}
    return sorted(words)


# ---- showing them ----


class View:
    """The lines on stdout, each behind the name of its log where there are several; remarks on stderr."""

    def __init__(self, names: Sequence[str], json: bool) -> None:
        self._json, self._console, self._remarks = json, stdout(), Console(stderr=True)
        self._names: list[str] = []
        self.shown = 0  # lines
        self.add(names)

    def add(self, names: Iterable[str]) -> None:
        self._names += [name for name in names if name not in self._names]
        self._width = max(map(len, self._names), default=0)

    def tell(self, text: str) -> None:
        """A remark; none for programs."""
        if not self._json:
            sys.stdout.flush()
            self._remarks.print(Text(text, "dim"), soft_wrap=True)

    def show(self, lines: Iterable[Line], standing: Mapping[str, Standing]) -> None:
        for line in lines:
            self.shown += 1
            if self._json:
                moment = datetime.fromtimestamp(line.at, UTC).isoformat(timespec="milliseconds")
                found = {"name": line.name, "standing": standing.get(line.name, "runs"), "time": moment, "line": line.text}
                sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
                continue
            prefix = f"{line.name:<{self._width}} | " if len(self._names) > 1 else ""
            if self._console.is_terminal:
                colour = COLOURS[self._names.index(line.name) % len(COLOURS)]
                self._console.print(Text.assemble((prefix, colour), _marked(legible(line.text))), soft_wrap=True)
            else:
                sys.stdout.write(f"{prefix}{legible(line.text).plain}\n")
        sys.stdout.flush()


def legible(text: str) -> Text:
    """What a terminal would show of a line at last, a progress bar's last state too, without what would steer the terminal."""
    text = text.rstrip("\r").rsplit("\r", 1)[-1]
    if text.isprintable():
        return Text(text)
    legal = (letter if letter.isprintable() or letter in "\t\x1b" else " " * letter.isspace() for letter in text)
    kept = Text.from_ansi("".join(legal))
    return Text(kept.plain.replace("\x1b", "")) if "\x1b" in kept.plain else kept


def _marked(text: Text) -> Text:
    text.highlight_regex(r"\b(ERROR|CRITICAL)\b|\[(ERR|FTL)\]", "bold red")
    text.highlight_regex(r"\bWARNING\b|\[WRN\]", "yellow")
    return text


TITLES: dict[Standing, str] = {"runs": "running", "ended": "ended", "earlier": "of an earlier life"}


def _show(life: Life, choice: Choice, count: int | None, view: View, follow: bool) -> list[Log]:
    """The groups one after the other, what runs first; to `follow` its logs, which are returned, it comes last, so that what is
    new stands behind it."""
    groups = [(standing, found) for standing, found in choice.groups.items() if found]
    opened: list[Log] = []
    for standing, found in reversed(groups) if follow else groups:
        if len(groups) > 1 or standing == "earlier":
            view.tell(f"{TITLES[standing]}: {', '.join(found)}")
        logs = [Log(name, path) for name in found for path in life.logs[name]]
        goes_on = follow and (standing, found) == groups[0]
        pasts = [log.past(count, goes_on=goes_on) for log in logs]
        if count is not None:  # few enough to be held, so that not all files have to be open at once
            pasts = [iter(list(past)) for past in pasts]
        view.show(heapq.merge(*pasts, key=lambda line: line.at), life.standing)
        opened = logs if goes_on else opened
    return opened


def _follow(opened: list[Log], life: Life, view: View, again: Callable[[], tuple[Life, Choice]]) -> None:
    """For ever. An instance that is started meanwhile and is meant, too, joins with all that it wrote."""
    standing = dict(life.standing)
    while True:
        view.show(sorted((line for log in opened for line in log.more()), key=lambda line: line.at), standing)
        if new := find_logs(life.home).keys() - standing:
            with contextlib.suppress(Fault):  # while the kernel is away only a pool's name may mean nothing: looked at again
                life, choice = again()
                standing |= life.standing
                joined = [name for name in choice.names if name in new]
                view.add(joined)
                opened += [Log(name, path) for name in joined for path in life.logs[name]]
        time.sleep(LOOK_S)
