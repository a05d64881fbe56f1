"""Encryption at rest: what lies on the disk, who can read it, and what a crash leaves."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from kernelm_artifacts import vault
from kernelm_artifacts.plain import Plain
from kernelm_artifacts.sealing import Sealing
from kernelm_artifacts.service import ArtifactsService
from kernelm_artifacts.store import Store
from kernelm_artifacts.tree import remove
from kernelm_artifacts.vault import Vault, new_master, retire_masters, rotate_master
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.plugin import Call
from kernelm_sdk.system import ArtifactErased, ArtifactName, GrantArtifact, Instance, PutArtifact, SystemState

SECRET = b"the patient's name is Ada Lovelace; "
FILES = {"data/notes.txt": SECRET * 100_000, "data/empty": b"", "labels.json": b'["Ada", "Grace"]'}  # 3.6 MB: several segments


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    return tmp_path / "in"


@pytest.fixture
def master(tmp_path: Path) -> Path:
    new_master(tmp_path / "master.json")
    return tmp_path / "master.json"


@pytest.fixture
def memory():
    root = Path(f"/dev/shm/kernelm-test-{os.getpid()}-{time.monotonic_ns()}")
    yield root
    if root.exists():
        remove(root)


@pytest.fixture
def open_store(tmp_path: Path, master: Path, memory: Path):
    """Opens the store of this test as a start of the service does; what was open is closed, as by its end."""
    stores: list[Store] = []

    def close() -> None:
        while stores:
            stores.pop().close()

    def opened(sealed: bool = True, most_bytes: int = 2**30) -> Store:
        close()
        stores.append(Store(tmp_path / "store", Sealing(Vault(str(master)), Plain(memory, most_bytes)) if sealed else None))
        return stores[0]

    opened.close = close
    yield opened
    close()


def on_disk(root: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file())


def content(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in FILES}


def test_the_disk_holds_nothing_readable_and_the_reader_everything(open_store, folder: Path, memory: Path) -> None:
    store = open_store()
    artifact = store.put(folder, "dataset")
    assert store.put(folder, "dataset") == artifact  # it is there, and right
    assert SECRET[:16] not in on_disk(store.root)
    assert b"Grace" not in on_disk(store.root)
    again, path = store.open(artifact.digest)
    assert again == artifact
    assert path.is_relative_to(memory)
    assert content(path) == FILES
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.rglob("*") if p.is_file()} == {0o444}


def test_digest_does_not_depend_on_encryption(open_store, folder: Path, tmp_path: Path) -> None:
    plain = Store(tmp_path / "plain")
    assert plain.put(folder, "dataset").digest == open_store().put(folder, "dataset").digest
    plain.close()


@pytest.mark.parametrize("how", ["flip", "cut", "swap", "leave out"])
def test_what_was_changed_on_the_disk_is_noticed(open_store, folder: Path, how: str) -> None:
    store = open_store()
    digest = store.put(folder, "dataset").digest
    sealed = store.root / "trees" / digest[7:] / "sealed"
    victim = sealed / "data" / "notes.txt"
    sealed.chmod(0o755), victim.parent.chmod(0o755), victim.chmod(0o644)
    data = bytearray(victim.read_bytes())
    if how == "flip":
        data[2_000_000] ^= 1
        victim.write_bytes(data)
    elif how == "cut":
        victim.write_bytes(data[: 1 << 20])  # a whole segment less
    elif how == "swap":
        victim.write_bytes((sealed / "labels.json").read_bytes())  # good for another file of the same artifact
    else:
        victim.unlink()
    with pytest.raises(KernelFault) as caught:
        store.open(digest)
    assert caught.value.code == "corrupt_artifact"
    assert "data/notes.txt" in caught.value.message
    assert content(store.open(store.put(folder, "dataset").digest)[1]) == FILES


def test_a_changed_copy_in_memory_is_made_anew(open_store, folder: Path) -> None:
    store = open_store()
    digest = store.put(folder, "dataset").digest
    path = store.open(digest)[1]
    (path / "labels.json").chmod(0o644)
    (path / "labels.json").write_bytes(b'["Eve"]')
    assert content(store.open(digest)[1]) == FILES


def test_rotation_wraps_anew_and_the_old_key_can_go(open_store, folder: Path, master: Path) -> None:
    store = open_store()
    digest = store.put(folder, "dataset").digest
    before = (store.root / "trees" / digest[7:] / "sealed" / "labels.json").read_bytes()
    rotate_master(master)
    store = open_store()
    assert store.seal_all() == (0, 1)
    assert store.seal_all() == (0, 0)
    retire_masters(master)
    store = open_store()
    assert content(store.open(digest)[1]) == FILES
    assert (store.root / "trees" / digest[7:] / "sealed" / "labels.json").read_bytes() == before  # keys alone were touched


def test_the_wrong_master_key_and_none_are_named_and_lose_nothing(open_store, folder: Path, master: Path, memory: Path) -> None:
    store = open_store()
    digest = store.put(folder, "dataset").digest
    with pytest.raises(KernelFault) as caught:
        open_store(sealed=False).open(digest)
    assert caught.value.code == "no_master_key"
    kept = master.rename(master.with_name("kept"))
    new_master(master)
    store = open_store()
    for refused in (store.seal_all, lambda: store.open(digest)):
        with pytest.raises(KernelFault) as caught:
            refused()
        assert caught.value.code == "wrong_master_key"
    kept.replace(master)
    assert content(open_store().open(digest)[1]) == FILES


def test_a_store_that_was_plain_is_sealed_whenever_the_crash_comes(open_store, folder: Path, master: Path, memory: Path) -> None:
    store = open_store(sealed=False)
    digest = store.put(folder, "dataset").digest
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom kernelm_artifacts import sealing, store\n"
        "from kernelm_artifacts.plain import Plain\nfrom kernelm_artifacts.vault import Vault\n"
        "module, name = sys.argv[4].split('.')\n"
        "def die(*_): os.kill(os.getpid(), 9)\n"
        "setattr({'sealing': sealing, 'store': store}[module], name, die)\n"
        "s = store.Store(Path(sys.argv[1]), sealing.Sealing(Vault(sys.argv[2]), Plain(Path(sys.argv[3]), 2**30)))\n"
        "s.seal_all()\n"
    )
    for where in ("sealing.write_durably", "store.remove"):  # before the key is there, and after
        open_store.close()
        arguments = [str(store.root), str(master), str(memory), where]
        died = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert content(open_store().open(digest)[1]) == FILES
    store = open_store()
    store.seal_all()
    assert SECRET[:16] not in on_disk(store.root)
    assert content(store.open(digest)[1]) == FILES


def test_who_deletes_the_key_deletes_the_data(open_store, folder: Path, tmp_path: Path, memory: Path) -> None:
    store = open_store()
    digest = store.put(folder, "dataset").digest
    path = store.open(digest)[1]
    store.erase(digest)
    assert not path.exists()
    assert on_disk(store.root) == b""
    for again in (store.erase, store.open):
        with pytest.raises(ClientFault) as caught:
            again(digest)
        assert caught.value.code == "not_found"
    assert store.put(folder, "dataset").digest == digest


def test_copies_are_bounded_and_what_is_in_use_stays(open_store, folder: Path, tmp_path: Path) -> None:
    store = open_store(most_bytes=4_000_000)
    first = store.put(folder, "dataset").digest
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_bytes(SECRET * 50_000)
    second = store.put(tmp_path / "other", "dataset").digest
    plain = store._sealing.plain
    path = store.open(first, "trainer-1")[1]
    with pytest.raises(KernelFault) as caught:
        store.open(second)
    assert (caught.value.code, caught.value.retriable) == ("no_room", True)
    assert plain.sweep({"trainer-1"}, 0.0) == 0
    assert path.exists()
    assert plain.sweep({"trainer-2"}, 3600.0) == 0  # not yet
    assert plain.sweep({"trainer-2"}, 0.0) == 1
    assert store.open(second)[1].exists()


def test_a_file_of_a_copy_that_is_there_needs_no_key(open_store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store()
    digest = store.put(folder, "dataset").digest
    assert store.file(digest, "labels.json").read_bytes() == FILES["labels.json"]
    asked = []
    monkeypatch.setattr(Vault, "open_key", lambda *_: asked.append(1))
    assert store.file(digest, "data/notes.txt").read_bytes() == FILES["data/notes.txt"]
    assert not asked, "each file of an artifact is a request: the KMS is asked once, and the bytes are hashed once"


def test_copies_on_a_disk_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match="KERNELM_ARTIFACTS_PLAIN"):
        Plain(tmp_path / "plain", 1)


@pytest.mark.parametrize(("text", "remedy"), [("", "makes one"), ('{"key": []}', "keyset of Tink")])
def test_a_broken_master_key_is_named(tmp_path: Path, text: str, remedy: str) -> None:
    (tmp_path / "m").write_text(text)
    with pytest.raises(ClientFault) as caught:
        Vault(str(tmp_path / "m"))
    assert str(tmp_path / "m") in caught.value.message
    assert remedy in caught.value.remedy
    with pytest.raises(ClientFault, match="no KMS"):
        Vault("azure-kms://key")


def test_a_master_key_is_private_and_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m"
    assert vault.main(["new", str(path)]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_text()
    assert vault.main(["new", str(path)]) == 2
    assert "rotate" in capsys.readouterr().err
    assert path.read_text() == before
    assert vault.main(["melt", str(path)]) == 2


class Kernel:
    """Stands in for the bus: publishes to a list, and answers who is there."""

    def __init__(self) -> None:
        self.events, self.living = [], ()

    async def publish(self, event) -> int:
        self.events.append(event)
        return len(self.events)

    async def call(self, method, request) -> SystemState:
        return SystemState(tuple(Instance(i, "p", "1", "p/1", "local", state) for i, state in self.living), (), (), 1)


async def test_the_service_drops_what_only_the_dead_have_and_erases(
    folder: Path, master: Path, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MASTER", master), ("PLAIN", memory), ("PLAIN_MB", 4)):
        monkeypatch.setenv(f"KERNELM_ARTIFACTS_{name}", str(value))
    kernel = Kernel()
    service = ArtifactsService(kernel, tmp_path / "home")
    await service.on_start()
    first = (await service.put(PutArtifact(str(folder), "dataset"), Call("cli"))).digest
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_bytes(SECRET * 50_000)
    second = (await service.put(PutArtifact(str(tmp_path / "other"), "dataset"), Call("cli"))).digest
    opened = await service.open(ArtifactName(first), Call("trainer-1"))
    kernel.living = (("trainer-1", "ready"),)
    with pytest.raises(KernelFault) as caught:
        await service.open(ArtifactName(second), Call("trainer-2"))
    assert caught.value.code == "no_room"
    assert Path(opened.path).exists()
    kernel.living = (("trainer-1", "exited"),)
    assert Path((await service.open(ArtifactName(second), Call("trainer-2"))).path).exists()
    assert not Path(opened.path).exists()
    grant = await service.grant(GrantArtifact(first, 60), Call("node"))  # room is made for this one too
    kernel.living = ()
    await service.open(ArtifactName(second), Call("trainer-2"))
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {grant.token}"}, trust_env=False) as client:
        read = await client.get(f"{grant.url}/labels.json")
    assert (read.status_code, read.content) == (200, FILES["labels.json"]), "and for a file over HTTP"
    await service.open(ArtifactName(second), Call("trainer-2"))
    assert (await service.put(PutArtifact(str(folder), "dataset"), Call("cli"))).digest == first, "and to check what is put again"
    await service.erase(ArtifactName(first), Call("cli"))
    assert kernel.events[-1] == ArtifactErased(digest=first, by="cli")
    await service.on_stop()
