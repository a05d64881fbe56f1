"""The launcher with the real broker, kernel, services and plugins, as a user runs it."""

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

from kernelm_cli.home import UpFile, read_up

pytestmark = pytest.mark.slow
RUN = 'name = "small"\n[[stage]]\nname = "data"\nuses = "data/1.prepare"\n'
RUN += '[stage.with]\nsource = { folder = "texts" }\ndeduplicate = { near = false }\n'
WORDS = {"sports": "the striker scored a goal in match number", "tech": "the chip maker sold a faster processor in quarter"}


def kernelm(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kernelm_cli", *arguments], env=os.environ | {"KERNELM_HOME": str(home)},
                          capture_output=True, text=True, check=False, timeout=240)  # fmt: skip


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def up(home: Path) -> UpFile:
    found = read_up(home)
    assert found is not None
    return found


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "home"
    started = kernelm(folder, "up", "--detach")
    assert started.returncode == 0, started.stderr
    assert "kernelm is up" in started.stdout
    yield folder
    assert kernelm(folder, "down").returncode == 0
    assert not any(psutil.pid_exists(pid) for pid in up_pids)
    assert not (folder / "run" / "up.json").exists()


up_pids: list[int] = []


@pytest.fixture(autouse=True)
def _forget_pids() -> None:
    up_pids.clear()


def test_the_life_of_a_system(home: Path, tmp_path: Path) -> None:
    assert home.stat().st_mode & 0o077 == 0
    second = kernelm(home, "up")
    assert second.returncode == 2
    assert str(up(home).pid) in second.stderr

    for label, words in WORDS.items():
        (tmp_path / "texts" / label).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "texts" / label / f"{number}.txt").write_text(f"{words} {number}")
    (tmp_path / "run.toml").write_text(RUN)
    first = kernelm(home, "run", str(tmp_path / "run.toml"))
    assert first.returncode == 0, first.stderr
    assert "40 documents in 2 classes" in first.stdout
    assert "\x1b" not in first.stdout
    again = kernelm(home, "run", str(tmp_path / "run.toml"))
    assert again.returncode == 0
    assert "found, not repeated" in again.stdout

    jobs = up(home).children["jobs"]
    os.kill(jobs, signal.SIGKILL)
    until(lambda: up(home).children["jobs"] != jobs)
    assert kernelm(home, "jobs", "list", "--json").returncode in (0, 1)  # it may still be starting
    until(lambda: kernelm(home, "jobs", "list").returncode == 0)

    made = json.loads(kernelm(home, "key", "create", "k", "--json", "--nats", str(tmp_path / "k.creds")).stdout)
    assert not {"hash", "previous_hash"} & set(made["key"])
    assert (tmp_path / "k.creds").stat().st_mode & 0o777 == 0o600
    for via in ("nats", "http", "grpc"):
        answer = kernelm(home, "call", "nowhere", "a text", "--via", via, "--key", made["secret"])
        assert answer.returncode == 2, via
        assert "unknown_model" in answer.stderr, via
    assert kernelm(home, "key", "revoke", made["key"]["id"]).returncode == 0
    until(lambda: "unauthorized" in kernelm(home, "call", "nowhere", "x", "--via", "http", "--key", made["secret"]).stderr)
    up_pids.extend([up(home).pid, *up(home).children.values()])


def test_a_killed_launcher_takes_all_with_it_and_the_next_one_starts(home: Path) -> None:
    before = up(home)
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: not any(psutil.pid_exists(pid) for pid in before.children.values()))
    again = kernelm(home, "up", "--detach")
    assert again.returncode == 0, again.stderr
    up_pids.extend([up(home).pid, *up(home).children.values()])
