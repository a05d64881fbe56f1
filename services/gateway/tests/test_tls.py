"""HTTP and gRPC over TLS: plaintext is refused, and another certificate is shown without a restart."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from kernelm_cli.certificates import CertificateAuthority
from kernelm_gateway.service import GatewayService, bind
from kernelm_gateway.settings import GatewaySettings


@pytest.fixture
async def secured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bus: Any) -> AsyncIterator[GatewayService]:
    CertificateAuthority(tmp_path / "ca").issue("gateway", ["localhost", "127.0.0.1"], tmp_path / "tls")
    monkeypatch.setenv("KERNELM_TLS_CA", str(tmp_path / "tls" / "ca.pem"))
    for name in ("CERT", "KEY"):
        monkeypatch.setenv(f"KERNELM_TLS_{name}", str(tmp_path / "tls" / "tls.pem"))
    settings = GatewaySettings(http_port=0, grpc_port=0)
    service = GatewayService(bus, tmp_path, settings, bind("127.0.0.1", 0, "KERNELM_HTTP_PORT"))
    await service.on_start()
    yield service
    await service.on_stop()


def shown(port: int, ca: str) -> bytes:
    """The certificate that somebody who connects now is shown."""
    context = ssl.create_default_context(cafile=ca)
    with socket.create_connection(("127.0.0.1", port), 10) as raw, context.wrap_socket(raw, server_hostname="localhost") as wrapped:
        return wrapped.getpeercert(True) or b""


async def test_both_speak_tls_alone(secured: GatewayService, tmp_path: Path) -> None:
    assert secured.announcement.http.startswith("https://")
    ca = str(tmp_path / "ca" / "ca.pem")
    async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=ca)) as client:
        assert (await client.get(f"{secured.announcement.http}/healthz")).json() == {"status": "ok"}
    with pytest.raises(httpx.HTTPError):
        async with httpx.AsyncClient() as client:
            await client.get(secured.announcement.http.replace("https:", "http:") + "/healthz")
    believed = grpc.ssl_channel_credentials(Path(ca).read_bytes())
    async with grpc.aio.secure_channel(secured.announcement.grpc, believed) as channel:
        await asyncio.wait_for(channel.channel_ready(), 60)
    async with grpc.aio.insecure_channel(secured.announcement.grpc) as channel:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(channel.channel_ready(), 2)


async def test_a_new_certificate_is_shown_without_a_restart(secured: GatewayService, tmp_path: Path) -> None:
    ports = [int(secured.announcement.http.rpartition(":")[2]), int(secured.announcement.grpc.rpartition(":")[2])]
    ca = str(tmp_path / "ca" / "ca.pem")
    before = [await asyncio.to_thread(shown, port, ca) for port in ports]
    assert before[0] == before[1]
    CertificateAuthority(tmp_path / "ca").issue("gateway", ["localhost"], tmp_path / "tls")
    after = [await asyncio.to_thread(shown, port, ca) for port in ports for _ in (1, 2)]
    assert after[1] == after[3] != before[0]
