"""Bad clients on real sockets: floods and trickles of headers, what is no HTTP, bodies that do not come. The right code, quickly,
nothing of the inside told, and the gateway goes on."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kernelm_contracts.server import GenerateFrame
from kernelm_gateway import connection, exchange
from kernelm_gateway.service import GatewayService, bind
from kernelm_gateway.settings import GatewaySettings

LINE = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
async def gateway(bus: Any, tmp_path: Path) -> AsyncIterator[GatewayService]:
    service = GatewayService(bus, tmp_path, GatewaySettings(http_port=0, grpc_port=0, most_calls=2), bind("127.0.0.1", 0, "X"))
    await service.on_start()
    yield service
    await service.on_stop()


async def opened(gateway: GatewayService) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = gateway.announcement.http.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def refusal(reader: asyncio.StreamReader, within_s: float = 2.0) -> tuple[int, dict[str, Any]]:
    """The status and the error that was answered, after which the connection is closed."""
    answer = await asyncio.wait_for(reader.read(), within_s)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Traceback" not in answer
    assert b".py" not in answer
    error: dict[str, Any] = json.loads(body)["error"]
    return int(head.split()[1]), error


async def goes_on(gateway: GatewayService, auth: Callable[..., str]) -> bool:
    async with httpx.AsyncClient(base_url=gateway.announcement.http, headers={"Authorization": auth()}) as client:
        return (await client.post("/v1/classify", json={"model": "news", "input": "a"})).status_code == 200


@pytest.mark.parametrize("flood", [
    LINE + b"".join(b"X-%d: y\r\n" % k for k in range(1000)) + b"\r\n", LINE + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    LINE + b"X: " + b"y" * 100_000, b"GET /" + b"a" * 100_000, LINE + b"y" * 100_000,
])  # fmt: skip
async def test_a_flood_of_headers(gateway: GatewayService, auth: Callable[..., str], flood: bytes) -> None:
    reader, writer = await opened(gateway)
    writer.write(flood)
    status, error = await refusal(reader)
    assert (status, error["type"]) in ((431, "invalid_request_error"), (400, "invalid_request_error"))
    writer.close()
    assert await goes_on(gateway, auth)


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 100])
async def test_what_is_no_http(gateway: GatewayService, auth: Callable[..., str], garbage: bytes) -> None:
    reader, writer = await opened(gateway)
    writer.write(garbage)
    assert (await refusal(reader))[0] == 400
    writer.close()
    assert await goes_on(gateway, auth)


@pytest.mark.parametrize("beginning", [b"", b"POST /v1/cl", LINE])
async def test_a_head_that_does_not_end(gateway: GatewayService, monkeypatch: pytest.MonkeyPatch, beginning: bytes) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    reader, writer = await opened(gateway)
    writer.write(beginning)
    status, error = await refusal(reader)
    assert (status, "did not arrive" in error["message"]) == (408, True)
    writer.close()


async def test_a_body_that_does_not_come(gateway: GatewayService, auth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_S", 0.2)
    reader, writer = await opened(gateway)
    writer.write(LINE + f"Authorization: {auth()}\r\nContent-Length: 100\r\n\r\n{{".encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    assert head.startswith(b"HTTP/1.1 408 ")
    writer.close()


async def test_the_rest_of_a_refused_body_is_not_waited_for(gateway: GatewayService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    reader, writer = await opened(gateway)
    writer.write(LINE + b"Content-Length: 9000000\r\n\r\n{")
    assert (await refusal(reader))[0] == 401  # and the connection is closed
    writer.close()


async def test_a_key_is_asked_for_before_the_body_is_read(gateway: GatewayService) -> None:
    reader, writer = await opened(gateway)
    writer.write(LINE + b"Content-Length: 9000000\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), 60)).startswith(b"HTTP/1.1 401 ")
    writer.close()


async def test_more_calls_than_it_takes(gateway: GatewayService, bus: Any, auth: Callable[..., str]) -> None:
    """Two are under way, and wait for their bodies; the third is told to come back."""
    held = [await opened(gateway) for _ in range(2)]
    for _, writer in held:
        writer.write(LINE + f"Authorization: {auth()}\r\nContent-Length: 100\r\n\r\n{{".encode())
        await writer.drain()
    async with httpx.AsyncClient(base_url=gateway.announcement.http, headers={"Authorization": auth()}) as client:
        async with asyncio.timeout(60):
            while (answer := await client.post("/v1/classify", json={"model": "news", "input": "a"})).status_code == 200:
                pass
        assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["code"]) == (429, "1", "busy")
        for _, writer in held:
            writer.close()
        async with asyncio.timeout(60):
            while (await client.post("/v1/classify", json={"model": "news", "input": "a"})).status_code != 200:
                pass


async def test_a_reader_who_takes_nothing_is_dropped(gateway: GatewayService, bus: Any, auth: Callable[..., str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(exchange, "STALLED_S", 0.4)
    ended = asyncio.Event()

    async def endless(*_: Any, **__: Any) -> AsyncIterator[GenerateFrame]:
        try:
            while True:
                yield GenerateFrame("word " * 1000)
        finally:
            ended.set()

    monkeypatch.setattr(bus, "stream", endless)
    reader, writer = await opened(gateway)
    body = b'{"model": "news", "prompt": "x", "stream": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {auth()}\r\nContent-Length: {len(body)}\r\n\r\n"
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(head.encode() + body)
    async with asyncio.timeout(60):
        await ended.wait()
    reader._transport.resume_reading()  # type: ignore[attr-defined]
    with contextlib.suppress(ConnectionResetError):  # what the system held may still come, and then the end
        while (part := await asyncio.wait_for(reader.read(1 << 20), 60)):
            assert not part.endswith(b"\r\n0\r\n\r\n"), "it is no whole answer"
    writer.close()


@pytest.mark.parametrize("body", [
    b'{"model": "news", "input": "\xff\xfe"}', b'{"model": "news", "input": "\\ud800"}', b"\xef\xbb\xbf{}",
    b'{"model": ' + b"[" * 100_000, b'{"model": "news", "input": "a"} {}', b'{"model": "news", "input": NaN}',
])  # fmt: skip
async def test_bodies_that_are_no_json(gateway: GatewayService, bus: Any, auth: Callable[..., str], body: bytes) -> None:
    async with httpx.AsyncClient(base_url=gateway.announcement.http, headers={"Authorization": auth()}) as client:
        answer = await client.post("/v1/classify", content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid")
    assert bus.of_models == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
async def test_other_methods(gateway: GatewayService, auth: Callable[..., str], method: str) -> None:
    async with httpx.AsyncClient(base_url=gateway.announcement.http, headers={"Authorization": auth()}) as client:
        answer = await client.request(method, "/v1/chat/completions")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_pieces_leave_by_the_short_way_where_there_is_one_and_the_answer_ends_once() -> None:
    sent, pieces, room = list[Any](), list[bytes](), True

    async def send(message: Any) -> None:
        sent.append((message.get("body"), message.get("more_body")))

    def chunk(events: bytes) -> bool:
        if room:
            pieces.append(events)
        return room

    answer = exchange.Exchange({exchange.CHUNK: chunk}, send, send)  # type: ignore[arg-type]
    for piece in (b"a", b"b", b"", b"c"):
        await answer.write(piece)
    room = False  # the client's buffers are full
    await answer.write(b"d")
    await answer.end()
    assert pieces == [b"b", b"c"]
    assert sent == [(None, None), (b"a", True), (b"", True), (b"d", True), (b"", False)]
