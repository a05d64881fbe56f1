"""`kernelm plugin dev PATH`: the plugin in a folder, reloaded at each save by the protocol of every other swap."""

import asyncio
import contextlib
import signal
import time
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.text import Text
from watchfiles import Change as FileChange
from watchfiles import awatch

from kernelm_cli import faults, staging, trusting
from kernelm_cli.plugins import Starting, ask_load, store
from kernelm_cli.results import short
from kernelm_cli.session import Common, connection, stdout
from kernelm_cli.swapping import changes, fault_of, resolve, state_of, took
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.plugin import MANIFEST
from kernelm_sdk.system import (
    ArtifactName,
    Artifacts,
    Bounds,
    Kernel,
    LoadRequest,
    OpenArtifact,
    PoolName,
    PoolSpec,
    RollbackRequest,
    Swap,
    SwapRequest,
    UnloadRequest,
)

AT_ONCE = Bounds(watch_s=0.0, ready_s=60.0)
STEP_MS, QUIET_MS = 10, 400  # a save is complete once nothing has changed for STEP_MS, after QUIET_MS at the latest


def dev(path: Annotated[Path, Parameter(name="PATH")], /, *, starting: Starting = Starting(), common: Common = Common()) -> int:
    """Run the plugin in a folder and reload it at every save, until Ctrl-C puts back what was there before.

    It takes over the contracts of what serves them now. A save that does not start is diagnosed, and what ran before it
    runs on.

    Parameters
    ----------
    path
        The plugin's folder.
    """
    if str(path).endswith(staging.ARCHIVES):
        what = f"{path} is a wheel or an archive, which does not change"
        raise ClientFault("invalid", what, "kernelm plugin load, or name the folder")
    source = staging.find(path)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_dev(source, common.folder, starting, stdout()))
    return 0


async def _dev(source: staging.Source, home: Path, starting: Starting, console: Console) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # both end it by way of putting back what was there
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with connection(home) as bus:
        session = DevSession(bus, home, source, starting, console)
        saves = Saves(source, stop)
        watching = asyncio.create_task(saves.watch())  # before the files are read, so that no save falls in between
        try:
            await session.begin()
            console.print(Text.assemble(("watching ", "dim"), str(source.folder), (": Ctrl-C ends it", "dim")), soft_wrap=True)
            while await saves.next():
                await session.reload(saves.written)
        finally:
            stop.set()
            await watching
            await session.end()


class Saves:
    """What changes in the folder. Saves that come while one is taken up are one save."""

    def __init__(self, source: staging.Source, stop: asyncio.Event) -> None:
        self._folder, self._stop = source.folder.resolve(), stop
        self._left_out = staging.LeftOut(source.folder, bool(source.manifest.command))
        self._saved = asyncio.Event()
        self.written = 0.0  # Unix seconds of the last one

    async def next(self) -> bool:
        """Wait for a save: True; or for the end: False."""
        waiting = [asyncio.create_task(event.wait()) for event in (self._saved, self._stop)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        self._saved.clear()
        return not self._stop.is_set()

    async def watch(self) -> None:
        """Until the end."""
        async for batch in awatch(self._folder, watch_filter=self._wanted, step=STEP_MS, debounce=QUIET_MS, stop_event=self._stop):
            now = time.time()
            times = [p.stat().st_mtime for p in (Path(path) for _, path in batch) if p.exists()]
            self.written = min(max(times, default=now), now)
            self._saved.set()

    def _wanted(self, _: FileChange, path: str) -> bool:
        relative = Path(path).relative_to(self._folder)
        return not (any(self._left_out(p, True) for p in relative.parents if p.parts) or self._left_out(relative, False))


class DevSession:
    """What is loaded from the folder now, and what was there before."""

    def __init__(self, bus: Bus, home: Path, source: staging.Source, starting: Starting, console: Console) -> None:
        self._bus, self._home, self._source, self._starting, self._console = bus, home, source, starting, console
        self._before: PoolSpec | None = None  # what was replaced, to be put back
        self._pool = ""  # the one that serves now
        self._digest = ""
        self._broken = False  # whether the last save was not taken up

    async def begin(self) -> None:
        """Load it, in the place of what serves its contracts now; the fault if it can't be."""
        state = await state_of(self._bus)
        manifest = self._source.manifest
        found = [resolve(state, name) for name in (manifest.name, *manifest.contracts)]
        there = list({spec.pool: spec for spec in found if spec is not None and not spec.parked}.values())
        if len(there) > 1:
            pools = ", ".join(p.pool for p in there)
            what = f"{manifest.name} implements {', '.join(manifest.contracts)}, and several pools serve these: {pools}"
            raise ClientFault("conflict", what, "unload all but one of them first: kernelm plugin unload POOL")
        self._before = there[0] if there else None
        began = time.time()
        fault = await self._load(self._before.pool if self._before else "", began)
        if fault is not None:
            raise fault

    async def reload(self, saved: float) -> None:
        """Take up a save: one line says how it went, and a fault what is wrong with it."""
        try:
            self._source = staging.find(self._source.folder)
            fault = await self._load(self._pool, saved)
        except (Fault, OSError) as error:  # a file may vanish while it is read: its editor saves once more then
            fault = faults.of(error)
        self._broken = fault is not None
        if fault is not None:
            fault.remedy = "mend it and save: it is taken up then" if fault.code == "swap_failed" else fault.remedy
            self._console.print(Text.assemble((_clock(), "dim"), ("  ✗ not taken up", "bold red"), f"; {self._pool} runs on"))
            faults.show(fault)

    async def _load(self, replaces: str, since: float) -> Fault | None:
        """Store, swap, and say how long it took from `since` until the routes had changed."""
        digest, files = await store(self._bus, self._home, self._source)
        if digest == self._digest:
            if self._broken:
                self._console.print(Text.assemble((_clock(), "dim"), ("  ✓ ", "bold green"), "back to what runs in ", self._pool))
            return None
        await trusting.verdicts(self._bus, digest, self._starting.allow_unsigned, "plugin dev")
        wanted = self._starting.request("plugin dev", replaces, AT_ONCE)
        wanted = msgspec.structs.replace(wanted, manifest=self._source.text, source=digest, instances=wanted.instances or 1)

        async def ask() -> Swap:
            return await ask_load(self._bus, wanted)

        live = 0.0
        async for swap, _ in changes(self._bus, ask):
            if swap.phase in ("retiring", "done") and not live:
                live, self._pool, self._digest = time.time(), swap.pool, digest
                self._say(swap, digest, files, live - since)
        return None if swap.phase == "done" else await fault_of(self._bus, swap, self._source.root)

    def _say(self, swap: Swap, digest: str, files: int, seconds: float) -> None:
        m = self._source.manifest
        self._console.print(Text.assemble(
            (_clock(), "dim"), ("  ✓ ", "bold green"), (f"{m.name} {m.version}", "bold"),
            f" serves {', '.join(swap.routes)} after ", (took(seconds), "bold"),
            (f"  pool {swap.pool}, {short(digest)}, {files} files", "dim")), soft_wrap=True)  # fmt: skip

    async def end(self) -> None:
        """Put back what was there before, or unload."""
        if not self._pool:
            return
        if self._before is None:
            await self._bus.call(Kernel.unload, UnloadRequest(self._pool, True, "end of plugin dev"), timeout_s=120.0)
            self._console.print(f"{self._source.manifest.name} is unloaded")
            return
        swap = [swap async for swap, _ in changes(self._bus, self._put_back)][-1]
        if swap.phase != "done":
            raise await fault_of(self._bus, swap)
        await self._bus.call(Kernel.stop_pool, PoolName(self._pool))  # parked by now; `unload` would take its name for the plugin's
        what = ", ".join(swap.routes)
        self._console.print(f"{what} is served by pool {swap.pool} ({self._before.plugin}) again", highlight=False)

    async def _put_back(self) -> Swap:
        """The old pool: by a rollback while the kernel keeps it (it keeps one step), else anew as it was."""
        assert self._before is not None
        before, why = self._before, "end of plugin dev"
        state = await state_of(self._bus)
        kept = next((p for p in state.pools if p.pool == before.pool), None)
        routes = tuple(r.name for r in state.routes if any(d.pool == self._pool for d in r.to))
        swap: Swap
        if kept is not None and kept.parked and any(s.pool == self._pool and s.before == before.pool for s in state.swaps):
            swap = await self._bus.call(Kernel.rollback, RollbackRequest(self._pool, why))
        elif not before.source:
            swap = await self._bus.call(Kernel.swap, SwapRequest(before, routes, self._pool, bounds=AT_ONCE, why=why))
        else:  # the kernel has forgotten its manifest; the store has not
            opened: OpenArtifact = await self._bus.call(Artifacts.open, ArtifactName(before.source), timeout_s=120.0)
            text = await asyncio.to_thread((Path(opened.path) / MANIFEST).read_text)
            swap = await self._bus.call(Kernel.load, LoadRequest(
                "", text, before.source, self._pool, before.runtime, max(before.instances, 1), before.settings, before.image,
                before.artifacts, bounds=AT_ONCE, why=why))  # fmt: skip
        return swap


def _clock() -> str:
    return time.strftime("%H:%M:%S")
