"""Bytes from one socket to another. A container without a network reaches the broker through a Unix socket that is mounted
into it: a process outside relays from that socket to the broker, and the runner inside from a loopback port to the socket.
Neither knows what passes: the broker authenticates every member by its JWT. TLS to the broker ("tls://host:port") is the outer
one's: certificates stay outside, and inside nobody needs to know of them.

`python -m kernelm_sdk.relay FD PATH TARGET MOST` accepts from the Unix socket that it inherits as FD, and ends when PATH is
no longer that socket."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import ssl
import sys
from pathlib import Path
from urllib.parse import urlsplit

from kernelm_sdk.tls import client_context, fault_of

SCHEME = "unix:"
CHUNK = 1 << 16
CHECK_S = 1.0  # between looks at PATH
INFO = b"INFO "  # the broker's first line (NATS client protocol)
log = logging.getLogger("kernelm.relay")


class Relay:
    """Each connection it accepts is joined with one to `target`, a URL: "nats://host:port", "tls://host:port" or "unix:/path";
    of more than `most` at a time the latest are closed at once (0: no such limit)."""

    def __init__(self, target: str, most: int = 0) -> None:
        self.target, self.most = target, most
        self._server: asyncio.Server | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._tls = target.startswith("tls:")

    async def on_port(self) -> str:
        """Listen on a free loopback port; the URL to connect to."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def on_socket(self, listening: socket.socket) -> None:
        """Accept from a Unix socket that listens."""
        self._server = await asyncio.start_unix_server(self._accept, sock=listening)

    async def close(self) -> None:
        """Stop listening and cut what is connected."""
        if self._server is not None:
            self._server.close()
        for task in self._running:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self.most and len(self._running) >= self.most:  # both ends are ours to pay for, whoever is to blame
            writer.close()
            return
        self._running.add(task)
        try:
            try:
                there, back = await self._connect()
                if self._tls:
                    writer.write(_without_tls(await there.readline()))
            except ssl.SSLError as error:
                log.error("%s", fault_of(error, self.target))
                return
            except OSError:  # the broker is away: the end of the connection tells the other side, which tries again
                return
            try:
                ways = [asyncio.create_task(_copy(reader, back)), asyncio.create_task(_copy(there, writer))]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
            finally:
                back.close()
        finally:
            writer.close()
            self._running.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.target.startswith(SCHEME):
            return await asyncio.open_unix_connection(self.target.removeprefix(SCHEME))
        url = urlsplit(self.target)
        return await asyncio.open_connection(url.hostname, url.port or 4222, ssl=client_context() if self._tls else None)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, ssl.SSLError):  # ends both ways, like the end of the stream
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()


def _without_tls(line: bytes) -> bytes:
    """The broker's greeting for somebody who is connected through us: it must not ask for TLS once more."""
    told = json.loads(line.removeprefix(INFO) or b"{}")
    return INFO + json.dumps({k: v for k, v in told.items() if not k.startswith("tls_")}).encode() + b"\r\n" if told else b""


def listen(path: Path, owner: int) -> socket.socket:
    """A Unix socket at `path`, in place of a predecessor's, to which only the user `owner` (and root) can connect. Whoever
    does so before anybody accepts, waits."""
    listening = socket.socket(socket.AF_UNIX)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        short = f"/proc/self/fd/{folder}/{path.name}"  # a socket's path may not exceed 107 bytes (unix(7))
        Path(short).unlink(missing_ok=True)
        listening.bind(short)
        Path(short).chmod(0o600)
        if os.geteuid() != owner:
            os.chown(short, owner, owner)
        listening.listen()
    finally:
        os.close(folder)
    return listening


async def reachable(url: str) -> tuple[str, Relay | None]:
    """A URL that a NATS client can connect to, and the relay behind it where `url` is a Unix socket's ("unix:/path")."""
    if not url.startswith(SCHEME):
        return url, None
    relay = Relay(url)
    return await relay.on_port(), relay


async def serve(descriptor: int, path: Path, target: str, most: int) -> None:
    """Relay from the inherited socket until `path` is another's."""
    relay = Relay(target, most)
    await relay.on_socket(socket.socket(fileno=descriptor))
    with contextlib.suppress(FileNotFoundError):  # its instance is over, perhaps before we began
        own = path.stat().st_ino
        while path.stat().st_ino == own:  # noqa: ASYNC110 - a file tells nobody that it was removed
            await asyncio.sleep(CHECK_S)
    await relay.close()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
