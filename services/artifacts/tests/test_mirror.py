"""The mirror beside the store, each with a home of its own: what a machine that shares no folder with the store sees."""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_artifacts.tree import digest_of
from kernelm_artifacts.vault import new_master
from kernelm_authority.files import write_secret
from kernelm_authority.identity import Grant
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.plugin import Context, Manifest
from kernelm_sdk.system import (
    Artifact,
    ArtifactFile,
    ArtifactName,
    Artifacts,
    ArtifactStored,
    OpenArtifact,
    PutArtifact,
    WriteGrant,
)

MANIFEST = Manifest("afar", "1", "reads and writes artifacts from another machine", (), "tests:Afar", default=False)
MIRROR = "artifacts-two"
FILES = {"a.txt": b"one", "sub/b % ä.bytes": bytes(range(256)) * 20_000, "empty": b""}  # 5 MB: more than one piece


class Machine:
    """The second machine: a home, a mirror there, and an instance that uses it."""

    def __init__(self, system: System, home: Path, memory: Path) -> None:
        self.system, self.home, self.memory = system, home, memory
        self.context: Context

    async def start(self, **environment: str) -> None:
        token = self.home / "token"
        write_secret(token, self.system.authority.token(MIRROR))
        self.system._spawn("mirror", "kernelm_artifacts.mirror", KERNELM_HOME=str(self.home), KERNELM_TOKEN_FILE=str(token),
                           KERNELM_ARTIFACTS_PLAIN=str(self.memory), **environment)  # fmt: skip
        await self.system.ready(MIRROR, 30)

    async def join(self) -> None:
        bus = await self.system.connect("afar-1", Grant("plugin", "afar-1", "afar", "afar"))
        scratch = self.home / "scratch" / "afar-1"
        scratch.mkdir(parents=True)
        self.context = Context(bus, "afar-1", "afar", MANIFEST, scratch, mirror=MIRROR)

    def folder(self, name: str, files: dict[str, bytes] = FILES) -> Path:
        """A folder with `files` in the scratch folder of the instance."""
        for path, content in files.items():
            (self.context.scratch / name / path).parent.mkdir(parents=True, exist_ok=True)
            (self.context.scratch / name / path).write_bytes(content)
        return self.context.scratch / name


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["encrypted"])
async def machine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Machine]:
    memory = Path(tempfile.mkdtemp(prefix="kernelm-mirror-", dir="/dev/shm"))
    own = {}
    if request.param == "encrypted":
        new_master(tmp_path / "master.json")
        own = {"KERNELM_ARTIFACTS_MASTER": str(tmp_path / "master.json"), "KERNELM_ARTIFACTS_PLAIN": str(memory / "store")}
    try:
        async with System() as system:
            await system.service("artifacts", **own)
            machine = Machine(system, tmp_path / "two", memory / "mirror")
            machine.home.mkdir()
            await machine.start(KERNELM_ARTIFACTS_PLAIN_MB="16")
            await machine.join()
            yield machine
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(memory)], check=True)
        shutil.rmtree(memory)


@pytest.mark.parametrize("machine", ["plain", "encrypted"], indirect=True)
async def test_what_is_put_on_one_machine_is_opened_on_the_other(machine: Machine, tmp_path: Path) -> None:
    events: list[Any] = []

    async def note(received: Any) -> None:
        events.append(received.event)

    admin = machine.system.admin
    await admin.follow(note, "evt.artifact.stored.*")
    made = await machine.context.store(machine.folder("made"), "model", {"n": 1}, job="j")
    told: Artifact = await admin.call(Artifacts.describe, ArtifactName(made))
    assert (told.kind, told.metadata, told.lineage) == ("model", {"n": 1}, {"job": "j"})
    opened: OpenArtifact = await admin.call(Artifacts.open, ArtifactName(made))
    assert content(Path(opened.path)) == FILES
    await until(lambda: events == [ArtifactStored(digest=made, kind="model", bytes=told.bytes)], 10, "one event, of the store")

    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "c.txt").write_text("of the first machine")
    put: Artifact = await admin.call(Artifacts.put, PutArtifact(str(tmp_path / "here"), "dataset"))
    folder = await machine.context.artifact(put.digest)
    assert folder.is_relative_to(machine.memory)
    assert content(folder) == {"c.txt": b"of the first machine"}
    assert (folder / "c.txt").stat().st_mode & 0o222 == 0
    assert content(await machine.context.artifact(made)) == FILES
    assert [i.id for i in (await machine.system.state()).instances if "artifacts/1" in i.contracts] == ["artifacts"], "no route"


async def test_a_flipped_bit_is_fetched_again_and_what_is_erased_is_gone(machine: Machine) -> None:
    digest = await machine.context.store(machine.folder("made"), "dataset")
    folder = await machine.context.artifact(digest)
    (folder / "a.txt").chmod(0o644)
    (folder / "a.txt").write_text("onf")
    assert content(await machine.context.artifact(digest)) == FILES
    await machine.system.admin.call(Artifacts.erase, ArtifactName(digest))
    await until(lambda: not folder.exists(), 10, "the end of the copy")
    with pytest.raises(ClientFault) as caught:
        await machine.context.artifact(digest)
    assert caught.value.code == "not_found"


async def test_copies_are_bounded_and_what_nobody_has_makes_way(machine: Machine) -> None:
    digests = [await machine.context.store(machine.folder(f"made{n}", {"x": bytes([n]) * 6_000_000}), "dataset") for n in range(3)]
    folders = [await machine.context.artifact(digest) for digest in digests]  # the kernel knows of no such instance: all make way
    assert not folders[0].exists()
    assert folders[2].exists()
    with pytest.raises(KernelFault) as caught:
        await machine.context.artifact(await machine.context.store(machine.folder("large", {"x": bytes(20_000_000)}), "dataset"))
    assert (caught.value.code, caught.value.retriable) == ("no_room", True)


async def test_what_is_no_good_is_refused_by_name(machine: Machine) -> None:
    with pytest.raises(ClientFault) as caught:
        await machine.context.store(machine.folder("bad", {"model.pkl": b"x"}), "model")
    assert caught.value.code == "unsafe_file"
    (machine.home / "identity").mkdir()
    (machine.home / "identity" / "key").write_text("secret")
    with pytest.raises(ClientFault) as caught:
        await machine.context.store(machine.home / "identity", "model")
    assert caught.value.code == "permission_denied"
    with pytest.raises(ClientFault, match="may not publish"):  # a plugin gives no rights away
        await machine.context.bus.call(Artifacts.accept, described({"x": b"y"}))


async def test_a_store_that_is_out_of_reach_is_named(machine: Machine) -> None:
    digest = await machine.context.store(machine.folder("made"), "dataset")
    state = msgspec.json.decode((machine.system.home / "run" / "artifacts.json").read_bytes())
    machine.system.processes["artifacts"].terminate()
    machine.system.processes["artifacts"].wait()
    with pytest.raises(Fault) as fault:
        await machine.context.artifact(digest)
    assert fault.value.code == "no_responders"
    await machine.system.service("artifacts", KERNELM_ARTIFACTS_URL="http://127.0.0.1:1", **settings_of(machine))
    assert state["url"] != "http://127.0.0.1:1"
    with pytest.raises(KernelFault) as caught:
        await machine.context.artifact(digest)
    assert (caught.value.code, caught.value.retriable) == ("unreachable", True)
    with pytest.raises(KernelFault) as caught:
        await machine.context.store(machine.folder("more", {"x": b"y"}), "dataset")
    assert caught.value.code == "unreachable"


def settings_of(machine: Machine) -> dict[str, str]:
    """Those of the store, which was started with them."""
    master = machine.home.parent / "master.json"
    found = {"KERNELM_ARTIFACTS_MASTER": str(master), "KERNELM_ARTIFACTS_PLAIN": str(machine.memory.parent / "store")}
    return found if master.exists() else {}


def described(files: dict[str, bytes], kind: str = "dataset") -> Artifact:
    told = tuple(ArtifactFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items()))
    return Artifact(digest_of(told), kind, told, sum(f.bytes for f in told))


async def test_only_what_was_announced_is_taken(machine: Machine) -> None:
    admin = machine.system.admin
    right = {"x": b"right", "y": b"too"}
    grant: WriteGrant = await admin.call(Artifacts.accept, described(right))
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {grant.token}"}, trust_env=False) as client:

        async def answers(**files: bytes) -> list[int]:
            return [(await client.put(f"{grant.url}/{name}", content=data)).status_code for name, data in files.items()]

        async def finish() -> dict[str, Any]:
            answer: dict[str, Any] = (await client.post(grant.url)).json()
            return answer

        assert await answers(z=b"unknown", x=b"longer than said") == [404, 400]
        assert await answers(**{"%2e%2e%2fz": b"out"}) == [404]
        assert (await client.put(f"{grant.url}/x", content=b"right", headers={"authorization": "Bearer 1.2"})).status_code == 401
        assert await answers(x=b"wrong", y=b"too") == [204, 204]  # as long as it should be
        assert (await finish())["code"] == "changed"
        assert (await finish())["code"] == "not_found", "it is over"
        for files, told in (({"x": b"right"}, "code"), (right, "digest")):  # y is missing at first
            grant = await admin.call(Artifacts.accept, described(right))
            client.headers["authorization"] = f"Bearer {grant.token}"
            assert await answers(x=b"wrong") == [204]
            assert await answers(**files) == [204] * len(files)
            assert (await finish())[told] in ("changed", described(right).digest)
    with pytest.raises(ClientFault, match="not the digest"):
        await admin.call(Artifacts.accept, msgspec.structs.replace(described(right), bytes=1))
    large = (ArtifactFile("x", 1 << 50, "0" * 64),)
    with pytest.raises(KernelFault) as caught:
        await admin.call(Artifacts.accept, Artifact(digest_of(large), "dataset", large, 1 << 50))
    assert caught.value.code == "no_room"
    assert not any((machine.memory.parent / "store" / "incoming").iterdir()), "nothing half stays"
