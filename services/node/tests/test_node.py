"""The node in a whole system: a real broker, a real kernel, instances in processes of their own, and kill -9."""

import os
import signal
from pathlib import Path

import pytest

from kernelm.testing.harness import System, until
from kernelm.testing.hooks import install_plugin
from kernelm_node.logs import INSTANCE
from kernelm_node.runtimes.pidfd import started_at
from kernelm_sdk.plugin import Manifest
from kernelm_sdk.system import Empty, InstanceName, Kernel, Lifecycle, Node, NodeReport, PoolName, PoolSpec

MANIFEST = """
name = "{name}"
version = "0.0.1"
summary = "for tests"
contracts = ["{name}/1"]
entry = "kernelm_{name}.plugin:P"
runtimes = ["process", "inproc"]
default = false
[restart]
backoff_s = 0.05
"""
PLUGIN = """
import msgspec
{extra}
from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.plugin import Plugin

class Text(msgspec.Struct):
    text: str

class C(Contract, name="{name}", major=1):
    @unary
    async def say(self, request: Text, call) -> Text: ...

class P(Plugin, C):
    async def say(self, request, call):
        return request
"""


def install(folder: Path, name: str, extra: str = "") -> Manifest:
    return install_plugin(folder, name, MANIFEST.format(name=name), PLUGIN.format(name=name, extra=extra))


@pytest.fixture
async def system(tmp_path: Path):
    site = tmp_path / "site"
    manifests = {"steady": install(site, "steady"), "broken": install(site, "broken", "import surely_not_there")}
    async with System(manifests=manifests) as system:
        system.path = {"PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        await system.service("node", **system.path)
        yield system


async def report(system: System) -> NodeReport:
    return await system.admin.call(Node.report, Empty(), instance="node-local", patience_s=10)


async def test_a_pool_runs_survives_kill_9_of_the_node_and_is_adopted(system: System) -> None:
    await system.pool(PoolSpec("steady", "steady"))
    before = (await report(system)).running
    assert [r.plugin for r in before] == ["steady"]
    pid, instance = before[0].pid, before[0].instance
    assert {"steady", "broken"} <= set((await report(system)).plugins)
    assert INSTANCE.fullmatch((system.home / "logs" / f"{instance}.log").name), "else its log is never removed"

    system.processes["node"].kill()
    system.processes["node"].wait()
    assert (await system.admin.call(Lifecycle.probe, Empty(), instance=instance)).instance == instance
    await system.service("node", **system.path)
    assert (await report(system)).running == before

    os.kill(pid, signal.SIGKILL)

    async def replaced() -> bool:
        return any(i.plugin == "steady" and i.state == "ready" and i.id != instance for i in (await system.state()).instances)

    await until(replaced, 20, "another instance")
    dead = next(i for i in (await system.state()).instances if i.id == instance)
    assert "SIGKILL" in dead.reason or "nobody could see" in dead.reason

    second = (await report(system)).running[0]
    await system.admin.call(Kernel.stop_pool, PoolName("steady"))
    await until(lambda: not started_at(second.pid), 20, "the end of the pool")


async def test_sigterm_of_the_node_ends_its_instances(system: System) -> None:
    await system.pool(PoolSpec("steady", "steady", instances=2))

    async def two() -> bool:
        return len((await report(system)).running) == 2

    await until(two, 20, "two instances")
    running = (await report(system)).running
    system.processes["node"].terminate()
    await until(lambda: system.processes["node"].poll() is not None, 30, "the end of the node")
    assert system.processes["node"].returncode == 0
    assert not any(started_at(r.pid) for r in running)
    assert list((system.home / "scratch").iterdir()) == []


async def test_the_kernel_hears_why_a_plugin_does_not_start(system: System) -> None:
    await system.admin.call(Kernel.start_pool, PoolSpec("broken", "broken"))

    async def told() -> str:
        return next((i.reason for i in (await system.state()).instances if i.plugin == "broken" and i.state == "exited"), "")

    reason = await until(told, 20, "an exit report")
    assert "pip install surely-not-there" in reason
    name = next(i.id for i in (await system.state()).instances if i.state == "exited")
    diagnosis = await system.admin.call(Node.diagnose, InstanceName(name), instance="node-local")
    assert "ModuleNotFoundError" in diagnosis.log
    await system.admin.call(Kernel.stop_pool, PoolName("broken"))


async def test_an_inproc_instance_lives_and_ends_within_the_node(system: System) -> None:
    await system.pool(PoolSpec("steady", "steady", runtime="inproc"))
    running = (await report(system)).running
    assert [(r.runtime, r.pid) for r in running] == [("inproc", 0)]
    await system.admin.call(Node.stop, InstanceName(running[0].instance), instance="node-local", timeout_s=20.0)
    assert running[0].instance not in {r.instance for r in (await report(system)).running}
    assert system.processes["node"].poll() is None


@pytest.fixture(autouse=True)
def leave_nothing_running(tmp_path: Path):
    """What a failed test left behind must not outlive it."""
    yield
    import psutil

    for process in psutil.process_iter():
        try:
            if str(tmp_path / "site") in process.environ().get("PYTHONPATH", ""):
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
