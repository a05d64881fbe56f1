"""A node that is killed: its containers run on, and the next one adopts them."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_node.runtimes.container import ContainerRuntime
from kernelm_node.runtimes.runtime import Exit, Handle, Launch
from kernelm_sdk.plugin import read_manifest
from kernelm_sdk.relay import Relay, listen
from kernelm_sdk.system import Empty, Kernel, Lifecycle, Node, NodeReport, PoolName, PoolSpec, Running

pytestmark = pytest.mark.asyncio(loop_scope="module")
BOXED_MANIFEST = """
name = "boxed"
version = "0.0.1"
summary = "for tests"
contracts = ["boxed/1"]
entry = "kernelm_boxed:P"
runtimes = ["container"]
default = false
[limits]
memory_mb = 256
"""
BOXED = """
import msgspec
from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.plugin import Plugin

class Text(msgspec.Struct):
    text: str

class C(Contract, name="boxed", major=1):
    @unary
    async def say(self, request: Text, call) -> Text: ...

class P(Plugin, C):
    async def say(self, request, call):
        return request
"""
COUNT = """
import os, threading, time

def go():
    for k in range(100000):
        os.write(1, b"tick %d\\n" % k)  # a line at once: print writes it in pieces, and a kill may come between them
        time.sleep(0.002)

threading.Thread(target=go, daemon=True).start()
"""
NODE = """
import asyncio, os, sys
from pathlib import Path
import msgspec
from kernelm_node.runtimes.container import ContainerRuntime
from kernelm_node.runtimes.runtime import Handle, Launch

async def main():
    runtime = ContainerRuntime(Path(os.environ["KERNELM_HOME"]))
    await runtime.probe()
    order = sys.stdin.buffer.readline()
    if sys.argv[1] == "start":
        task = await runtime.start(msgspec.json.decode(order, type=Launch, dec_hook=lambda kind, text: kind(text)))
    else:
        task = await runtime.adopt(msgspec.json.decode(order, type=Handle))
    print(task.state, task.pid, flush=True)
    print(await task.wait(), flush=True)
    await runtime.close()

asyncio.run(main())
"""


async def node(house: Any, what: str, order: Launch | Handle) -> subprocess.Popen[bytes]:
    """A container runtime in a process of its own that starts or adopts one instance and waits for its end."""
    environment = os.environ | {"KERNELM_URL": house.system.broker.url, "KERNELM_HOME": str(house.system.home)}
    process = subprocess.Popen([sys.executable, "-c", NODE, what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(order, enc_hook=str) + b"\n")
    process.stdin.flush()
    return process


async def line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 60)).decode()


def assert_whole(output: Path) -> None:
    """Every line of COUNT once, in order."""
    ticks = [int(text.split()[1]) for text in output.read_text().splitlines() if text.startswith("tick")]
    assert len(ticks) > 100
    assert ticks == list(range(len(ticks)))


async def test_a_container_outlives_its_node_and_its_output_has_neither_gaps_nor_duplicates(house: Any) -> None:
    launch = house.launch()
    launch.log.write_text("of an earlier start\n")
    first = await node(house, "start", launch)
    try:
        started = await line(first)
        await house.system.ready(launch.instance, 60)
        await house.do(launch, COUNT, here=True)
        await until(lambda: "tick 100\n" in launch.log.read_text(), 30, "output")
        first.kill()
        first.wait()
        cut = launch.log.stat().st_size
        assert await house.do(launch, "print('without a node')") == "without a node\n"
        handle = house.handle(launch, {}, len("of an earlier start\n"))  # it did not come to write the id down
        second = await node(house, "adopt", handle)
        assert await line(second) == started  # the same container, the same process
        await until(lambda: launch.log.stat().st_size > cut, 30, "more output")
        assert await house.do(launch, "print('alive')") == "alive\n"
        os.kill(int(started.split()[-1]), 9)
        assert "code=-9" in await line(second)
        assert second.wait(30) == 0
        assert_whole(launch.log)
    finally:
        first.kill()


async def test_one_that_ended_while_no_node_watched_still_tells_how(house: Any) -> None:
    launch = house.launch()
    task = await house.ready(launch)
    call = asyncio.create_task(house.do(launch, "import os; print('farewell', flush=True); os._exit(7)", here=True))
    assert await asyncio.wait_for(task.wait(), 60) == Exit(7)
    call.cancel()
    launch.log.unlink()
    adopted = await house.runtime.adopt(house.handle(launch, task.state))
    assert adopted is not None
    assert await asyncio.wait_for(adopted.wait(), 60) == Exit(7)
    assert "farewell" in launch.log.read_text()
    await house.runtime.clear(house.handle(launch, task.state))
    assert await house.runtime.adopt(house.handle(launch, task.state)) is None


async def test_an_engine_that_goes_away_for_a_while_costs_neither_output_nor_exit_code(
        house: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    usual = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    between = Relay(usual.replace("unix://", "unix:"))
    await between.on_socket(listen(tmp_path / "engine.sock", os.geteuid()))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/engine.sock")
    launch = house.launch()
    task = await house.ready(launch)
    await house.do(launch, COUNT, here=True)
    await until(lambda: "tick 100\n" in launch.log.read_text(), 30, "output")
    await between.close()
    unseen = ContainerRuntime(house.system.home)
    await unseen.probe()
    assert "no Docker engine answers" in unseen.missing
    handle = msgspec.structs.replace(house.handle(launch, task.state), log=str(tmp_path / "second.log"))
    adopted = await unseen.adopt(handle)  # by a node that starts before its engine
    assert adopted is not None
    assert adopted.pid == task.pid
    os.kill(task.pid, signal.SIGTERM)
    await between.on_socket(listen(tmp_path / "engine.sock", os.geteuid()))
    assert await asyncio.wait_for(task.wait(), 60) == await asyncio.wait_for(adopted.wait(), 60) == Exit(0)
    await between.close()
    for log in (launch.log, tmp_path / "second.log"):
        assert_whole(log)


async def test_what_nobody_waits_for_is_removed_when_a_node_starts(house: Any) -> None:
    launch = house.launch()
    task = await house.start(launch)
    await task.kill()
    await asyncio.wait_for(task.wait(), 60)
    assert house.engine.containers.list(all=True, filters={"label": f"kernelm.instance={launch.instance}"})
    another = ContainerRuntime(house.system.home)
    await asyncio.to_thread(another._look)
    assert not house.engine.containers.list(all=True, filters={"label": f"kernelm.instance={launch.instance}"})
    await another.close()


async def test_in_a_whole_system_a_killed_node_leaves_its_containers_to_the_next(docker_engine: Any, tmp_path: Path) -> None:
    package, info = tmp_path / "kernelm_boxed", tmp_path / "kernelm_boxed-0.0.1.dist-info"
    for folder in (package, info):
        folder.mkdir()
    (package / "__init__.py").write_text(BOXED)
    (package / "kernelm-plugin.toml").write_text(BOXED_MANIFEST)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernelm-boxed\nVersion: 0.0.1\n")
    (info / "entry_points.txt").write_text("[kernelm.plugins]\nboxed = kernelm_boxed\n")
    async with System(manifests={"boxed": read_manifest(package / "kernelm-plugin.toml")}) as system:
        path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

        async def running() -> tuple[Running, ...]:
            report: NodeReport = await system.admin.call(Node.report, Empty(), instance="node-local", patience_s=20)
            return report.running

        await system.service("node", **path)
        await system.pool(PoolSpec("boxed", "boxed", runtime="container"))
        before = await running()
        assert [(r.runtime, r.plugin) for r in before] == [("container", "boxed")]
        system.processes["node"].kill()
        system.processes["node"].wait()
        await system.service("node", **path)
        assert await running() == before
        instance = before[0].instance
        assert (await system.admin.call(Lifecycle.probe, Empty(), instance=instance, patience_s=30)).instance == instance
        os.kill(before[0].pid, signal.SIGKILL)

        async def replaced() -> bool:
            return any(r.instance != instance for r in await running())

        await until(replaced, 60, "another instance")
        dead = next(i for i in (await system.state()).instances if i.id == instance)
        assert "SIGKILL" in dead.reason
        home = {"label": f"kernelm.home={system.home}"}
        await system.admin.call(Kernel.stop_pool, PoolName("boxed"))
        await until(lambda: not docker_engine.containers.list(all=True, filters=home), 60, "the end of all containers")
        assert list((system.home / "scratch").iterdir()) == []
