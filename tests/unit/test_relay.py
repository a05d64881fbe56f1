"""The relay between a Unix socket and a port, both ways round."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kernelm_sdk.relay import Relay, listen, reachable


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except asyncio.CancelledError:  # the test is over; asyncio would log it as an error of the server's
        return
    finally:
        writer.close()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """Where something answers with what it is told."""
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def told(path: Path) -> tuple[bytes, asyncio.StreamWriter]:
    """What comes back of one byte; none where the connection is ended, with what was sent read or unread."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(b"x")
        return await asyncio.wait_for(reader.read(1), 30), writer
    except ConnectionError:
        return b"", writer


async def test_bytes_pass_through_a_socket_and_a_port_in_both_directions(tmp_path: Path, port: int) -> None:
    folder = tmp_path / ("long" * 30)  # longer than the path of a socket may be
    folder.mkdir()
    outside = Relay(f"nats://127.0.0.1:{port}")
    await outside.on_socket(listen(folder / "broker.sock", os.geteuid()))
    assert stat.S_IMODE((folder / "broker.sock").stat().st_mode) == 0o600
    short = tmp_path / "s"
    short.symlink_to(folder)
    url, inside = await reachable(f"unix:{short}/broker.sock")
    assert inside is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    sent = os.urandom(3_000_000)
    answer = asyncio.create_task(reader.readexactly(len(sent)))
    writer.write(sent)
    assert await asyncio.wait_for(answer, 30) == sent
    await outside.close()  # the one beyond it notices
    assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()
    await inside.close()


async def test_where_the_broker_is_away_the_connection_ends_at_once_and_a_successor_takes_over_the_path(
        tmp_path: Path, port: int) -> None:  # fmt: skip
    free = await asyncio.start_server(echo, "127.0.0.1", 0)
    away = free.sockets[0].getsockname()[1]
    free.close()
    await free.wait_closed()
    for target, expected in ((away, b""), (port, b"x")):
        relay = Relay(f"nats://127.0.0.1:{target}")
        await relay.on_socket(listen(tmp_path / "s", os.geteuid()))  # the first one is never closed: a killed node closes nothing
        answer, writer = await told(tmp_path / "s")
        assert answer == expected
        writer.close()


async def test_of_more_connections_than_allowed_the_latest_are_closed(tmp_path: Path, port: int) -> None:
    relay = Relay(f"nats://127.0.0.1:{port}", most=2)
    await relay.on_socket(listen(tmp_path / "s", os.geteuid()))
    ends = []
    for expected in (b"x", b"x", b""):
        answer, writer = await told(tmp_path / "s")
        assert answer == expected
        ends.append(writer)
    for writer in ends:
        writer.close()
    await relay.close()


async def test_a_url_that_is_no_socket_is_reached_without_a_relay() -> None:
    assert await reachable("nats://127.0.0.1:4222") == ("nats://127.0.0.1:4222", None)
