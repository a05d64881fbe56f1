"""Warm starts: instances forked by a real fork server. A test's plugin puts a program of its own in the place of the
runner's, which would look for a broker."""

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from kernelm.testing.harness import until
from kernelm_node.runtimes.pidfd import started_at
from kernelm_node.runtimes.process import ProcessRuntime, ProcessTask
from kernelm_node.runtimes.runtime import HANDLE_VERSION, Exit, Handle, Launch
from kernelm_node.runtimes.warm import NotWarm, WarmStarts, parent_key
from kernelm_sdk.system import Limits, Manifest, Resources

PLUGIN = """
import os, sys
from kernelm_sdk import runner

print("imported {name}", flush=True)
{extra}

def main():
    exec(os.environ["PROGRAM"], {{}})
    return 0

runner.main = main
"""
LISTEN = "import signal; signal.signal(15, lambda *_: exit(8)); print('up', flush=True); signal.pause()"
_count = itertools.count()


class Nursery:
    """Starts programs by a `process` runtime, and remembers what a node would."""

    def __init__(self, home: Path) -> None:
        self.home, self.runtime = home, ProcessRuntime(home)
        self.pids: set[int] = set()
        (home / "logs").mkdir()

    def launch(self, program: str, name: str = "p", extra: str = "", version: str = "1") -> Launch:
        source = self.home / "artifacts" / f"{name}-{version}"
        source.mkdir(parents=True, exist_ok=True)
        (source / f"plugin_{name}.py").write_text(PLUGIN.format(name=name, extra=extra))
        instance = f"{name}-{os.getpid()}-{next(_count)}"
        scratch = self.home / "scratch" / instance
        scratch.mkdir(parents=True)
        environment = {**os.environ, "KERNELM_INSTANCE": instance, "KERNELM_SCRATCH": str(scratch), "PROGRAM": program,
                       "PYTHONPATH": str(source)}  # fmt: skip
        return Launch(instance, name, name, environment, scratch, self.home / "logs" / f"{instance}.log",
                      Manifest(name, version, "", (), f"plugin_{name}:P"), source=source)  # fmt: skip

    async def start(self, program: str, **more: Any) -> tuple[ProcessTask, Launch]:
        launch = self.launch(program, **more)
        task = await self.runtime.start(launch)
        assert isinstance(task, ProcessTask)
        self.pids |= {task.pid, psutil.Process(task.pid).ppid()} - {os.getpid()}
        return task, launch

    async def run(self, program: str, **more: Any) -> tuple[Exit, str, bool]:
        """How it ended, what it wrote, and whether it was forked."""
        task, launch = await self.start(program, **more)
        warm = "parent" in task.state
        exit = await asyncio.wait_for(task.wait(), 30)
        return exit, launch.log.read_text(), warm

    def handle(self, launch: Launch, state: dict[str, Any]) -> Handle:
        return Handle(HANDLE_VERSION, "process", launch.instance, launch.plugin, launch.pool, Resources(), time.time(),
                      str(launch.log), 0, state)  # fmt: skip

    def servers(self) -> list[int]:
        """The fork server's processes of this home that run, instances aside."""
        found = []
        for process in psutil.process_iter(["pid"]):
            with contextlib.suppress(psutil.Error, OSError):
                ours = str(self.home / "run" / "fork") in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
                if ours and Path(f"/proc/{process.pid}/comm").read_text().startswith("fork "):
                    found.append(process.pid)
        return found


@pytest.fixture
async def nursery(tmp_path: Path) -> AsyncIterator[Nursery]:
    nursery = Nursery(tmp_path)
    yield nursery
    await nursery.runtime.close()
    for pid in {*nursery.servers(), *nursery.pids}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def test_a_forked_instance_finds_what_one_that_was_started_finds(nursery: Nursery) -> None:
    program = """if True:
        import gc, os, signal, sys
        print(os.environ["KERNELM_INSTANCE"], os.getcwd(), os.getsid(0) == os.getpid(), "PYTEST_CURRENT_TEST" in os.environ,
              signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, gc.isenabled(), os.read(0, 1), os.listdir("/proc/self/fd"))
        print("to stderr", file=sys.stderr)
        sys.exit(5)"""
    exit, text, warm = await nursery.run(program)
    assert warm
    assert exit == Exit(5)
    name = next(iter((nursery.home / "scratch").iterdir())).name
    first, second = text.splitlines()
    assert first.startswith(f"{name} {nursery.home}/scratch/{name} True {'PYTEST_CURRENT_TEST' in os.environ} True True b''")
    assert first.endswith("['0', '1', '2', '3']"), "3 is the folder that is being listed: nothing of the server's is open"
    assert second == "to stderr"


async def test_its_module_is_imported_once_for_all_instances(nursery: Nursery) -> None:
    pids = {(await nursery.start("pass"))[0].pid for _ in range(3)}
    assert len(pids) == 3
    assert (nursery.home / "logs" / "forkserver.log").read_text().count("imported p") == 1


@pytest.mark.parametrize(("program", "code"), [("pass", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1),
                                               ("import os; os.kill(os.getpid(), 11)", -11)])  # fmt: skip
async def test_exit_codes_are_exact(nursery: Nursery, program: str, code: int) -> None:
    exit, text, warm = await nursery.run(program)
    assert (exit, warm) == (Exit(code), True)
    assert ("ZeroDivisionError" in text) == (code == 1)


async def test_plugins_share_no_process(nursery: Nursery) -> None:
    show = "import sys; print(sorted(m for m in sys.modules if m.startswith('plugin_')))"
    assert (await nursery.run(show, name="one"))[1] == "['plugin_one']\n"
    assert (await nursery.run(show, name="two"))[1] == "['plugin_two']\n"


async def test_siblings_draw_different_numbers(nursery: Nursery) -> None:
    pytest.importorskip("numpy")
    draw = "import random, numpy; print(random.random(), numpy.random.rand())"
    drawn = [(await nursery.run(draw, extra="import numpy"))[1].split() for _ in range(2)]
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] != drawn[1][1]


@pytest.mark.parametrize(("extra", "reason"), [
    ("import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True, name='busy').start()", "threads: busy"),
    ("import surely_not_there", "can't be imported"),
    ("os._exit(4)", "has ended"),
])  # fmt: skip
async def test_what_must_not_be_forked_starts_cold(nursery: Nursery, caplog: pytest.LogCaptureFixture, extra: str,
                                                   reason: str) -> None:  # fmt: skip
    caplog.set_level("INFO")
    task, _ = await nursery.start("pass", extra=extra)
    assert "parent" not in task.state
    assert f"{nursery.launch('').plugin}-" in caplog.text
    assert reason in caplog.text
    await task.kill()
    await task.wait()


async def test_a_change_of_the_plugin_makes_a_new_parent_and_the_one_before_stays_for_the_way_back(nursery: Nursery) -> None:
    wait = "import signal; signal.pause()"
    one, two, back = [(await nursery.start(wait, version=v))[0] for v in ("1", "2", "1")]
    parents = [psutil.Process(t.pid).ppid() for t in (one, two, back)]
    assert parents[0] == parents[2] != parents[1]
    three, _ = await nursery.start(wait, version="3")
    assert all(started_at(parent) for parent in parents)
    await two.kill()
    assert await two.wait() == Exit(-signal.SIGKILL, "killed by the node")
    await until(lambda: not started_at(parents[1]), 20, "the end of the parent of what is two changes old")
    assert started_at(parents[0])
    for task in (one, back, three):
        await task.kill()
        await task.wait()


async def test_after_the_nodes_death_its_successor_adopts_the_living_and_the_dead(nursery: Nursery) -> None:
    living, one = await nursery.start(LISTEN)
    dead, two = await nursery.start("raise SystemExit(7)")
    await until(lambda: psutil.Process(dead.pid).status() == psutil.STATUS_ZOMBIE and "up" in one.log.read_text())
    servers = nursery.servers()
    nursery.runtime = ProcessRuntime(nursery.home)  # the successor; nothing of the first is closed, as after a kill
    for launch, first, code in ((two, dead, 7), (one, living, 8)):
        for state in (first.state, {}):  # also when the node died before it had noted the number
            found = await nursery.runtime.adopt(nursery.handle(launch, state))
            assert found is not None
            assert found.pid == first.pid
        found.ask()
        assert await found.wait() == Exit(code)
    assert (await nursery.run("pass"))[2], "it is served by the same server"
    assert nursery.servers() == servers


async def test_it_goes_on_without_a_server_that_was_killed(nursery: Nursery) -> None:
    task, _ = await nursery.start(LISTEN)
    for pid in set(nursery.servers()) - {task.pid}:
        os.kill(pid, signal.SIGKILL)
    exit, _, warm = await nursery.run("raise SystemExit(3)")
    assert (exit, warm) == (Exit(3), True), "a new server is there"
    await task.kill()
    assert (await task.wait()).code in (-signal.SIGKILL, 255)


async def test_limits_hold_from_the_first_instruction(nursery: Nursery) -> None:
    await nursery.runtime.probe()
    if "pids_limit" not in nursery.runtime.can:
        pytest.skip("no control group for the number of processes can be made here")
    launch = msgspec.structs.replace(nursery.launch("import os; print(os.fork())"), limits=Limits(pids=1))
    task = await nursery.runtime.start(launch)
    assert "parent" in task.state
    assert (await task.wait()).code == 1
    assert "BlockingIOError" in launch.log.read_text()
    await nursery.runtime.clear(nursery.handle(launch, task.state))


async def test_it_ends_with_its_node(nursery: Nursery) -> None:
    await nursery.run("pass")
    assert len(nursery.servers()) == 2
    await nursery.runtime.close()
    await until(lambda: not nursery.servers(), 20, "the end of base and parent")


async def test_without_a_server_the_reason_is_named(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelm_node.runtimes.warm.sys.executable", "/nowhere/python")
    with pytest.raises(NotWarm, match="/nowhere/python"):
        await WarmStarts(nursery.home).fork(nursery.launch(""), [])


def test_the_key_changes_with_the_plugins_version(nursery: Nursery) -> None:
    keys = {parent_key(nursery.launch("", version=v)) for v in ("1", "2", "2")}
    assert len(keys) == 2
