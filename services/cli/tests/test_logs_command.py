"""`kernelm logs`: real files, and a real process that writes while it is followed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kernelm_cli import home as homes
from kernelm_cli.app import execute
from kernelm_cli.home import ChildProcess, HomeLock, UpFile, open_log, write_up
from kernelm_cli.logs import Life, choose, legible
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Instance, PoolSpec, SystemState

Captured = pytest.CaptureFixture[str]
ECHO = [sys.executable, "-c", "import sys\nfor line in sys.stdin:\n    print(line, end='', flush=True)"]
OLD, NEW = "trainer-00000001", "trainer-00000002"
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def write(home: Path) -> Write:
    def put(name: str, *lines: str, age_s: float = 0.0) -> Path:
        os.close(open_log(home, name))
        path = home / "logs" / f"{name}.log"
        path.write_text("".join(f"{line}\n" for line in lines))
        os.utime(path, (time.time() - age_s,) * 2)
        return path

    return put


def lived(home: Path, ago_s: float = 60.0) -> None:
    """A launcher was here, and stopped as it should."""
    lock = HomeLock(home)
    lock.take()
    lock.drop()
    os.utime(lock.path, (time.time() - ago_s,) * 2)


def at(second: int, text: str) -> str:
    return f"2026-11-30 03:28:{second:02},000 INFO x: {text}"


def life(home: Path, state: SystemState | None, **standing: str) -> Life:
    names = {name.replace("_", "-"): value for name, value in standing.items()}
    up = UpFile(os.getpid(), psutil.Process().create_time(), "", "", "", time.time())
    return Life(home, up, {name: (home / "logs" / f"{name}.log",) for name in names}, names, state)  # type: ignore[arg-type]


# ---- which ----


def test_the_last_life_in_order_of_time(home: Path, write: Write, capsys: Captured) -> None:
    write("kernel", at(2, "second"), "Traceback", age_s=3600.0)  # of a child: shown though it had nothing to say lately
    write("jobs", at(1, "first"), at(3, "third"))
    write(NEW, at(4, "fourth"))
    write(OLD, at(0, "long ago"), age_s=3600.0)
    lived(home)
    assert execute(["logs"]) == 0
    said = capsys.readouterr()
    assert said.err.strip() == f"nothing runs on {home}: what its last life has written"
    assert said.out.splitlines() == [
        f"jobs             | {at(1, 'first')}", f"kernel           | {at(2, 'second')}", "kernel           | Traceback",
        f"jobs             | {at(3, 'third')}", f"{NEW} | {at(4, 'fourth')}",
    ]  # fmt: skip


def test_a_plugin_is_all_of_its_instances_and_those_of_earlier_lives_are_named(home: Path, write: Write, capsys: Captured) -> None:
    write(OLD, at(0, "long ago"), age_s=3600.0)
    write(NEW, at(4, "now"))
    write("trainer-mine-00000003", at(5, "another plugin"))
    lived(home)
    assert execute(["logs", "trainer"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{NEW} | {at(4, 'now')}", f"{OLD} | {at(0, 'long ago')}"]
    assert said.err.splitlines() == [f"nothing runs on {home}", f"ended: {NEW}", f"of an earlier life: {OLD}"]
    assert execute(["logs", "trainer", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert [(o["name"], o["standing"], o["line"]) for o in map(json.loads, said.out.splitlines())] == [
        (NEW, "ended", at(4, "now")), (OLD, "earlier", at(0, "long ago"))]  # fmt: skip


def test_one_log_has_no_prefix_and_as_many_lines_as_one_wants(home: Path, write: Write, capsys: Captured) -> None:
    write("jobs", *map(str, range(100)))
    lived(home)
    for arguments, shown in (([], 50), (["-n", "3"], 3), (["--lines", "all"], 100), (["-n", "0"], 0)):
        assert execute(["logs", "jobs", *arguments]) == 0
        assert capsys.readouterr().out.splitlines() == [str(k) for k in range(100 - shown, 100)]
    for bad in ("ten", "1.5", "²"):
        assert execute(["logs", "jobs", "-n", bad]) == 2
        assert "is no number of lines" in capsys.readouterr().err


def test_all_is_also_what_ended(home: Path, write: Write, capsys: Captured) -> None:
    write("jobs", at(1, "here"))
    for number in range(8):
        write(f"data-0000000{number}", at(number, "old"), age_s=3600.0 - number)
    lived(home)
    assert execute(["logs", "data"]) == 0
    said = capsys.readouterr()
    assert "of 8 logs of earlier lives the 5 newest; --all shows them all" in said.err
    assert len(said.out.splitlines()) == 5
    assert "data-00000007" in said.out
    assert execute(["logs", "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9


@pytest.mark.parametrize(("name", "remedy"), [("gatway", "did you mean 'gateway'?"), ("trainr", "did you mean 'trainer'?"),
                                              ("zzz", "known here: gateway, trainer")])  # fmt: skip
def test_an_unknown_name(write: Write, name: str, remedy: str, capsys: Captured) -> None:
    write("gateway", at(1, "x"))
    write(NEW, at(1, "x"))
    assert execute(["logs", name]) == 2
    said = capsys.readouterr()
    assert f"there is no log of '{name}'" in said.err
    assert remedy in said.err
    assert said.out == ""


def test_a_home_without_logs_and_one_of_containers(home: Path, capsys: Captured) -> None:
    assert execute(["logs"]) == 1
    assert "kernelm up --detach" in capsys.readouterr().err
    write_up(home, UpFile(0, 0.0, "tls://nats:4222", "", "", 0.0))
    assert execute(["logs", "jobs"]) == 2
    assert "docker compose logs" in capsys.readouterr().err


def test_a_kernel_that_is_away_keeps_no_log_back(home: Path, write: Write, capsys: Captured) -> None:
    me = psutil.Process()
    write("kernel", at(1, "it died"))
    write(NEW, at(2, "here"))
    write(OLD, at(0, "long ago"), age_s=3600.0)
    up = UpFile(me.pid, me.create_time(), "nats://127.0.0.1:9", "", "", time.time() - 60, {}, {"kernel": ChildProcess(1, 0.0)})
    write_up(home, up)
    assert execute(["logs"]) == 0
    said = capsys.readouterr()
    assert "the kernel does not answer" in said.err
    assert [line.partition(" ")[0] for line in said.out.splitlines()] == ["kernel", NEW]


def test_names_that_the_kernel_knows(home: Path, write: Write) -> None:
    for name in ("node", "encoder-00000001", "encoder-00000002", "jobs"):
        write(name)
    instances = (Instance("encoder-00000001", "encoder", "1", "encoder", "local", "ready", ("server/1",)),
                 Instance("encoder-00000002", "encoder", "1", "news-g7", "local", "ready", (), ("news",)),
                 Instance("scheduler-00000001", "scheduler", "1", "scheduler", "local", "ready", ("scheduler/1",)),
                 Instance("vllm-00000001", "vllm", "1", "chat-g1", "two", "ready", (), ("chat",)))  # fmt: skip
    pools = (PoolSpec("encoder", "encoder"), PoolSpec("news-g7", "encoder"), PoolSpec("parked", "retriever"))
    logs = {name: "runs" for name in ("node", "jobs", "encoder_00000001", "encoder_00000002")}
    here = life(home, SystemState(instances, pools, (), 1), **logs)
    both = ["encoder-00000001", "encoder-00000002"]
    for name, meant in (("news-g7", both[1:]), ("news", both[1:]), ("server/1", both[:1]), ("encoder", both),
                        ("encoder-00000002", both[1:]), ("node-local", ["node"])):  # fmt: skip
        assert choose([name], here, every=False).names == meant
    within = choose(["scheduler"], here, every=False)
    assert (within.names, within.notes) == (["node"], ["scheduler-00000001 runs within the node, whose log has its lines"])
    assert choose(["chat"], here, every=False).notes == ["vllm-00000001 on two: the logs are there"]
    with pytest.raises(ClientFault, match="no instance of 'parked' has written a log here"):
        choose(["parked"], here, every=False)
    with pytest.raises(ClientFault) as caught:
        choose(["news-g8"], here, every=False)
    assert caught.value.remedy == "did you mean 'news-g7'?"


def test_a_progress_bar_and_codes_for_the_terminal() -> None:
    assert legible("  5%\r 50%\r100%\r").plain == "100%"
    assert legible("\x1b[31mred\x1b[0m \x1b[2Jx\x07\ty\x9bz").plain == "red x\tyz"
    assert legible("\x1b[31mred\x1b[0m").spans
    assert legible("broken \x1b").plain == "broken "


# ---- following ----


@pytest.fixture
def followed() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`kernelm logs -f ...`, ended after the test whatever it came to."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        started.append(subprocess.Popen([sys.executable, "-m", "kernelm_cli", "logs", "-f", *arguments], text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def start(home: Path, name: str) -> subprocess.Popen[bytes]:
    """A process with its log, as the launcher starts one."""
    file = open_log(home, name)
    try:
        return subprocess.Popen(ECHO, stdin=subprocess.PIPE, stdout=file)
    finally:
        os.close(file)


def say(process: subprocess.Popen[bytes], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text.encode())
    process.stdin.flush()


def test_a_process_is_followed_over_its_restart_and_ctrl_c_is_no_fault(
    home: Path, write: Write, followed: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(homes, "LOG_LIMIT", 10)
    lived(home)
    with start(home, "jobs") as first:
        say(first, "the past\n")
        command = followed("jobs")
        assert command.stdout is not None
        assert command.stdout.readline() == "the past\n"
        say(first, "now\n")
        assert command.stdout.readline() == "now\n"
        say(first, "its last words")
        first.communicate()
    with start(home, "jobs") as second:  # the log is set aside
        say(second, "again\n")
        assert [command.stdout.readline() for _ in range(2)] == ["its last words\n", "again\n"]
        command.send_signal(signal.SIGINT)
        out, err = command.communicate()
        assert (command.returncode, out) == (0, "")
        assert "Traceback" not in err
        second.communicate()


def test_an_instance_that_starts_meanwhile_joins(
    home: Path, write: Write, followed: Callable[..., subprocess.Popen[str]]
) -> None:
    write(NEW, at(1, "here"))
    lived(home)
    command = followed("trainer")
    assert command.stdout is not None
    assert command.stdout.readline() == f"{at(1, 'here')}\n"
    write("data-00000001", "not meant")
    with start(home, "trainer-00000009") as process:
        say(process, "I come\n")
        assert command.stdout.readline() == "trainer-00000009 | I come\n"
        with (home / "logs" / f"{NEW}.log").open("a") as file:
            file.write("I stay\n")
        assert command.stdout.readline() == f"{NEW} | I stay\n"
        process.communicate()
