"""A backup of the running system, its destruction, and the same system again from it; then the end of everything."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Stack = Any  # conftest's
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def saved(stack: Stack, tmp_path_factory: pytest.TempPathFactory, table: list[str]) -> tuple[Path, Path, dict[str, Any]]:
    """(the backup, the key that opens it, the artifacts that were there), the backup moved away from the deployment."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    artifacts = {a["digest"]: a for a in stack.asked("artifact", "list", "--limit", "1000")}
    recipient = stack.outside("backup-key", str(elsewhere / "age.key")).strip()
    told = stack.compose("run", "--rm", "--no-TTY", "backup", "all.kernelm", "--to", recipient)
    file = elsewhere / "all.kernelm"
    shutil.move(stack.folder / "backups" / "all.kernelm", file)
    assert file.read_bytes().startswith(b"age-encryption.org/v1\n")
    table.append(f"backup while it runs: {' '.join(told.split())}")
    return file, elsewhere / "age.key", artifacts


def test_a_backup_leaves_nothing_beside_itself(stack: Stack, saved: Any, articles: Callable[[str], str]) -> None:
    assert list((stack.folder / "backups").iterdir()) == []
    assert articles("tech")[200:260].encode() not in saved[0].read_bytes()


def test_destroyed_and_restored_it_answers_as_before(stack: Stack, saved: Any, table: list[str]) -> None:
    file, key, artifacts = saved
    before = stack.classify("tech")
    keys = {k["id"] for k in stack.asked("key", "list")}
    stack.down("--volumes", "--timeout", "60")
    assert not stack.containers(all=True)
    shutil.rmtree(stack.home)
    done = stack.deploy("restore", str(file), key=key)
    assert done.returncode == 0, done.stderr
    stack.compose("up", "--detach", "--wait", "--wait-timeout", "240")
    there = {a["digest"]: a for a in stack.asked("artifact", "list", "--limit", "1000")}
    assert there == artifacts
    assert f"{len(artifacts)} of {len(artifacts)} artifacts" in stack.kernelm("artifact", "verify")
    assert {k["id"] for k in stack.asked("key", "list")} == keys
    again = stack.until(lambda: stack.classify("tech"), 120, "answers of the restored system")
    assert (again["artifact"], again["results"]) == (before["artifact"], before["results"])
    table.append(f"destroyed and restored: {len(artifacts)} artifacts verified, answers as before")


def test_a_home_is_never_overwritten(stack: Stack, saved: Any) -> None:
    done = stack.deploy("restore", str(saved[0]), key=saved[1])
    assert done.returncode == 2
    assert "is not empty" in " ".join(done.stderr.split())


def test_down_leaves_nothing_that_runs(stack: Stack) -> None:
    stack.down("--timeout", "60")
    assert not stack.containers(all=True)
    assert not stack.engine.networks.list(filters={"label": f"com.docker.compose.project={stack.project}"})
    assert (stack.home / "identity" / "operator.seed").exists()  # what is on disk stays: `up` goes on with it
