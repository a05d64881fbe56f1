"""Lock, ports, logs and what an earlier life leaves behind: with real processes and sockets."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kernelm_cli import home as homes
from kernelm_cli.home import ChildProcess, HomeLock, UpFile, check_port, end, last_lines, leftovers, open_log, read_up, write_up
from kernelm_sdk.errors import ClientFault

Start = Callable[..., subprocess.Popen[bytes]]
SLEEPER = [sys.executable, "-c", "import signal; signal.pause()"]


def up_file(**processes: ChildProcess) -> UpFile:
    return UpFile(1, 0.0, "nats://x", "http://x", "x", 0.0, {n: p.pid for n, p in processes.items()}, processes)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start processes that are killed after the test, whatever it came to."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(command: list[str] = SLEEPER, **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def gone(process: subprocess.Popen[bytes]) -> bool:
    """psutil reaped it, so that its exit status is not to be had from `wait` any more."""
    return not psutil.pid_exists(process.pid)


def identity(process: subprocess.Popen[bytes]) -> ChildProcess:
    return ChildProcess(process.pid, psutil.Process(process.pid).create_time())


def test_a_second_lock_names_the_holder_and_the_remedy(tmp_path: Path) -> None:
    first, second = HomeLock(tmp_path), HomeLock(tmp_path)
    first.take()
    with pytest.raises(ClientFault) as caught:
        second.take()
    assert caught.value.code == "already_up"
    assert str(os.getpid()) in caught.value.message
    assert "kernelm down" in caught.value.remedy
    first.drop()
    second.take()
    second.drop()


def test_the_lock_of_a_killed_launcher_is_no_obstacle(tmp_path: Path) -> None:
    code = ("import sys; from pathlib import Path; from kernelm_cli.home import HomeLock\n"
            "lock = HomeLock(Path(sys.argv[1])); lock.take(); print('locked', flush=True); sys.stdin.read()")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(ClientFault, match=str(holder.pid)):
            HomeLock(tmp_path).take()
        holder.kill()
    lock = HomeLock(tmp_path)
    lock.take()
    lock.drop()


def test_a_taken_port_names_option_and_holder() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClientFault) as caught:
            check_port(port, "--http-port")
    assert caught.value.code == "port_taken"
    assert f"port {port} (--http-port)" in caught.value.message
    assert f"pid {os.getpid()}" in caught.value.message
    assert check_port(port, "--http-port") == port


def test_port_zero_is_a_free_one() -> None:
    port = check_port(0, "--http-port")
    assert check_port(port, "--http-port") == port


def test_leftovers_are_ended_by_pid_and_creation_time(tmp_path: Path, start: Start) -> None:
    ours, other = start(), start()
    recycled = ChildProcess(other.pid, identity(other).created - 60.0)  # the pid now belongs to somebody else
    write_up(tmp_path, up_file(jobs=identity(ours), node=recycled))
    assert [p.pid for p in leftovers(tmp_path)] == [ours.pid]
    end(leftovers(tmp_path))
    assert gone(ours)
    assert other.poll() is None


def test_orphaned_instances_of_this_home_are_leftovers(tmp_path: Path, start: Start) -> None:
    variables = {"KERNELM_INSTANCE": "encoder-1", "KERNELM_HOME": str(tmp_path)}
    mine = start(env=os.environ | variables)
    start(env=os.environ | variables | {"KERNELM_HOME": str(tmp_path / "other")})
    assert [p.pid for p in leftovers(tmp_path)] == [mine.pid]


def test_a_process_that_ignores_sigterm_is_killed(start: Start) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    deaf = start([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert deaf.stdout is not None
    deaf.stdout.readline()
    end([psutil.Process(deaf.pid)], grace_s=0.2)
    assert gone(deaf)


def test_up_json_is_private_and_read_back(tmp_path: Path) -> None:
    assert read_up(tmp_path) is None
    up = up_file(jobs=ChildProcess(7, 1.5, 2))
    write_up(tmp_path, up)
    assert read_up(tmp_path) == up
    assert (tmp_path / "run" / "up.json").stat().st_mode & 0o777 == 0o600


def test_a_damaged_up_json_is_named(tmp_path: Path) -> None:
    write_up(tmp_path, up_file())
    (tmp_path / "run" / "up.json").write_text('{"pid": "x"}')
    with pytest.raises(ClientFault, match=r"up\.json.*pid"):
        read_up(tmp_path)


def test_a_log_that_is_too_large_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes, "LOG_LIMIT", 10)
    for text in (b"first start\n", b"second start\n"):
        file = open_log(tmp_path, "jobs")
        os.write(file, text)
        os.close(file)
    assert last_lines(tmp_path, "jobs") == "second start"
    assert (tmp_path / "logs" / "jobs.log.1").read_text() == "first start\n"
