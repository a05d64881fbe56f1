"""The listeners on real sockets: where they are, what a large request gets, and what happens when a port is taken."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kernelm_gateway.service import Announcement, GatewayService, bind
from kernelm_gateway.settings import GatewaySettings, from_environment
from kernelm_sdk.errors import ClientFault

HUGE = 50_000_000


@pytest.fixture
async def gateway(bus: Any, tmp_path: Path) -> AsyncIterator[GatewayService]:
    settings = GatewaySettings(http_port=0, grpc_port=0)
    service = GatewayService(bus, tmp_path, settings, bind("127.0.0.1", 0, "KERNELM_HTTP_PORT"))
    await service.on_start()
    yield service
    await service.on_stop()


async def test_it_announces_where_it_listens(gateway: GatewayService, tmp_path: Path, auth: Callable[..., str]) -> None:
    said = msgspec.json.decode((tmp_path / "run" / "gateway.json").read_bytes(), type=Announcement)
    async with httpx.AsyncClient(base_url=said.http) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        body = {"model": "news", "input": "a"}
        answer = await client.post("/v1/classify", json=body, headers={"Authorization": auth()})
        assert answer.json()["generation"] == 3
        assert "server" not in answer.headers
    async with grpc.aio.insecure_channel(said.grpc) as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_stopping_withdraws_it(bus: Any, tmp_path: Path) -> None:
    service = GatewayService(bus, tmp_path, GatewaySettings(http_port=0, grpc_port=0), bind("127.0.0.1", 0, "X"))
    await service.on_start()
    await service.on_stop()
    assert not (tmp_path / "run" / "gateway.json").exists()
    with pytest.raises(httpx.ConnectError):
        await httpx.AsyncClient().get(service.announcement.http + "/healthz")


async def test_a_request_of_50_mb_is_refused_before_it_is_sent(gateway: GatewayService, auth: Callable[..., str]) -> None:
    """By its Content-Length alone: the answer is there while the client has sent no byte of the body."""
    host, port = gateway.announcement.http.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nAuthorization: {auth()}\r\nContent-Length: {HUGE}\r\n\r\n"
    writer.write(head.encode())
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_request_of_50_mb_that_is_sent_all_the_same(gateway: GatewayService, bus: Any, auth: Callable[..., str],
                                                            chunked: bool) -> None:  # fmt: skip
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(HUGE // 100_000):
            yield b"x" * 100_000

    async with httpx.AsyncClient(base_url=gateway.announcement.http, headers={"Authorization": auth()}) as client:
        response = await client.post("/v1/classify", content=chunks() if chunked else b"x" * HUGE)
        assert response.status_code == 413
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("too_large", "invalid_request_error")
        assert "10000000 bytes" in error["remedy"]
        assert bus.of_models == []
        after = await client.post("/v1/classify", json={"model": "news", "input": "a"})
        assert after.status_code == 200, "the gateway goes on"


async def test_without_a_key_a_body_is_not_read_at_all(gateway: GatewayService) -> None:
    host, port = gateway.announcement.http.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), 60)).startswith(b"HTTP/1.1 401 ")
    writer.close()


@pytest.mark.parametrize("variable", ["KERNELM_HTTP_PORT", "KERNELM_GRPC_PORT"])
def test_a_taken_port_ends_the_program_with_2(variable: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ports = {"KERNELM_HTTP_PORT": "0", "KERNELM_GRPC_PORT": "0", variable: port}
        environment = {**os.environ, **ports, "KERNELM_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "kernelm_gateway"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1 is taken" in done.stderr
    assert f"set {variable} to another port" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_from_the_environment() -> None:
    assert from_environment({"PATH": "/bin"}) == GatewaySettings()
    assert from_environment({"KERNELM_HTTP_PORT": "0", "KERNELM_KEY_CACHE_S": "0.5"}).key_cache_s == 0.5


@pytest.mark.parametrize(("name", "value", "what"), [
    ("KERNELM_HTTP_PORT", "http", "http_port"), ("KERNELM_GRPC_PORT", "70000", "KERNELM_GRPC_PORT: 70000 is not between"),
    ("KERNELM_KEY_CACHE_S", "60", "not between 0 and 1"), ("KERNELM_MAX_BODY_BYTES", "-1", "not between"),
])  # fmt: skip
def test_bad_settings_name_the_variable(name: str, value: str, what: str) -> None:
    with pytest.raises(ClientFault) as caught:
        from_environment({name: value})
    assert name in caught.value.message
    assert what in caught.value.message
