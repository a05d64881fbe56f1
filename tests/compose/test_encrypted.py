"""What lies on disk can't be read without the keys, and whoever gives another key is told so before anything is lost."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kernelm_artifacts.vault import new_master
from kernelm_authority.broker import new_cipher

Stack = Any  # conftest's
RECORD = "the-name-of-a-key-in-a-record"
pytestmark = pytest.mark.timeout(900)


def on_disk(stack: Stack, text: str) -> list[str]:
    """Where a disk holds `text`: files of the deployment, and the engine's copies of what containers said."""
    files = [path for path in stack.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    logs = [Path(container.attrs["LogPath"]) for container in stack.containers(all=True).values()]
    found = []
    for path in (*files, *(log for log in logs if os.access(log, os.R_OK))):
        try:
            if text.encode() in path.read_bytes():
                found.append(str(path))
        except FileNotFoundError:  # of a system that runs
            continue
    return found


def in_memory(stack: Stack, text: str) -> bool:
    """Whether the artifacts service has it among its readable copies."""
    search = "import pathlib, sys; print(any(sys.argv[2].encode() in p.read_bytes() for p in pathlib.Path(sys.argv[1]).rglob('*')" \
             " if p.is_file()))"  # fmt: skip
    done = stack.containers()["artifacts"].exec_run(["python", "-c", search, str(stack.home / "plain"), text])
    assert done.exit_code == 0, done.output
    return bool(done.output.strip() == b"True")


def source(stack: Stack) -> str:
    """The digest of the run's documents."""
    return str(next(a["digest"] for a in stack.asked("artifact", "list", "--kind", "source") if len(a["files"]) > 1000))


@contextmanager
def in_its_place(path: Path, make: Callable[[Path], None]) -> Iterator[None]:
    """Another key, made by `make`, where `path` was; it comes back at the end."""
    good, owner = path.with_suffix(".good"), path.stat()
    path.rename(good)
    try:
        make(path)
        os.chown(path, owner.st_uid, owner.st_gid)
        yield
    finally:
        good.replace(path)


def test_a_disk_shows_neither_documents_nor_records(stack: Stack, articles: Callable[[str], str], table: list[str]) -> None:
    said = articles("tech")[200:260]
    assert stack.asked("key", "create", RECORD, "--models", "news")["secret"]
    assert RECORD in [key["name"] for key in stack.asked("key", "list")]
    stack.kernelm("artifact", "verify", source(stack))
    assert in_memory(stack, said), "it is what is looked for"
    assert on_disk(stack, said) == []
    assert on_disk(stack, RECORD) == []
    files = sum(path.stat().st_size for path in (stack.home / "artifacts").rglob("*") if path.is_file())
    table.append(f"at rest: {files / 2**20:.0f} MB of artifacts and all streams encrypted, no document and no record readable")


def test_another_master_key_is_named_and_nothing_is_lost(stack: Stack) -> None:
    with in_its_place(stack.folder / "secrets" / "artifacts" / "master.json", new_master):
        done = stack.deploy("init")
        assert done.returncode == 1
        assert "does not open artifact" in " ".join(done.stderr.split())
        stack.compose("restart", "artifacts")
        stack.until(lambda: b"wrong_master_key" in stack.containers()["artifacts"].logs(tail=50), 180, "its word on the key")
        assert stack.until(lambda: stack.classify("tech"), 120, "what is loaded goes on")
    stack.until(lambda: "artifacts" in stack.healthy(), 180, "the service with the right key")
    stack.kernelm("artifact", "verify", source(stack))


def test_a_missing_master_key_is_never_replaced(stack: Stack) -> None:
    master = stack.folder / "secrets" / "artifacts" / "master.json"
    with in_its_place(master, lambda path: path.touch()):
        master.unlink()
        done = stack.deploy("init")
        assert done.returncode == 2
        assert "is encrypted, and" in " ".join(done.stderr.split())
        assert not master.exists()
        master.touch()


def test_a_new_master_key_wraps_all_anew(stack: Stack) -> None:
    master = stack.folder / "secrets" / "artifacts" / "master.json"
    before = {path: path.read_bytes() for path in (stack.home / "artifacts" / "trees").glob("*/key")}
    old = master.read_bytes()
    done = stack.deploy("rotate", "--master")
    assert done.returncode == 0, done.stderr
    assert master.read_bytes() != old
    stack.compose("restart", "artifacts")
    stack.until(lambda: "artifacts" in stack.healthy(), 180, "the service with the new key")
    assert all(path.read_bytes() != wrapped for path, wrapped in before.items())
    stack.kernelm("artifact", "verify", source(stack))


def test_another_key_of_the_broker_is_named_and_nothing_is_lost(stack: Stack) -> None:
    """A nats-server that starts with another key leaves its streams aside, and the kernel would make empty ones."""
    stack.compose("stop", "nats")
    with in_its_place(stack.folder / "secrets" / "broker" / "cipher.conf", new_cipher):
        done = stack.deploy("init")
        assert done.returncode == 2
        assert "is not the key of" in " ".join(done.stderr.split())
        stack.compose("start", "nats")
        stack.until(lambda: b"is not the key of this broker" in stack.containers(all=True)["nats"].logs(tail=20), 180, "its word")
        stack.compose("stop", "nats")
    stack.compose("start", "nats")
    stack.until(lambda: RECORD in [key["name"] for key in stack.asked("key", "list")], 180, "the records as they were")
    assert stack.until(lambda: stack.classify("tech"), 180, "answers")
