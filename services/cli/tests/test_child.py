"""Children of the launcher: restarted with backoff, stopped, and gone when their parent is killed."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from kernelm_cli import child as children
from kernelm_cli.child import Child
from kernelm_sdk.errors import KernelFault


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.01)


def make(home: Path, code: str, starts: list[int] | None = None) -> Child:
    def environment() -> dict[str, str]:
        if starts is not None:
            starts.append(len(starts))
        return dict(os.environ)

    return Child(home, "jobs", [sys.executable, "-c", code], environment, lambda: None)


async def test_a_killed_child_is_started_again_with_a_fresh_environment(tmp_path: Path) -> None:
    starts: list[int] = []
    child = make(tmp_path, "import signal; signal.pause()", starts)
    await child.start()
    child.keep()
    first = child.identity.pid
    os.kill(first, 9)
    await until(lambda: child.identity.pid != first)
    assert child.identity.restarts == 1
    assert starts == [0, 1]
    await child.stop(5.0)
    assert not psutil.pid_exists(child.identity.pid)


async def test_the_pause_doubles_with_each_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "BACKOFF_S", 0.1)
    monkeypatch.setattr(children, "BACKOFF_MAX_S", 0.2)
    code = f"import time; open({str(tmp_path / 'starts')!r}, 'a').write(f'{{time.time()}}\\n')"
    child = make(tmp_path, code)
    await child.start()
    child.keep()
    await until(lambda: child.restarts >= 4)
    await child.stop(1.0)
    times = [float(line) for line in (tmp_path / "starts").read_text().split()]
    pauses = [b - a for a, b in pairwise(times)]
    assert pauses[0] >= 0.1
    assert all(pause >= 0.2 for pause in pauses[1:])


async def test_an_early_death_is_a_fault_with_the_end_of_this_starts_log(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "jobs.log").write_text("of an earlier life\n")
    child = make(tmp_path, "import sys; sys.exit('the disk is full')")
    await child.start()
    assert child.process is not None
    await child.process.wait()
    with pytest.raises(KernelFault) as caught:
        child.check()
    assert caught.value.details == {"child": "jobs", "log": "the disk is full"}
    assert "exit code 1" in caught.value.message
    assert "jobs.log" in caught.value.remedy


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    child = make(tmp_path, "import signal; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); signal.pause()")
    await child.start()
    await until(lambda: child.last_lines() == "deaf")
    await child.stop(0.2)
    assert child.process is not None
    assert child.process.returncode == -9


def test_children_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from pathlib import Path
from kernelm_cli.child import Child
async def main():
    child = Child(Path(sys.argv[1]), "jobs", [sys.executable, "-c", "import signal; signal.pause()"], dict, lambda: None)
    await child.start()
    print(child.identity.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        orphan = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
    orphan.wait(5)  # psutil.TimeoutExpired if it lives on
