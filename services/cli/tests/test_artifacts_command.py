"""`kernelm artifact` against a real, encrypted store: what it shows, exports and erases."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kernelm.testing.harness import System
from kernelm_artifacts.vault import new_master
from kernelm_cli.home import UpFile, write_up
from kernelm_sdk.system import Artifacts, PutArtifact

SECRET = "the patient's name is Ada Lovelace"


@pytest.fixture
async def system(tmp_path: Path):
    new_master(tmp_path / "master.json")
    async with System() as system:
        await system.service("artifacts", KERNELM_ARTIFACTS_MASTER=str(tmp_path / "master.json"))
        created = psutil.Process().create_time()
        write_up(system.home, UpFile(os.getpid(), created, system.broker.url, "", "", time.time()))
        yield system


async def kernelm(system: System, *arguments: str) -> tuple[int, str]:
    """The exit code of the command, and all that it printed."""
    command = [sys.executable, "-m", "kernelm_cli", *arguments, "--home", str(system.home)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


async def test_an_artifact_is_listed_shown_exported_and_erased(system: System, tmp_path: Path) -> None:
    (tmp_path / "in" / "data").mkdir(parents=True)
    (tmp_path / "in" / "data" / "notes.txt").write_text(SECRET)
    put = PutArtifact(str(tmp_path / "in"), "dataset", {"job": "j1"}, {"name": "patients"})
    digest = (await system.admin.call(Artifacts.put, put)).digest
    on_disk = [p for p in (system.home / "artifacts").rglob("*") if p.is_file()]
    assert not [p for p in on_disk if SECRET.encode() in p.read_bytes()]

    code, text = await kernelm(system, "artifact", "list", "--kind", "dataset")
    assert code == 0
    assert digest[7:19] in text
    assert "patients" in text
    code, text = await kernelm(system, "artifact", "show", digest[7:17], "--json")
    assert json.loads(text)["lineage"] == {"job": "j1"}
    code, text = await kernelm(system, "artifact", "export", digest[7:17], str(tmp_path / "out"))
    assert (code, (tmp_path / "out" / "data" / "notes.txt").read_text()) == (0, SECRET)
    (tmp_path / "out" / "data" / "mine.txt").touch()  # a folder that its owner can work in
    code, text = await kernelm(system, "artifact", "export", digest, str(tmp_path / "out"))
    assert code == 2
    assert "is there already" in text

    code, text = await kernelm(system, "artifact", "erase", digest[7:17])
    assert (code, "--yes" in text) == (0, True)
    code, text = await kernelm(system, "artifact", "erase", digest[7:17], "--yes")
    assert (code, "erased" in text) == (0, True)
    for name in (digest, digest[7:17]):
        code, text = await kernelm(system, "artifact", "show", name)
        assert code == 2
        assert "artifact" in text
    assert not [p for p in (system.home / "artifacts" / "trees").rglob("*") if p.is_file()]


async def test_a_master_key_that_is_none_ends_the_start_with_the_reason(tmp_path: Path) -> None:
    async with System() as system:
        (tmp_path / "token").write_text(system.authority.token("artifacts"))
        env = os.environ | {"KERNELM_URL": system.broker.url, "KERNELM_HOME": str(system.home),
                            "KERNELM_TOKEN_FILE": str(tmp_path / "token"), "KERNELM_ARTIFACTS_MASTER": str(tmp_path / "none")}
        start = [sys.executable, "-m", "kernelm_artifacts"]
        done = await asyncio.to_thread(subprocess.run, start, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "kernelm_artifacts.vault new" in done.stderr


async def test_what_is_not_right_is_found(system: System, tmp_path: Path) -> None:
    digests = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "notes.txt").write_text(f"{SECRET} {number}")
        digests.append((await system.admin.call(Artifacts.put, PutArtifact(str(tmp_path / str(number)), "dataset"))).digest)
    code, text = await kernelm(system, "artifact", "verify", digests[0])
    assert (code, "1 of 1 artifacts" in text) == (0, True), text
    sealed = system.home / "artifacts" / "trees" / digests[1].removeprefix("sha256:") / "sealed" / "notes.txt"
    content = bytearray(sealed.read_bytes())
    content[-1] ^= 1
    sealed.chmod(0o644)
    sealed.write_bytes(content)
    code, text = await kernelm(system, "artifact", "verify")
    assert (code, "1 of 2 artifacts" in text, digests[1][:19] in text) == (1, True, True), text
