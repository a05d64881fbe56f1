"""Faults of processes: SIGKILL, and SIGSTOP for longer than a lease."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import psutil
from chaosplugin import journal

from faultmatrix.rig import POOL, send
from faultmatrix.stage import LEASE_S, Stage, fault
from kernelm.testing.harness import until
from kernelm_sdk.system import InstanceName, Kernel, Node, PoolSpec, Running

CHILDREN = ("broker", "kernel", "node", "jobs", "gateway", "artifacts")


async def in_the_middle_of_a_job(stage: Stage) -> Running:
    """An instance that works on a job of this run which has a checkpoint."""
    async def look() -> Running | None:
        lines = [n for n in journal.read(stage.rig.folder) if n.get("job", "").startswith(f"{stage.load.run}-")]
        ended = {(n["job"], n["epoch"]) for n in lines if n["what"] == "end"}
        at_work = [n["by"] for n in lines if n["what"] == "saved" and (n["job"], n["epoch"]) not in ended]
        return next((r for r in await stage.rig.running(POOL) if r.instance in at_work[-2:]), None)

    return await until(look, 20.0, "a job with a checkpoint")


async def in_the_middle_of_a_call(stage: Stage) -> Running:
    """An instance that is handling a call."""
    stage.load.spawn(stage.load.call(hold_s=1.0))
    await asyncio.sleep(0)  # it has begun now
    name = stage.load.calls[-1].id

    async def look() -> Running | None:
        by = next((n["by"] for n in journal.read(stage.rig.folder) if n["what"] == "call" and n["id"] == name), "")
        return next((r for r in await stage.rig.running(POOL) if r.instance == by), None)

    return await until(look, 10.0, "a call under way")


async def any_instance(stage: Stage) -> Running:
    return stage.rng.choice(await stage.rig.running(POOL))


async def the_scheduler(stage: Stage) -> Running:
    """The scheduler's instance. It runs inside of the node where nobody wants otherwise; here it gets a process."""
    async def own_process() -> Running | None:
        found = await stage.rig.running("scheduler")
        return next((r for r in found if r.pid and r.pid != stage.rig.pid("node")), None)

    if running := await own_process():
        return running
    old = await stage.rig.running("scheduler")
    await stage.rig.bus.call(Kernel.start_pool, PoolSpec("scheduler", "scheduler", runtime="process"), patience_s=10.0)
    for instance in old:
        await stage.rig.bus.call(Node.stop, InstanceName(instance.instance), instance="node-local", timeout_s=20.0)
    running = await until(own_process, 30.0, "a scheduler in a process of its own")
    await stage.rig.whole()
    return running


INSTANCES: dict[str, Callable[[Stage], Awaitable[Running]]] = {
    "plugin, idle": any_instance, "plugin, mid-call": in_the_middle_of_a_call, "plugin, mid-job": in_the_middle_of_a_job,
    "scheduler": the_scheduler,
}  # fmt: skip


async def _pid(stage: Stage, victim: str) -> tuple[int, str]:
    if victim in CHILDREN:
        return stage.rig.pid(victim), victim
    running = await INSTANCES[victim](stage)
    return running.pid, running.instance


async def kill(stage: Stage, victim: str) -> str:
    """SIGKILL."""
    pid, name = await _pid(stage, victim)
    stage.check(send(pid, signal.SIGKILL), f"{name} (pid {pid}) was gone before it was killed")
    stage.over()
    return name


async def pause(stage: Stage, victim: str) -> str:
    """SIGSTOP, and SIGCONT after the victim's lease has run out: it may wake up as a zombie, if nobody has ended it."""
    pid, _ = await _pid(stage, victim)
    process = psutil.Process(pid)
    process.suspend()
    seconds = LEASE_S + 1.2 + stage.rng.random()
    await asyncio.sleep(seconds)
    woke = send(pid, signal.SIGCONT)
    stage.over()
    return f"{seconds:.1f} s" if woke else "ended while it was frozen"


def _enter() -> None:
    for victim, share in dict.fromkeys(CHILDREN, 4).items() | dict.fromkeys(INSTANCES, 4).items():
        load = {"jobs_at_once": 0} if victim == "plugin, idle" else {}
        short = victim not in ("plugin, idle", "plugin, mid-call")
        fault(f"kill: {victim}", share, short=short, load=load)(lambda stage, v=victim: kill(stage, v))  # type: ignore[misc]
    for victim in (*CHILDREN, "plugin, mid-job", "scheduler"):
        if victim != "broker":
            fault(f"pause: {victim}", 2, short=victim == "plugin, mid-job")(lambda stage, v=victim: pause(stage, v))  # type: ignore[misc]


_enter()


@fault("pause: broker, 5 s", 3)
async def pause_broker(stage: Stage) -> str:
    process = psutil.Process(stage.rig.pid("broker"))
    process.suspend()
    await asyncio.sleep(5.0)
    process.resume()
    stage.over()
    return "5 s"
