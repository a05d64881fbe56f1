"""A backup of a system under load, and the same system again from it, elsewhere."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import msgspec
import psutil
import pytest
import pytest_asyncio

from kernelm.testing.harness import System
from kernelm_cli.home import UpFile, write_up
from kernelm_sdk.bus import Bus
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts, Empty, Kernel, KeyRequest, PutArtifact

SECRET = "the patient's name is Ada Lovelace"


async def kernelm(*arguments: str | Path) -> tuple[int, str]:
    """The exit code of the command, and all that it printed."""
    command = [sys.executable, "-m", "kernelm_cli", *map(str, arguments)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


class Load:
    """Keys and artifacts made one after the other, and all that was acknowledged."""

    def __init__(self, system: System, place: Path) -> None:
        self.system, self.place = system, place
        self.keys: list[str] = []
        self.artifacts: list[Artifact] = []

    async def step(self) -> None:
        number = len(self.keys)
        self.keys.append((await self.system.admin.call(Kernel.create_key, KeyRequest(f"key{number}"))).key.id)
        folder = self.place / str(number)
        folder.mkdir()
        (folder / "notes.txt").write_text(f"{SECRET} {number}")
        self.artifacts.append(await self.system.admin.call(Artifacts.put, PutArtifact(str(folder), "dataset")))

    async def for_ever(self) -> None:
        while True:
            await self.step()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def saved(tmp_path_factory: pytest.TempPathFactory):
    """(backup file, key file, what was acknowledged before it, its keys and artifacts)"""
    place = tmp_path_factory.mktemp("backup")
    (place / "in").mkdir()
    code, recipient = await kernelm("backup-key", place / "age.key")
    assert code == 0, recipient
    async with System() as system:
        await system.service("artifacts")
        write_up(system.home, UpFile(os.getpid(), psutil.Process().create_time(), system.broker.url, "", "", time.time()))
        load = Load(system, place / "in")
        for _ in range(20):
            await load.step()
        going_on = asyncio.create_task(load.for_ever())
        keys, artifacts = tuple(load.keys), tuple(load.artifacts)
        code, text = await kernelm("backup", place / "all.kernelm", "--home", system.home, "--to", recipient.strip())
        assert code == 0, text
        assert len(load.keys) > len(keys)  # it went on meanwhile
        assert not going_on.done()
        code, text = await kernelm("backup", place / "plain.kernelm", "--home", system.home, "--unencrypted")
        assert code == 0, text
        going_on.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await going_on
        admin = (system.home / "admin.creds").read_bytes()
    return place / "all.kernelm", place / "age.key", keys, artifacts, admin


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_all_that_was_acknowledged_is_there_again(saved, tmp_path: Path) -> None:
    file, key, keys, artifacts, admin = saved
    home = tmp_path / "new" / "home"
    code, text = await kernelm("restore", file, "--home", home, "--key", key)
    assert code == 0, text
    assert (home / "admin.creds").read_bytes() == admin
    assert home.stat().st_mode & 0o777 == 0o700
    async with System(home) as system:
        await system.service("artifacts")
        there = {k.id for k in (await system.admin.call(Kernel.list_keys, Empty())).keys}
        assert set(keys) <= there
        for number, artifact in enumerate(artifacts):
            opened = await system.admin.call(Artifacts.open, ArtifactName(artifact.digest))
            assert (Path(opened.path) / "notes.txt").read_text() == f"{SECRET} {number}"
        bus = await system.track(Bus.connect(system.broker.url, system.authority.credentials("reader")))
        events = [msgspec.json.decode(body) async for _, _, body, _ in bus.read("EVT", "evt.artifact.stored.*")]
        assert {a.digest for a in artifacts} <= {event["digest"] for event in events}
        later = await system.admin.call(Kernel.create_key, KeyRequest("later"))  # and it can go on
        assert later.key.id not in there
    assert list(home.parent.iterdir()) == [home]  # no left-over


async def test_nobody_reads_it_without_the_key(saved, tmp_path: Path) -> None:
    file = saved[0]
    content = file.read_bytes()
    assert content.startswith(b"age-encryption.org/v1\n")
    assert SECRET.encode() not in content
    assert file.stat().st_mode & 0o777 == 0o600
    for extra, why in (((), "is encrypted"), (("--key", tmp_path / "none"), "none"), (("--key", file), "")):
        code, text = await kernelm("restore", file, "--home", tmp_path / "h", *extra)
        assert code == 2, text
        assert why in text
    await kernelm("backup-key", tmp_path / "other.key")
    code, text = await kernelm("restore", file, "--home", tmp_path / "h", "--key", tmp_path / "other.key")
    assert (code, "does not open" in text) == (2, True)
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("how", ["flip", "cut", "swap"])
async def test_a_damaged_backup_is_refused_and_leaves_nothing(saved, tmp_path: Path, how: str) -> None:
    plain = saved[0].with_name("plain.kernelm")
    damaged = tmp_path / "damaged"
    data = bytearray(plain.read_bytes())
    if how == "flip":
        data[data.index(SECRET.encode())] ^= 1
        damaged.write_bytes(data)
    elif how == "cut":
        damaged.write_bytes(data[: len(data) // 2])
    else:  # a file more than the manifest knows
        shutil.copyfile(plain, damaged)
        with tarfile.open(damaged, "a") as tar:
            tar.add(__file__, "home/identity/account.seed.py")
    for extra in ((), ("--check",)):
        code, text = await kernelm("restore", damaged, "--home", tmp_path / "h", *extra)
        assert (code, "damaged" in text) == (2, True), text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


async def test_a_backup_is_checked_without_a_home(saved, tmp_path: Path) -> None:
    code, text = await kernelm("restore", saved[0], "--check", "--key", saved[1], "--home", tmp_path / "h")
    assert (code, "is whole" in text) == (0, True), text
    assert not (tmp_path / "h").exists()


async def test_nothing_is_overwritten_and_nobody_forgets_to_encrypt(saved, tmp_path: Path) -> None:
    file, key, *_ = saved
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine").touch()
    for arguments, why in (
        (("restore", file, "--key", key, "--home", tmp_path / "home"), "not empty"),
        (("backup", tmp_path / "b", "--home", tmp_path / "home"), "--to"),
        (("backup", file, "--home", tmp_path / "home", "--unencrypted"), "is there already"),
        (("backup", tmp_path / "b", "--home", tmp_path / "home", "--to", "age1nonsense"), "age1nonsense"),
        (("backup", tmp_path / "b", "--home", tmp_path / "home", "--unencrypted"), "a backup is made where the keys lie"),
        (("backup-key", key), "is there already"),
    ):  # fmt: skip
        code, text = await kernelm(*arguments)
        assert code == 2, (arguments, text)
        assert why in " ".join(text.replace("│", " ").split()), text
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["mine"]
