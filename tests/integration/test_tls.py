"""TLS on the bus: a real broker that asks everybody for a certificate, and what each wrong one is told."""

import asyncio
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kernelm.testing.harness import System, until
from kernelm_authority.broker import Broker
from kernelm_authority.identity import Grant, admin
from kernelm_cli.certificates import CertificateAuthority
from kernelm_sdk.bus import Bus
from kernelm_sdk.enrollment import join
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.relay import Relay, listen, reachable
from kernelm_sdk.system import Empty, Kernel


def use(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on we are who the certificates in `folder` say."""
    patch.setenv("KERNELM_TLS_CA", str(folder / "ca.pem"))
    patch.setenv("KERNELM_TLS_CERT", str(folder / "tls.pem"))
    patch.setenv("KERNELM_TLS_KEY", str(folder / "tls.pem"))


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
async def system(tmp_path: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[System]:
    """Broker and kernel that speak TLS alone; we have a good certificate."""
    ca = CertificateAuthority(tmp_path / "ca")
    ca.issue("nats", ["localhost", "127.0.0.1"], tmp_path / "nats")
    ca.issue("us", [], tmp_path / "us")
    use(patch, tmp_path / "us")
    system = System(tmp_path / "home")
    system.broker = Broker(system.home, system.authority, tls=tmp_path / "nats")
    async with system:
        yield system


async def refused(system: System) -> Fault:
    with pytest.raises(Fault) as caught:
        await Bus.connect(system.broker.url, admin(system.home), timeout_s=5.0)
    return caught.value


async def test_members_join_and_call_over_tls_and_through_the_relay(system: System, tmp_path: Path) -> None:
    assert system.broker.url.startswith("tls://")
    bus = await system.connect("jobs")
    assert (await bus.call(Kernel.state, Empty())).instances
    relay = Relay(system.broker.url)
    await relay.on_socket(listen(tmp_path / "broker.sock", os.geteuid()))
    url, inside = await reachable(f"unix:{tmp_path}/broker.sock")
    assert inside is not None
    grant = Grant("plugin", "tls-plugin", "tls-plugin", "tls-plugin", calls=("kernel/1.state",))
    behind = await Bus.connect(url, await join(url, system.authority.token("tls-plugin", grant)))  # a container: no certificates
    assert (await behind.call(Kernel.state, Empty())).instances
    await behind.close()
    await inside.close()
    await relay.close()


async def test_two_systems_share_a_machine(system: System, tmp_path: Path) -> None:
    """No port but its own is a broker's: the monitor of the health check is for who asks for one."""
    other = System(tmp_path / "other")
    other.broker = Broker(other.home, other.authority, tls=tmp_path / "nats")
    async with other:
        assert (await other.admin.call(Kernel.state, Empty())).instances
        assert (await system.admin.call(Kernel.state, Empty())).instances


async def test_plaintext_is_refused(system: System) -> None:
    plain = system.broker.url.replace("tls:", "nats:")
    with pytest.raises(Fault):
        await Bus.connect(plain, admin(system.home), timeout_s=3.0)
    reader, writer = await asyncio.open_connection("127.0.0.1", system.broker.port)
    assert b'"tls_required":true' in await reader.readline()
    writer.write(b'CONNECT {"verbose":false}\r\nPING\r\n')
    assert b"PONG" not in await asyncio.wait_for(reader.read(), 10)
    writer.close()


async def test_who_has_no_certificate_is_refused(system: System) -> None:
    context = ssl.create_default_context(cafile=os.environ["KERNELM_TLS_CA"])
    with socket.create_connection(("127.0.0.1", system.broker.port)) as raw, \
         context.wrap_socket(raw, server_hostname="localhost") as wrapped, \
         pytest.raises(ssl.SSLError, match="certificate required"):  # fmt: skip
        wrapped.recv(1)  # TLS 1.3: the server's verdict comes after the handshake


async def test_each_bad_certificate_is_named(system: System, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    good = CertificateAuthority(tmp_path / "ca")
    stranger = CertificateAuthority(tmp_path / "stranger")
    stranger.issue("us", [], tmp_path / "theirs")
    use(patch, tmp_path / "theirs")
    fault = await refused(system)
    assert fault.code == "bad_certificate"
    assert "the certificate of the broker at tls://" in fault.message

    patch.setenv("KERNELM_TLS_CA", str(tmp_path / "ca" / "ca.pem"))  # we believe it, it does not believe us
    fault = await refused(system)
    assert fault.code == "bad_certificate"
    assert "does not accept our certificate" in fault.message

    good.issue("us", [], tmp_path / "old", days=-1 / 24)
    use(patch, tmp_path / "old")
    fault = await refused(system)
    assert fault.code == "bad_certificate"
    assert "does not accept our certificate" in fault.message
    assert "deploy rotate" in fault.remedy

    (tmp_path / "old" / "tls.pem").write_text("nothing")
    fault = await refused(system)
    assert str(tmp_path / "old" / "tls.pem") in fault.message


async def test_a_certificate_is_rotated_without_a_lost_connection(system: System, tmp_path: Path) -> None:
    bus = await system.connect("jobs")
    reconnections = 0

    async def counted() -> None:
        nonlocal reconnections
        reconnections += 1

    bus.reconnected.append(counted)
    ca = CertificateAuthority(tmp_path / "ca")
    before = _shown(system)
    ca.issue("nats", ["localhost", "127.0.0.1"], tmp_path / "nats")
    system.processes["broker"].send_signal(signal.SIGHUP)
    await until(lambda: _shown(system) != before, 10, "the new certificate")
    for _ in range(20):
        await bus.call(Kernel.state, Empty())
    assert reconnections == 0


async def test_a_new_ca_is_believed_at_the_next_reconnection(system: System, tmp_path: Path) -> None:
    """The broker comes back with a certificate of a CA that was not there when we connected."""
    bus = await system.connect("jobs")
    old = (tmp_path / "ca" / "ca.pem").read_text()
    new = CertificateAuthority(tmp_path / "new")
    new.issue("us", [], tmp_path / "us", believed=old)
    new.issue("nats", ["localhost", "127.0.0.1"], tmp_path / "nats", believed=old)
    system.processes["broker"].kill()
    system.processes["broker"].wait()
    system.start_broker()

    async def answers() -> bool:
        try:
            return bool((await bus.call(Kernel.state, Empty(), timeout_s=2.0)).instances)
        except Fault:
            return False

    await until(answers, 20, "the connection under the new CA")


def _shown(system: System) -> bytes:
    """The broker's certificate, as it shows it."""
    context = ssl.create_default_context(cafile=os.environ["KERNELM_TLS_CA"])
    context.load_cert_chain(os.environ["KERNELM_TLS_CERT"])
    with socket.create_connection(("127.0.0.1", system.broker.port)) as raw, \
         context.wrap_socket(raw, server_hostname="localhost") as wrapped:  # fmt: skip
        return wrapped.getpeercert(True) or b""


def test_a_half_set_environment_is_refused(patch: pytest.MonkeyPatch) -> None:
    from kernelm_sdk.tls import files

    with pytest.raises(ClientFault, match="KERNELM_TLS_KEY is not set"):
        files({"KERNELM_TLS_CA": "a", "KERNELM_TLS_CERT": "b"})
