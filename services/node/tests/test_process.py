"""The runtimes `process` (cold) and `inproc` by themselves, with real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from kernelm.testing.harness import until
from kernelm_node.runtimes import Runtimes
from kernelm_node.runtimes.inproc import InprocRuntime
from kernelm_node.runtimes.oom import memory_group
from kernelm_node.runtimes.pidfd import open_pidfd, started_at
from kernelm_node.runtimes.process import ProcessRuntime
from kernelm_node.runtimes.runtime import HANDLE_VERSION, Exit, Handle, Launch, Task
from kernelm_sdk import runner
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.system import Manifest, Resources


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    environment = {**os.environ, "KERNELM_INSTANCE": f"i-{os.getpid()}", "KERNELM_SCRATCH": str(tmp_path)}
    manifest = Manifest("p", "1.0", "", (), "m:C")
    return Launch(environment["KERNELM_INSTANCE"], "p", "p", environment, tmp_path, tmp_path / "i1.log", manifest)


def runtime(monkeypatch: pytest.MonkeyPatch, program: str) -> ProcessRuntime:
    monkeypatch.setattr(ProcessRuntime, "command", (sys.executable, "-c", program))
    return ProcessRuntime(Path("/nowhere"))


def handle(launch: Launch, state: dict) -> Handle:
    return Handle(HANDLE_VERSION, "process", launch.instance, "p", "p", Resources(), time.time(), str(launch.log), 0, state)


@pytest.mark.parametrize(("program", "code"), [("pass", 0), ("raise SystemExit(3)", 3),
                                               ("import os; os.kill(os.getpid(), 11)", -11)])  # fmt: skip
async def test_the_exit_code_is_the_childs(monkeypatch: pytest.MonkeyPatch, launch: Launch, program: str, code: int) -> None:
    task = await runtime(monkeypatch, program).start(launch)
    assert await task.wait() == Exit(code)
    assert not psutil.pid_exists(task.pid)


async def test_output_environment_and_session(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    launch.log.write_text("earlier\n")
    program = ("import os; print(os.environ['KERNELM_INSTANCE'], os.getcwd(), os.getsid(0) == os.getpid(), flush=True); "
               "os.write(2, b'err\\n')")  # fmt: skip
    await (await runtime(monkeypatch, program).start(launch)).wait()
    assert launch.log.read_text() == f"earlier\n{launch.instance} {launch.scratch} True\nerr\n"


async def test_ask_is_sigterm_and_kill_takes_all_descendants(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    program = """if True:
        import signal, subprocess, sys
        signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
        a = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        b = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        print(a.pid, b.pid, flush=True)
        while True:
            signal.pause()"""
    task = await runtime(monkeypatch, program).start(launch)
    waiting = asyncio.create_task(task.wait())
    await until(lambda: launch.log.read_text().endswith("\n"))
    children = [int(p) for p in launch.log.read_text().split()]
    task.ask()
    await until(lambda: "asked" in launch.log.read_text())
    assert not waiting.done()
    await task.kill()
    assert await waiting == Exit(-signal.SIGKILL, "killed by the node")
    await until(lambda: all(not started_at(p) for p in children))
    task.ask()  # what ended is not signalled again
    await task.kill()


async def test_workers_of_one_that_crashed_are_ended(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    program = ("import subprocess, sys; worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
               "print(worker.pid, flush=True); 1 / 0")  # fmt: skip
    task = await runtime(monkeypatch, program).start(launch)
    assert (await task.wait()).code == 1
    worker = int(launch.log.read_text().split()[0])
    await until(lambda: not started_at(worker))


async def _orphan(launch: Launch, program: str) -> int:
    """The pid of a process that runs `program` as a session leader and is nobody's child here."""
    starter = ("import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True, "
               "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); print(p.pid)")  # fmt: skip
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", starter, program], env=launch.environment,
                                   capture_output=True, text=True, check=True)  # fmt: skip
    return int(done.stdout)


PAUSE = "import signal; signal.signal(15, lambda *_: exit(7)); signal.pause()"


@pytest.mark.parametrize("known", [True, False], ids=["from its handle", "found, after a death before the handle was complete"])
async def test_a_process_of_an_earlier_node_is_adopted(launch: Launch, known: bool) -> None:
    pid = await _orphan(launch, PAUSE)
    await until(lambda: _catches(pid, signal.SIGTERM))
    state = {"pid": pid, "started": started_at(pid)} if known else {}
    task = await ProcessRuntime(launch.scratch).adopt(handle(launch, state))
    assert task is not None
    assert task.state == {"pid": pid, "started": started_at(pid)}
    task.ask()
    code = (await asyncio.wait_for(task.wait(), 60)).code
    told = tuple(int(n) for n in os.uname().release.split(".")[:2]) >= (6, 15)
    assert code == 7 or (code == 255 and not told)  # an older kernel tells until init has reaped it: a race


def _catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(mask & (1 << (number - 1)))


async def test_what_is_gone_or_another_process_is_not_adopted(launch: Launch) -> None:
    ours = os.getpid()
    for state in ({"pid": ours, "started": "another boot/1"}, {"pid": 2**22 + 1, "started": "x"}, {"pid": -1, "started": "x"}, {}):
        assert await ProcessRuntime(launch.scratch).adopt(handle(launch, state)) is None
    assert open_pidfd(ours, started_at(ours)) >= 0


def _limited_group() -> Path | None:
    group = memory_group()
    if group is None or os.geteuid() != 0 or not (group / "memory.limit_in_bytes").exists():
        return None
    return group / f"kernelm-test-{os.getpid()}"


async def test_the_out_of_memory_killer_is_recognized(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    group = _limited_group()
    if group is None:
        pytest.skip("needs root and the memory controller of control groups, version 1")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(40 * 2**20))
        program = f"""if True:
            import os, signal, sys
            open({str(group / "cgroup.procs")!r}, "w").write(str(os.getpid()))
            print("in", flush=True)
            signal.sigwait({{signal.SIGUSR1}})
            held = [b"x" * 2**20 for _ in range(400)]"""
        monkeypatch.setenv("PYTHONUNBUFFERED", "1")
        task: Task = await runtime(monkeypatch, "import signal; signal.pthread_sigmask(0, {10})\n" + program).start(launch)
        await until(lambda: launch.log.read_text() == "in\n")
        os.kill(task.pid, signal.SIGUSR1)
        ended = await task.wait()
        assert ended.code == -signal.SIGKILL
        assert ended.note.startswith("out of memory")
    finally:
        group.rmdir()


async def test_a_kill_by_somebody_else_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    task = await runtime(monkeypatch, "import signal; signal.pause()").start(launch)
    os.kill(task.pid, signal.SIGKILL)
    assert await task.wait() == Exit(-signal.SIGKILL, "")


async def test_a_command_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    monkeypatch.setattr(ProcessRuntime, "command", ("/nowhere/python",))
    with pytest.raises(Exception, match="/nowhere/python"):
        await ProcessRuntime(launch.scratch).start(launch)


def test_an_unknown_runtime_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ClientFault) as caught:
        Runtimes(tmp_path).find("vm")
    assert caught.value.code == "unsupported_runtime"
    assert "container, inproc, process, venv" in caught.value.remedy


async def test_inproc_is_for_first_party_plugins(launch: Launch) -> None:
    with pytest.raises(ClientFault) as caught:
        await InprocRuntime(launch.scratch).start(launch)
    assert caught.value.code == "permission_denied"
    with pytest.raises(ClientFault, match="artifact"):
        await InprocRuntime(launch.scratch).start(msgspec.structs.replace(launch, source=launch.scratch))


@pytest.mark.parametrize(("error", "code", "text"), [
    (ZeroDivisionError("x"), 1, "ZeroDivisionError"), (SystemExit(4), 4, ""),
    (PluginFault("bad", "no model", "put one"), 1, "remedy: put one"),
])  # fmt: skip
async def test_the_crash_of_a_task_is_an_exit(monkeypatch: pytest.MonkeyPatch, launch: Launch, error: BaseException, code: int,
                                              text: str) -> None:  # fmt: skip
    async def crash(environment, stopping=None):
        raise error

    monkeypatch.setattr(runner, "run_instance", crash)
    monkeypatch.setattr("kernelm_node.runtimes.inproc.require_first_party", lambda plugin: None)
    task = await InprocRuntime(launch.scratch).start(launch)
    assert await task.wait() == Exit(code)
    assert text in (launch.log.read_text() if launch.log.exists() else "")


async def test_a_task_is_asked_and_cancelled(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    async def run(environment, stopping):
        await stopping.wait()
        if environment["KERNELM_PLUGIN"] == "deaf":
            await asyncio.Event().wait()
        return 0

    monkeypatch.setattr(runner, "run_instance", run)
    monkeypatch.setattr("kernelm_node.runtimes.inproc.require_first_party", lambda plugin: None)
    for plugin, killed in (("polite", False), ("deaf", True)):
        launch.environment["KERNELM_PLUGIN"] = plugin
        task = await InprocRuntime(launch.scratch).start(launch)
        await asyncio.sleep(0)
        task.ask()
        if killed:
            await asyncio.sleep(0.01)
            await task.kill()
        assert await task.wait() == (Exit(-9, "cancelled by the node") if killed else Exit(0))
