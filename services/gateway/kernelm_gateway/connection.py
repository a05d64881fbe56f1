"""uvicorn's HTTP connection, with what it lacks with httptools: a limit to a request's head in bytes and in time, refusals in
OpenAI's form, and a way to drop a reader who does not read.

Sources: RFC 9110, 15.5; RFC 6585, 5 (431).
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kernelm_gateway import faults
from kernelm_gateway.exchange import ABORT, CHUNK, encode
from kernelm_sdk.errors import ClientFault

MOST_HEAD = 32 * 1024  # bytes of a request's line and headers
MOST_HEADERS = 128
HEAD_S = 15.0  # for a head to arrive, from its first byte on, or from the beginning of the connection


class Connection(HttpToolsProtocol):
    """One client's connection."""

    _head = _heads = 0  # bytes and headers of the head that is being read
    _reading = True  # a head is expected, or has come in part
    _late: asyncio.TimerHandle | None = None
    _flooded = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_S, self._refuse, 408, "the head of the request did not arrive in time")

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # refused: what still comes is not looked at
            return
        super().data_received(data)
        if self._reading and self._head:
            self._head += len(data)  # a header that does not end is not told of
            if self._head > 2 * MOST_HEAD:
                self._flood()
            elif self._late is None and not self.transport.is_closing():
                self._late = self.loop.call_later(HEAD_S, self._refuse, 408, "the head of the request did not arrive in time")

    def on_message_begin(self) -> None:
        self._reading, self._head, self._heads = True, 1, 0
        super().on_message_begin()
        scope: Any = self.scope
        scope[ABORT], scope[CHUNK] = self.transport.abort, self._chunk

    def _chunk(self, events: bytes) -> bool:
        """Send a chunk of an answer that has begun as chunks; False where the client is gone or its buffers are full. ASGI's way
        costs as much again as the write."""
        if self.flow.write_paused or self.transport.is_closing():
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(events), events))
        return True

    def on_url(self, url: bytes) -> None:
        self._measure(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._heads += 1
        self._measure(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _measure(self, size: int) -> None:
        self._head += size
        if self._head > MOST_HEAD or self._heads > MOST_HEADERS:
            self._flooded = True
            raise ValueError("the head of the request is too large")  # the parser hands it over as its own error

    def on_headers_complete(self) -> None:
        self._reading = False
        self._on_time()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._on_time()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A client that is still sending its body would miss an answer that came with the end of the connection: what it sends
        is read for a while, and dropped."""
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self._late = self.loop.call_later(HEAD_S, self.transport.close)

    def _on_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _flood(self) -> None:
        self._refuse(431, f"the head of the request is over {MOST_HEAD} bytes or {MOST_HEADERS} headers")

    def send_400_response(self, msg: str) -> None:
        """Called for what is no HTTP."""
        if self._flooded:
            self._flood()
        else:
            self._refuse(400, "this is no HTTP/1.1 request")

    def _refuse(self, status: int, what: str) -> None:
        """Answer and close, unless an answer is under way: then only close."""
        self._on_time()
        if self.cycle is None or self.cycle.response_complete:
            body = encode(faults.http_body(ClientFault("invalid", what, "see RFC 9112")))
            head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
