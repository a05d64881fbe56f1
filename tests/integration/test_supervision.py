"""A whole system as `kernelm up` starts it, and each of its processes killed: it comes back, and the others did not notice."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from kernelm.testing.harness import until
from kernelm_authority.identity import admin
from kernelm_cli.home import UpFile, read_up
from kernelm_contracts.scheduler import ClusterState, Scheduler
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault, KernelFault
from kernelm_sdk.system import ArtifactQuery, Artifacts, Empty, Kernel, Node, SystemState

pytestmark = pytest.mark.slow
SERVICES = {"artifacts": "artifacts", "node": "node-local", "jobs": "jobs", "gateway": "gateway"}  # child -> instance


class Running:
    """A system that `kernelm up` has started."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.bus: Bus

    @property
    def up(self) -> UpFile:
        found = read_up(self.home)
        assert found is not None
        return found

    async def command(self, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kernelm_cli", *arguments, "--home", str(self.home), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)  # fmt: skip
        text, _ = await process.communicate()
        assert process.returncode == 0, text.decode()
        return text.decode()

    async def state(self) -> SystemState | None:
        with contextlib.suppress(Fault):
            state: SystemState = await self.bus.call(Kernel.state, Empty(), timeout_s=2.0)
            return state
        return None

    async def ready(self) -> dict[str, float]:
        """Instance -> since when it is ready."""
        state = await self.state()
        return {i.id: i.since for i in state.instances if i.state == "ready"} if state else {}

    async def plugins(self) -> dict[str, int]:
        """Plugin instance -> pid."""
        report = await self.bus.call(Node.report, Empty(), instance="node-local", timeout_s=10.0, patience_s=60.0)
        return {r.instance: r.pid for r in report.running}

    async def kill(self, child: str) -> None:
        """SIGKILL it, and wait until the launcher has started it again."""
        before = self.up.processes[child]
        os.kill(before.pid, signal.SIGKILL)
        await until(lambda: self.up.processes[child].restarts > before.restarts, 60.0, f"{child} again")

    async def works(self) -> bool:
        """Whether calls to a plugin and to a service are answered."""
        try:
            await self.bus.call(Scheduler.decide, ClusterState(1, time.time(), (), ()), timeout_s=2.0)
            await self.bus.call(Artifacts.find, ArtifactQuery(), timeout_s=2.0)
        except KernelFault:
            return False
        return True


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    system = Running(tmp_path / "home")
    await system.command("up", "--detach")
    system.bus = await Bus.connect(system.up.url, admin(system.home))
    yield system
    await system.bus.close()
    if read_up(system.home) is not None:
        await system.command("down")


async def test_a_restarted_kernel_adopts_what_runs_and_starts_nothing_anew(running: Running) -> None:
    before, plugins = await running.ready(), await running.plugins()
    state = await running.state()
    assert state is not None
    failed: list[str] = []

    async def call_on() -> None:
        while True:
            try:
                await running.bus.call(Scheduler.decide, ClusterState(1, time.time(), (), ()), timeout_s=5.0)
            except Fault as fault:
                failed.append(str(fault))
            await asyncio.sleep(0.01)

    calling = asyncio.create_task(call_on())
    await running.kill("kernel")

    async def leads() -> SystemState | None:
        now = await running.state()
        if now is None or now.leader_epoch <= state.leader_epoch or now.health["routes"] != "in force":
            return None
        return now if any(i.id == "kernel" and i.state == "ready" for i in now.instances) else None  # it answers before it says so

    after: SystemState = await until(leads, 60.0, "the next kernel")
    calling.cancel()
    assert not failed
    assert set(before) == {i.id for i in after.instances if i.state == "ready"}
    assert {p.pool: p for p in after.pools} == {p.pool: p for p in state.pools}
    assert {r.name: r for r in after.routes} == {r.name: r for r in state.routes}

    async def renewed() -> bool:  # longer than a lease lasts: whoever had to renew it with the new kernel has
        now = await running.state()
        return now is not None and min(i.since for i in now.instances if i.id == "kernel") + 12.0 < time.time()

    await until(renewed, 60.0)
    assert await running.plugins() == plugins  # the same processes
    assert {k: v for k, v in (await running.ready()).items() if k != "kernel"} == {k: v for k, v in before.items() if k != "kernel"}


@pytest.mark.parametrize("child", SERVICES)
async def test_a_killed_service_comes_back(running: Running, child: str) -> None:
    before, plugins = await running.ready(), await running.plugins()
    await running.kill(child)

    async def again() -> bool:
        return (await running.ready()).get(SERVICES[child], 0.0) > before[SERVICES[child]]

    await until(again, 60.0, f"{child} ready")
    await until(running.works, 60.0, "calls")
    others = {name for name, process in running.up.processes.items() if process.restarts}
    assert others == {child}
    now = await running.plugins()
    inproc = {i for i, pid in plugins.items() if not pid}  # these lived in the node
    assert {i: pid for i, pid in plugins.items() if pid}.items() <= now.items()
    assert child == "node" or inproc <= now.keys()


async def test_a_broker_that_dies_comes_back_and_everything_reconnects(running: Running) -> None:
    before, plugins = await running.ready(), await running.plugins()
    await running.kill("broker")
    await until(running.works, 60.0, "calls")

    async def all_ready() -> bool:
        state = await running.state()
        live = {i.id for i in state.instances if i.state == "ready"} if state else set()
        return live == set(before)

    await until(all_ready, 60.0, "everybody")
    begun = time.monotonic()
    await until(lambda: time.monotonic() - begun > 8.0)  # longer than a lease: nobody is taken for dead afterwards
    assert await all_ready()
    assert await running.plugins() == plugins
    assert {name for name, process in running.up.processes.items() if process.restarts} == {"broker"}


async def test_the_system_stops_in_the_reverse_order_of_its_start(running: Running) -> None:
    pids = dict(running.up.children)
    plugins = await running.plugins()
    assert list(pids) == ["broker", "kernel", "artifacts", "node", "jobs", "gateway"]
    launcher = psutil.Process(running.up.pid)
    ended: list[str] = []

    async def watch() -> None:
        left = dict(pids)
        while left:
            for name in [n for n, pid in left.items() if not _alive(pid)]:
                ended.append(name)
                del left[name]
            await asyncio.sleep(0.005)

    watching = asyncio.create_task(watch())
    await running.command("down")
    await watching
    assert ended == list(reversed(pids))
    assert not any(_alive(pid) for pid in plugins.values() if pid)
    assert not _alive(launcher.pid)
    assert read_up(running.home) is None
    left = [f.name for f in (running.home / "run" / "tokens").iterdir()]
    assert not left
    log = (running.home / "logs" / "launcher.log").read_text()
    assert not re.search(r"did not stop within|Traceback", log), log


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
