"""The service with real processes and a stand-in for the bus; with the real one in test_node.py."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from kernelm.testing.harness import until
from kernelm_node.handles import Handles
from kernelm_node.logs import LOG_BYTES, Logs
from kernelm_node.runtimes.pidfd import started_at
from kernelm_node.runtimes.process import ProcessRuntime
from kernelm_node.service import NodeService
from kernelm_node.sources import Sources
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.plugin import Manifest
from kernelm_sdk.system import Empty, ExitReport, InstanceName, Resources, StartInstance

SLEEP = """
import signal, sys, time
signal.signal(15, lambda *_: (print(time.monotonic_ns()), sys.exit(0)))
print("up", flush=True)
while True:
    signal.pause()"""
DEAF = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()"


class Kernel:
    """Stands in for the bus: keeps the reports, or lets them wait for a kernel that is away."""

    user = "node-n1"

    def __init__(self) -> None:
        self.reports: list[ExitReport] = []
        self.away = False

    async def call(self, declared, request, *, instance="", timeout_s=30.0, patience_s=0.0):
        assert patience_s == float("inf")
        if self.away:
            await asyncio.Event().wait()
        self.reports.append(request)
        return Empty()

    async def report(self, count: int = 1) -> ExitReport:
        await until(lambda: len(self.reports) >= count, 10, "the report")
        return self.reports[count - 1]


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
async def node(tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    manifests = {n: Manifest(n, "1.2", "", (), "m:C") for n in ("p", "q")}
    for name in manifests:
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\nversion = "1.2"\nsummary = ""\ncontracts = []\nentry = "m:C"')
    found = manifests, {"torn": "torn/kernelm-plugin.toml: no name"}
    for module in ("service", "sources"):
        monkeypatch.setattr(f"kernelm_node.{module}.find_manifests", lambda: found)
    installed = Sources._installed
    monkeypatch.setattr(Sources, "_installed",
                        lambda self, name: tmp_path / f"{name}.toml" if name in manifests else installed(self, name))  # fmt: skip
    monkeypatch.setenv("KERNELM_URL", "nats://127.0.0.1:1")
    program(monkeypatch, SLEEP)
    node = NodeService(kernel, tmp_path)
    await node.on_start()
    yield node
    kernel.away = False
    await node.on_stop()


def program(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(ProcessRuntime, "command", (sys.executable, "-c", text))


def request(instance: str = "p-1", plugin: str = "p", runtime: str = "process") -> StartInstance:
    return StartInstance(instance, plugin, "pool", runtime, "secret", Resources(1, 100, 0))


async def up(home: Path, instance: str = "p-1") -> None:
    await until(lambda: "up" in (home / "logs" / f"{instance}.log").read_text(), 10, f"{instance} up")


async def test_start_report_diagnose_stop(node: NodeService, kernel: Kernel, tmp_path: Path) -> None:
    running = await node.start(request(), None)
    token = tmp_path / "run" / "tokens" / "p-1"
    assert (token.read_text(), oct(token.stat().st_mode & 0o777)) == ("secret", "0o600")
    await up(tmp_path)
    assert await node.start(request(), None) == running, "a repeated request starts nothing"
    report = await node.report(Empty(), None)
    assert (report.node, report.running, report.plugins) == ("n1", (running,), {"p": "1.2", "q": "1.2"})
    assert "kill" in report.runtimes["process"]
    assert report.runtimes["inproc"] == ()
    diagnosis = await node.diagnose(InstanceName("p-1"), None)
    assert f"pid {running.pid}" in diagnosis.advice
    assert diagnosis.log == "up"
    with pytest.raises(ClientFault) as caught:
        await node.start(request(plugin="q"), None)
    assert caught.value.code == "already_exists"
    await node.stop(InstanceName("p-1"), None)
    assert not started_at(running.pid)
    assert await kernel.report() == ExitReport("p-1", 0, "stopped as requested")
    await node.stop(InstanceName("p-1"), None)
    assert not token.exists()
    assert list((tmp_path / "scratch").iterdir()) == []
    assert Handles(tmp_path / "run" / "instances").all() == []


async def test_one_that_does_not_listen_is_killed_after_the_grace(node: NodeService, kernel: Kernel, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    program(monkeypatch, DEAF)
    running = await node.start(request(), None)
    await up(tmp_path)
    await node.stop(InstanceName("p-1", 0.05), None)
    assert not started_at(running.pid)
    assert (await kernel.report()).code == -9


async def test_a_crash_is_reported_with_advice(node: NodeService, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, "import surely_not_there")
    await node.start(request(), None)
    report = await kernel.report()
    assert (report.instance, report.code) == ("p-1", 1)
    assert "pip install surely-not-there" in report.diagnosis.splitlines()[0]
    assert "pip install" in (await node.diagnose(InstanceName("p-1"), None)).advice


@pytest.mark.parametrize(("wrong", "code"), [
    ({"plugin": "torn"}, "unknown_plugin"), ({"plugin": "none"}, "unknown_plugin"),
    ({"runtime": "vm"}, "unsupported_runtime"),
    ({"runtime": "inproc"}, "unsupported_runtime"), ({"instance": "../x"}, "invalid"),
])  # fmt: skip
async def test_what_can_not_be_started_is_refused_and_leaves_nothing(node: NodeService, tmp_path: Path, wrong: dict[str, str],
                                                                     code: str) -> None:  # fmt: skip
    with pytest.raises(ClientFault) as caught:
        await node.start(request(**wrong), None)
    assert caught.value.code == code
    assert caught.value.remedy or code == "invalid"
    for folder in ("run/tokens", "run/instances", "scratch", "logs"):
        assert list((tmp_path / folder).iterdir()) == []


async def test_a_slow_start_keeps_no_other_waiting_and_is_begun_once(node: NodeService, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, start = [], asyncio.Event(), ProcessRuntime.start

    async def slow(self: ProcessRuntime, launch):
        begun.append(launch.instance)
        if launch.instance == "p-1":
            await go.wait()
        return await start(self, launch)

    monkeypatch.setattr(ProcessRuntime, "start", slow)
    first, repeated = (asyncio.create_task(node.start(request(), None)) for _ in range(2))
    await until(lambda: begun == ["p-1"])
    assert (await node.start(request("p-2"), None)).instance == "p-2"
    assert not first.done()
    go.set()
    assert await first == await repeated
    assert begun == ["p-1", "p-2"]
    assert node._starting == {}


async def test_a_start_that_fails_leaves_nothing(node: NodeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessRuntime, "command", ("/nowhere/python",))
    with pytest.raises(KernelFault) as caught:
        await node.start(request(), None)
    assert caught.value.code == "can_not_start"
    for folder in ("run/tokens", "run/instances", "scratch"):
        assert list((tmp_path / folder).iterdir()) == []


async def test_all_stop_in_the_reverse_order_of_their_start(node: NodeService, tmp_path: Path) -> None:
    names = ["p-3", "p-1", "p-2"]
    for name in names:
        await node.start(request(name), None)
        await up(tmp_path, name)
    await node.on_stop()
    ended = {name: int((tmp_path / "logs" / f"{name}.log").read_text().split()[-1]) for name in names}
    assert sorted(names, key=ended.__getitem__) == names[::-1]


async def test_an_end_that_the_kernel_was_not_told_is_told_by_the_next_node(node: NodeService, kernel: Kernel, tmp_path: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    kernel.away = True
    program(monkeypatch, "raise SystemExit(5)")
    running = await node.start(request(), None)
    await until(lambda: not node._entries, 10, "its end")
    assert not started_at(running.pid)
    monkeypatch.setattr("kernelm_node.service.FAREWELL_S", 0.1)
    await node.on_stop()
    assert kernel.reports == []
    kernel.away = False
    await NodeService(kernel, tmp_path).on_start()
    assert (await kernel.report()).code == 5


async def test_a_handle_that_can_not_be_read_is_put_aside(node: NodeService, kernel: Kernel, tmp_path: Path) -> None:
    (tmp_path / "run" / "instances" / "x-1.json").write_text('{"version": 99}')
    await NodeService(kernel, tmp_path).on_start()
    assert (tmp_path / "run" / "instances" / "x-1.unreadable").exists()
    assert kernel.reports == []


async def test_a_large_log_is_put_aside_at_the_next_start(node: NodeService, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "p-1.log"
    log.write_bytes(b"x" * 10)
    os.truncate(log, LOG_BYTES + 1)
    await node.start(request(), None)
    await up(tmp_path)
    assert log.stat().st_size < 100
    assert (tmp_path / "logs" / "p-1.log.1").stat().st_size == LOG_BYTES + 1


async def test_of_what_has_ended_only_the_newest_logs_are_kept(
    node: NodeService, kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERNELM_NODE_LOGS_MB", "1")
    folder = tmp_path / "logs"
    for age, name in enumerate(["p-0000000b.log", "p-0000000a.log", "p-0000000a.log.1", "jobs.log", "p-00000001.log"]):
        (folder / name).write_bytes(b"x" * 2**19)
        os.utime(folder / name, (1000.0 - age, 1000.0 - age))
    (tmp_path / "run" / "instances" / "p-00000001.unreadable").write_text("{}")  # it may be running
    after = NodeService(kernel, tmp_path)
    await after.on_start()
    assert sorted(path.name for path in folder.iterdir()) == ["jobs.log", "p-00000001.log", "p-0000000b.log"]

    await after.start(request("p-0000000c"), None)
    await up(tmp_path, "p-0000000c")
    (folder / "p-0000000b.log").write_bytes(b"x" * 2**20)
    await after.stop(InstanceName("p-0000000c"), None)
    await kernel.report()
    await until(lambda: not (folder / "p-0000000b.log").exists(), 10, "the log of what ended before goes")
    assert "up" in (await after.diagnose(InstanceName("p-0000000c"), None)).log
    with pytest.raises(ClientFault, match="has no log of p-0000000b"):
        await after.diagnose(InstanceName("p-0000000b"), None)


def test_not_more_logs_are_kept_than_can_be_looked_through(tmp_path: Path) -> None:
    logs = Logs(tmp_path, kept_mb=1, kept=2)
    for age in range(5):
        logs.path(f"p-0000000{age}").write_text("hello")
        os.utime(logs.path(f"p-0000000{age}"), (1000.0 - age, 1000.0 - age))
    assert logs.prune({"p-00000004"}) == ["p-00000002", "p-00000003"]
    assert Logs(tmp_path, kept_mb=0, kept=2).prune(()) == []


async def test_an_instance_that_never_ran_is_named(node: NodeService) -> None:
    with pytest.raises(ClientFault, match="p-77"):
        await node.diagnose(InstanceName("p-77"), None)
