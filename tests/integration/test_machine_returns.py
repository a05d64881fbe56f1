"""A further machine comes back by itself, over TLS, until it is forgotten: real processes, started as its containers start them."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from kernelm.journal import Entry
from kernelm.testing.harness import System, until
from kernelm_authority.broker import Broker
from kernelm_authority.files import write_secret
from kernelm_authority.identity import Authority, Grant
from kernelm_authority.machines import machine_token
from kernelm_authority.rotation import rotate
from kernelm_cli.certificates import CertificateAuthority
from kernelm_sdk import machine
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.enrollment import join, new_seed, public_key, ticket_of
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.machine import Keeper
from kernelm_sdk.system import Empty, EnrollRequest, Kernel, MachineName

MODULES = {"artifacts-two": "kernelm_artifacts.mirror", "node-two": "kernelm_node"}


class Second:
    """The second machine: a folder for each member's keys, and the members' processes."""

    def __init__(self, system: System, home: Path, memory: Path) -> None:
        self.system, self.home, self.memory = system, home, memory
        home.mkdir()

    def token(self, member: str) -> Path:
        return self.home / "join" / member / "token"

    def hand_out(self, *members: str) -> None:
        """As `kernelm deploy machine` does, and who copies its folder."""
        for member in members:
            write_secret(self.token(member), machine_token(self.system.authority, member, 600))

    def start(self, member: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "KERNELM_URL": self.system.broker.url, "KERNELM_HOME": str(self.home), "KERNELM_TOKEN_FILE": str(self.token(member)),
            "KERNELM_ARTIFACTS_PLAIN": str(self.memory), "KERNELM_MIRROR": "artifacts-two"}  # fmt: skip
        with self.log(member).open("ab") as log:
            started = subprocess.Popen([sys.executable, "-m", "kernelm_sdk.machine", MODULES[member]], env=environment, stdout=log,
                                       stderr=log)  # fmt: skip
        self.system.processes[member] = started
        return started

    def log(self, member: str) -> Path:
        return self.home / f"{member}.log"

    def keeper(self, member: str) -> Keeper:
        return Keeper(self.system.broker.url, self.token(member))

    async def credentials(self, member: str) -> Credentials:
        """What a start of `member` gets, in this process."""
        return await join(self.system.broker.url, (await self.keeper(member).ticket()).read_text())


@pytest.fixture
async def second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Second]:
    ca = CertificateAuthority(tmp_path / "ca")
    ca.issue("nats", ["localhost", "127.0.0.1"], tmp_path / "nats")
    ca.issue("us", [], tmp_path / "us")
    for name, file in (("CA", "ca.pem"), ("CERT", "tls.pem"), ("KEY", "tls.pem")):
        monkeypatch.setenv(f"KERNELM_TLS_{name}", str(tmp_path / "us" / file))
    system = System(tmp_path / "home")
    system.broker = Broker(system.home, system.authority, tls=tmp_path / "nats")
    memory = Path(tempfile.mkdtemp(prefix="kernelm-two-", dir="/dev/shm"))
    try:
        async with system:
            yield Second(system, tmp_path / "two", memory)
    finally:
        shutil.rmtree(memory)


async def trail(system: System) -> list[tuple[str, str, str]]:
    """Who did what, on what: the audit trail."""
    assert system.kernel is not None
    entries = [msgspec.json.decode(body, type=Entry) async for _, _, body, _ in system.kernel.bus.read("AUDIT")]
    return [(entry.who, entry.what, entry.on) for entry in entries]


async def test_it_comes_back_after_a_crash_without_anybodys_help(second: Second) -> None:
    second.hand_out(*MODULES)
    for member in MODULES:
        second.start(member)
    for member in MODULES:
        await second.system.ready(member, 60)
    for member in MODULES:
        assert [path.name for path in second.token(member).parent.iterdir()] == ["key"], "the tokens are taken"
        assert (second.token(member).parent / "key").stat().st_mode & 0o777 == 0o600
    since = time.time()
    for member in MODULES:
        second.system.processes[member].kill()
        second.system.processes[member].wait()
        second.start(member)
    for member in MODULES:
        await second.system.ready(member, 60, since)
    enrolled = [(who, on) for who, what, on in await trail(second.system) if what == "enroll" and who.startswith("machine-")]
    assert sorted(enrolled) == sorted((f"machine-{member}", member) for member in MODULES for _ in range(2))


async def test_each_return_is_a_new_enrollment_and_shuts_out_the_one_before(second: Second) -> None:
    second.hand_out("node-two")
    first = await second.credentials("node-two")
    frozen = await second.system.track(Bus.connect(second.system.broker.url, first))
    again = await second.credentials("node-two")
    assert (again.user, again.user) == ("node-two", first.user)
    assert again.seed != first.seed
    await until(lambda: not frozen.connected, 20, "the one before cut off")
    with pytest.raises(Fault, match=r"refused|uthorization"):
        await Bus.connect(second.system.broker.url, first, timeout_s=3)
    assert (await second.system.track(Bus.connect(second.system.broker.url, again))).connected


async def test_it_comes_back_after_the_signing_key_was_stolen(second: Second) -> None:
    """What that key has signed counts no more; a machine's key is not among it."""
    second.hand_out("node-two")
    first = await second.credentials("node-two")
    await rotate(Authority(second.system.home), second.system.broker.url, drop_others=True)
    with pytest.raises(Fault, match=r"refused|uthorization"):
        await Bus.connect(second.system.broker.url, first, timeout_s=3)
    again = await second.credentials("node-two")
    assert (await second.system.track(Bus.connect(second.system.broker.url, again))).connected


async def test_the_key_of_a_machine_does_one_thing(second: Second) -> None:
    second.hand_out("node-two", "artifacts-two")
    key = ticket_of((await second.keeper("node-two").ticket()).read_text())
    other = ticket_of((await second.keeper("artifacts-two").ticket()).read_text())
    assert (key.user, key.expires) == ("machine-node-two", 0)
    bus = await second.system.track(Bus.connect(second.system.broker.url, key))
    for subject in ("svc.kernel.v1.state.{}", "svc.kernel.v1.renew.{}", "svc.kernel.v1.hello.{}", "svc.kernel.v1.forget-machine.{}",
                    "svc.kernel.v1.enroll.machine-artifacts-two", "svc.artifacts.v1.open.{}", "$KV.leases.{}", "evt.a.b.{}",
                    "$JS.API.DIRECT.GET.EVT", "inst.node-local.node.v1.start.{}", "_INBOX.admin.x"):  # fmt: skip
        with pytest.raises(ClientFault, match="may not publish"):
            await bus.request(subject.format(key.user), b"{}", 60.0)
    for subject in (">", "evt.>", "impl.node-two.>", "inst.node-two.>", "_INBOX.>"):
        with pytest.raises(ClientFault, match="may not"):
            await bus.subscribe(subject, lambda *_: asyncio.sleep(0))
    with pytest.raises(ClientFault, match="belongs to another"):  # nor in the name of the machine's other member
        await bus.call(Kernel.enroll, EnrollRequest(other.jwt, public_key(new_seed())))
    for service in ("gateway", "jobs"):  # and nobody but an administrator forgets machines
        member = await second.system.connect(service)
        with pytest.raises(ClientFault, match="may not publish"):
            await member.call(Kernel.forget_machine, MachineName("two"))


async def test_who_is_forgotten_is_out_at_once_and_told_what_to_do(second: Second) -> None:
    system = second.system
    second.hand_out("node-two", "artifacts-two")
    node = second.start("node-two")
    await system.ready("node-two", 60)
    held = await second.credentials("artifacts-two")
    mirror = await system.track(Bus.connect(system.broker.url, held))
    instance = await system.connect("data-x1", Grant("plugin", "data-x1", "data", "data"))
    assert system.kernel is not None
    await system.kernel.registry.happens("data-x1", "start", plugin="data", pool="data", node="two")  # runs there
    spare = machine_token(system.authority, "node-two", 600)  # that was made twice
    elsewhere = await system.connect("node-x-two")  # of another machine, whose name ends alike
    await system.kernel.registry.happens("data-x2", "start", plugin="data", pool="data", node="two")
    start = Grant("plugin", "data-x2", "data", "data")
    kept = system.authority.token("data-x2", start)  # by a node that has not started what it was asked to
    await system.admin.call(Kernel.forget_machine, MachineName("two"))
    await until(lambda: not mirror.connected and not instance.connected, 20, "members and instances cut off")
    assert await asyncio.to_thread(node.wait, 60) != 0
    assert elsewhere.connected
    assert ("admin", "forget_machine", "two") in await trail(system)
    for token in (kept, spare):
        with pytest.raises(ClientFault, match="was forgotten since the token was made"):
            await join(system.broker.url, token)

    for member in ("node-two", "artifacts-two"):
        started = second.start(member)
        assert await asyncio.to_thread(started.wait, 60) == 1
        said = second.log(member).read_text()
        assert "opens no more: this machine was forgotten" in said
        assert "`kernelm deploy machine` on the first machine" in said
    with pytest.raises(ClientFault, match="forgotten already"):
        await system.admin.call(Kernel.forget_machine, MachineName("two"))

    second.hand_out("node-two")  # an administrator takes it in again
    second.start("node-two")
    await system.ready("node-two", 60)
    assert (await system.connect("data-x2", start)).connected


@pytest.mark.parametrize("name", ["", "local", "*", "Two"])
async def test_the_first_machine_is_never_forgotten(second: Second, name: str) -> None:
    jobs, node = await second.system.connect("jobs"), await second.system.connect("node-local")
    with pytest.raises(ClientFault, match="no further machine"):
        await second.system.admin.call(Kernel.forget_machine, MachineName(name))
    assert await jobs.call(Kernel.state, Empty())
    assert node.connected


async def test_who_finds_no_broker_waits_for_it(second: Second) -> None:
    second.hand_out("node-two")
    await second.keeper("node-two").ticket()
    second.system.processes["broker"].kill()
    second.system.processes["broker"].wait()
    second.start("node-two")
    await until(lambda: "tried again in 2 s" in second.log("node-two").read_text(), 60, "two tries")
    assert "no broker at tls://" in second.log("node-two").read_text()
    second.system.start_broker()
    await second.system.ready("node-two", 60)


async def test_a_start_that_was_interrupted_binds_one_key(second: Second, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the first enrollment is lost: the same key asks again, though the token works for one key only."""
    second.hand_out("node-two")
    folder, token = second.token("node-two").parent, second.token("node-two").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("kernelm_sdk.machine._write", _failing_at(folder / "key"))
        with pytest.raises(ClientFault, match="no room"):
            await second.keeper("node-two").ticket()
    assert sorted(path.name for path in folder.iterdir()) == ["key.next", "token"]
    key = ticket_of((await second.keeper("node-two").ticket()).read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["key", "ticket"]

    second.token("node-two").write_text(token)  # it ended before the token was deleted, or somebody has copied it here again
    assert ticket_of((await second.keeper("node-two").ticket()).read_text()) == key
    assert not second.token("node-two").exists()


def _failing_at(where: Path) -> Callable[[Path, str], None]:
    write = machine._write

    def writing(path: Path, text: str) -> None:
        if path == where:
            raise OSError("no room")
        write(path, text)

    return writing


async def test_what_is_of_no_use_is_named(second: Second) -> None:
    with pytest.raises(ClientFault, match="neither a key") as caught:
        await second.keeper("node-two").ticket()
    assert caught.value.code == "no_token"
    second.hand_out("node-two")
    used = second.token("node-two").read_text()
    await join(second.system.broker.url, used)
    with pytest.raises(ClientFault, match="is of no use: the join token was used already"):
        await second.keeper("node-two").ticket()
    second.token("node-two").unlink()
    second.token("node-two").mkdir()
    with pytest.raises(ClientFault, match=r"token: Is a directory") as caught:
        await second.keeper("node-two").ticket()
    assert "`kernelm deploy join`" in caught.value.remedy
    write_secret(second.token("artifacts-two"), second.system.authority.token("artifacts-two"))
    with pytest.raises(ClientFault, match="not for a further machine"):
        await second.keeper("artifacts-two").ticket()
