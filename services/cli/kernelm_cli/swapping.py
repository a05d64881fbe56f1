"""Following a swap to its end: by its events, and by looking where an event may have been missed; drawn, or as lines."""

import asyncio
import contextlib
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from kernelm_cli.view import duration
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault, PluginFault
from kernelm_sdk.events import Received
from kernelm_sdk.pools import find_pool
from kernelm_sdk.system import Diagnosis, Empty, InstanceName, Kernel, Node, PoolSpec, Swap, SwapChanged, SystemState

ORDER = ("starting", "probing", "watching", "retiring", "done")
MARKS = {"past": Text("✓", "bold green"), "ahead": Text("·", "dim"), "broken": Text("✗", "bold red")}
STORED = re.compile(r"[^\s\"]*/artifacts/trees/[0-9a-f]{64}/files/")  # where the store keeps an artifact
LOOK_S = 0.5  # between two looks at the state
PATIENCE_S = 120.0  # for a kernel or broker that is being restarted


async def state_of(bus: Bus, patience_s: float = 5.0) -> SystemState:
    """The kernel's view."""
    state: SystemState = await bus.call(Kernel.state, Empty(), patience_s=patience_s)
    return state


def resolve(state: SystemState, name: str) -> PoolSpec | None:
    """The pool that `name` means, as the kernel finds it."""
    return find_pool(name, {p.pool: p for p in state.pools}, state.routes)


async def changes(bus: Bus, ask: Callable[[], Awaitable[Swap]]) -> AsyncIterator[tuple[Swap, SystemState | None]]:
    """Ask for a swap; it and each of its changes, to its end. In between every LOOK_S the state, in which the instances of the
    new pool are seen. A kernel that is restarted meanwhile goes on with the swap, and so does this."""
    events: asyncio.Queue[Swap] = asyncio.Queue()

    async def heard(received: Received) -> None:
        if isinstance(received.event, SwapChanged):
            events.put_nowait(received.event.swap)

    subscription = await bus.follow(heard, "evt.swap.phase.*")  # before it is asked for, so that nothing falls in between
    lost = 0.0
    try:
        swap = await ask()
        yield swap, None
        while not swap.over:
            try:
                new, state = await asyncio.wait_for(events.get(), LOOK_S), None
            except TimeoutError:
                try:
                    state, lost = await state_of(bus, 0.0), 0.0
                except Fault as fault:
                    lost = lost or time.monotonic()
                    if not fault.retriable or time.monotonic() - lost > PATIENCE_S:
                        raise
                    continue
                new = next((s for s in state.swaps if s.id == swap.id), swap)
            if new.id == swap.id and new.since >= swap.since:
                swap = new
                yield swap, state
    finally:
        await subscription.unsubscribe()


async def follow(bus: Bus, console: Console, ask: Callable[[], Awaitable[Swap]], wait: bool, quiet: bool) -> Swap:
    """Ask for a swap and show it until its end (without `wait`: return what the kernel answered); `quiet` shows nothing."""
    if not wait:
        return await ask()
    plain, drawing, drawn = PlainSwap(), SwapDrawing(), console.is_terminal and not quiet
    live = Live(get_renderable=lambda: drawing.draw(time.time()), console=console, refresh_per_second=10)
    swap: Swap | None = None
    try:
        with live if drawn else contextlib.nullcontext():
            async for swap, state in changes(bus, ask):
                drawing.update(swap, state)
                for line in () if drawn or quiet else plain.update(swap):
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
    except asyncio.CancelledError:  # Ctrl-C: the kernel does not hear of it
        if swap is not None and not swap.over:
            Console(stderr=True).print(f"[bold]swap {swap.id} goes on in the background[/]\n"
                                       f"  follow it     kernelm events --type swap --follow\n"
                                       f"  turn it back  kernelm plugin rollback {swap.pool}", highlight=False)  # fmt: skip
        raise
    assert swap is not None
    return swap


class SwapDrawing:
    """The live picture of a swap: its phases, how long each took, and what is going on in the present one."""

    def __init__(self) -> None:
        self._spinner = Spinner("dots", style="cyan")
        self._swap: Swap | None = None
        self._begun: dict[str, float] = {}  # step -> Unix seconds
        self._detail = ""

    def update(self, swap: Swap, state: SystemState | None) -> None:
        """A change, and the state if it was looked at."""
        self._swap = swap
        if state is not None and swap.phase == "starting":
            mine = [i for i in state.instances if i.pool == swap.pool and i.since >= swap.begun]
            spec = next((p for p in state.pools if p.pool == swap.pool), None)
            ready = sum(i.state == "ready" for i in mine)
            self._detail = ", ".join(f"{i.id} {i.state}" for i in mine[:4]) or "no instance yet"
            if spec and mine and ready >= max(spec.instances, 1):
                self._begun.setdefault("probing", time.time())
                self._detail = f"{ready} ready"
        step = "probing" if swap.phase == "starting" and "probing" in self._begun else swap.phase
        self._begun.setdefault(step, swap.begun if step == "starting" else swap.since)

    def draw(self, now: float) -> RenderableType:
        """One line a phase."""
        swap = self._swap
        if swap is None:
            return Text("asking the kernel", "dim")
        table = Table.grid(padding=(0, 1))
        for column in ({"width": 1}, {"no_wrap": True}, {"width": 20}, {"overflow": "fold", "min_width": 30}, {"justify": "right"}):
            table.add_column(**column)
        steps = [s for s in ORDER if (s != "watching" or watched(swap)) and (s != "retiring" or swap.before)]
        present = next((s for s in reversed(steps) if s in self._begun), steps[0])
        for step in steps:
            table.add_row(*self._row(swap, step, steps, present, now))
        head = Text.assemble((headline(swap), "bold"), (f"  {swap.id}", "dim"))
        return Group(head, table)

    def _row(self, swap: Swap, step: str, steps: list[str], present: str, now: float) -> tuple[RenderableType, ...]:
        name, order = Text(label(swap, step)), steps.index(step) - steps.index(present)
        if swap.phase in ("failed", "rolled_back") and order == 0:
            spent = swap.since - self._begun.get(step, swap.since)
            return MARKS["broken"], name, "", Text(reason(swap), "red"), Text(took(spent), "dim")
        if order < 0 or swap.phase == "done":
            ends = [self._begun[s] for s in steps[steps.index(step) + 1 :] if s in self._begun]
            spent = (ends[0] if ends else swap.since) - self._begun.get(step, ends[0] if ends else swap.since)
            figures, seen = reason(swap) if step == "watching" else "", step != "done" and step in self._begun
            return MARKS["past"], name, "", Text(figures, "dim"), Text(took(spent) if seen else "", "dim")
        if order > 0:
            return MARKS["ahead"], name, "", "", ""
        bar: RenderableType = ""
        detail, passed = self._detail if step in ("starting", "probing") else "", now - self._begun.get(step, now)
        if step == "watching":
            bar = ProgressBar(total=swap.bounds.watch_s, completed=min(passed, swap.bounds.watch_s), width=20)
            detail = f"{duration(math.ceil(max(swap.bounds.watch_s - passed, 0.0)))} left"
        elif step == "retiring":
            detail = f"{swap.before} answers what it has"
        return self._spinner, name, bar, Text(detail, "dim"), Text(took(passed), "dim")


class PlainSwap:
    """A swap as lines for a log: one for each phase."""

    def __init__(self) -> None:
        self._said = ""

    def update(self, swap: Swap) -> list[str]:
        """The lines that this change adds."""
        if swap.phase == self._said:
            return []
        first, self._said = not self._said, swap.phase
        after = f"{label(swap, swap.phase)}" + (f" ({took(swap.since - swap.begun)})" if not first else "")
        return [f"{headline(swap)}, swap {swap.id}", after] if first else [after]


def watched(swap: Swap) -> bool:
    """Whether there is a time in which both pools are compared."""
    return bool(swap.bounds.watch_s and swap.before)


def headline(swap: Swap) -> str:
    """What a swap is about, in a few words."""
    what = ", ".join(swap.routes) or "no route"
    return f"{what}: {swap.before} -> {swap.pool}" if swap.before else f"{what}: -> {swap.pool}"


def label(swap: Swap, step: str) -> str:
    """A step for people."""
    share = f"{swap.canary}% of the calls" if swap.canary else "all calls"
    return {"starting": f"starting {swap.pool}", "probing": "probing it", "watching": f"watching it with {share}",
            "retiring": f"retiring {swap.before}" if swap.before else "retiring", "done": "done",
            "failed": f"failed: {reason(swap)}", "rolled_back": f"rolled back: {reason(swap)}"}[step]  # fmt: skip


def reason(swap: Swap) -> str:
    """What decided it, in one line; the log that may follow in `outcome` is shown elsewhere."""
    return swap.outcome.partition("\n")[0]


def took(seconds: float) -> str:
    """"340 ms", "1.2 s", "2:05"."""
    seconds = max(seconds, 0.0)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def summary(swap: Swap, state: SystemState) -> Text:
    """What serves what now, in one line: of a swap that is done, or was turned back as somebody wished."""
    spec = resolve(state, swap.pool if swap.phase == "done" else swap.before)
    if spec is None:
        return Text(f"pool {swap.pool} is gone, and nothing is in its place: {swap.outcome}", "yellow")
    mine = [i for i in state.instances if i.pool == spec.pool and i.state == "ready"]
    version = next((f" {i.version}" for i in mine if i.version), "")
    now = sorted({r.generation for r in state.routes if r.name in swap.routes})
    count = f"{len(mine)} {'instance' if len(mine) == 1 else 'instances'}"
    text = Text.assemble(("✓ ", "bold green"), (", ".join(swap.routes) or spec.pool, "bold"), " is served by pool ",
                         (spec.pool, "bold"), f" ({spec.plugin}{version}, {count})")  # fmt: skip
    if now:
        text.append(f", generation {', '.join(map(str, now))}")
    if swap.phase == "done":
        text.append(f"; the routes changed in {swap.took_ms:.1f} ms")
    if swap.phase == "done" and any(p.pool == swap.before and p.parked for p in state.pools):
        text.append(f"\n  kernelm plugin rollback {spec.pool} goes back to {swap.before}", "dim")
    return text


def readable(log: str, root: Path | None) -> str:
    """A log without the frames of the runner above the plugin's own, and with the plugin's files as they are called in `root`."""
    lines = log.splitlines()
    first = own = next((n for n, line in enumerate(lines) if line.startswith("  File") and STORED.search(line)), 0)
    while first and lines[first - 1].startswith("  "):  # a frame, with its line of code
        first -= 1
    del lines[first:own]
    return STORED.sub(f"{root}/" if root else "", "\n".join(lines))


async def fault_of(bus: Bus, swap: Swap, root: Path | None = None) -> Fault:
    """Why a swap did not come to its end, with the diagnosis and the last lines of the log of the new instance. `root`: the
    folder that the plugin's files came from."""
    before = f"; pool {swap.before} serves on" if swap.before else ""
    code, remedy = f"swap_{swap.phase}", "mend what it names, the plugin, its settings or its node, and do the same again"
    if swap.phase == "rolled_back":
        remedy = "look at the new one's log, or give it wider bounds: --max-errors, --max-latency, --watch"
    details: dict[str, Any] = {"swap": swap.id, "pool": swap.pool}
    state = await state_of(bus)
    broken = max((i for i in state.instances if i.pool == swap.pool and i.since >= swap.begun), key=lambda i: i.since, default=None)
    if broken is not None and broken.node:
        with contextlib.suppress(Fault):  # its node is away, or has forgotten it: then the outcome has to do
            found: Diagnosis = await bus.call(Node.diagnose, InstanceName(broken.id), instance=f"node-{broken.node}", timeout_s=5.0)
            details |= {"instance": broken.id, "log": readable(found.log, root)}
    return PluginFault(code, f"{', '.join(swap.routes) or swap.pool}: {reason(swap) or swap.phase}{before}", remedy, **details)


async def conclude(bus: Bus, console: Console, swap: Swap, json: Callable[[Any], None] | None, wanted: frozenset[str]) -> None:
    """The last word on a swap: one line, or JSON; the fault if it ended in no phase of `wanted`."""
    fault = await fault_of(bus, swap) if swap.over and swap.phase not in wanted else None
    state = await state_of(bus)
    if json is not None:
        routes = [r for r in state.routes if r.name in swap.routes]
        json({"swap": swap, "routes": routes, "fault": fault.body() if fault else None})
    elif not swap.over:
        console.print(f"{headline(swap)} goes on as swap {swap.id}; `kernelm events --type swap -f` follows it", highlight=False)
    elif fault is None:
        console.print(summary(swap, state), soft_wrap=True)
    if fault is not None:
        raise fault


def unknown(state: SystemState, name: str) -> ClientFault:
    """The fault for what names no pool, plugin or contract that runs."""
    return ClientFault("not_found", f"no pool, plugin or contract {name!r} is there",
                       f"pools are {', '.join(sorted(p.pool for p in state.pools)) or 'none'}; `kernelm plugin list`")  # fmt: skip


async def settle(bus: Bus, done: Callable[[SystemState], bool], what: str, timeout_s: float) -> SystemState:
    """The state once `done` says so of it; KernelFault "timeout" after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while True:
        state = await state_of(bus, PATIENCE_S)
        if done(state):
            return state
        if time.monotonic() > end:
            raise KernelFault("timeout", f"{what} within {timeout_s:g} s", "`kernelm ps` and `kernelm events` say more")
        await asyncio.sleep(LOOK_S / 5)
