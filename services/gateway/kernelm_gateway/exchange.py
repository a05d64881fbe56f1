"""One HTTP request and its answer, on bare ASGI: what the endpoints that carry calls of models are made of.

A framework's routing, dependency injection and encoding cost more than all else that the gateway does for such a call
(measured: 129 us of processor time a request with Litestar, 39 us without), so these few endpoints do without one.
Sources: ASGI 3.0, "HTTP & WebSocket ASGI Message Format"; HTML Living Standard, "Server-sent events".
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from kernelm_gateway import faults
from kernelm_sdk.errors import ClientFault, Fault, KernelFault

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ABORT = "kernelm.abort"  # in the scope: a function that drops the connection with whatever waits to be sent
CHUNK = "kernelm.chunk"  # in the scope: a function that sends a piece of the answer now, or says that it can't (False)
BODY_S = 30.0  # for a body to arrive
TIMEOUT = "kernelm-timeout"
LONGEST_S = 86400.0  # that a client may want to wait
STALLED_S = 60.0  # a reader who takes nothing for so long is gone
JSON = (b"content-type", b"application/json")
EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
encode = msgspec.json.Encoder().encode
log = logging.getLogger("kernelm.gateway")


class Gone(Exception):
    """The client has left: nobody is there to be told."""


class Exchange:
    """Reads a request, and answers it once: whole, as a stream of events, or with a fault."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self._begun, self._writing = False, 0.0  # has an answer begun; since when a write waits
        self._chunk: Callable[[bytes], bool] | None = scope.get(CHUNK)

    def header(self, name: str) -> str:
        """The first header of that name (lower case), or ""."""
        wanted = name.encode()
        for key, value in self.scope["headers"]:
            if key == wanted:
                return str(value, "latin-1")
        return ""

    @property
    def authorization(self) -> str:
        return self.header("authorization")

    @property
    def wanted_s(self) -> float:
        """The seconds within which the client wants its whole answer (`Kernelm-Timeout`), 0 if it does not say. ClientFault
        "invalid"."""
        text = self.header(TIMEOUT)
        try:
            seconds = float(text or 0)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds <= LONGEST_S and text:
            raise ClientFault("invalid", f"{TIMEOUT}: {text[:40]!r} are no seconds from 0 to {LONGEST_S:g}",
                              "send a number, as 2.5", param=TIMEOUT)  # fmt: skip
        return seconds

    @contextlib.asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """Cancels what is done inside after so long: KernelFault "timeout". A client that was not taking what it got is dropped."""
        try:
            async with asyncio.timeout(seconds) as deadline:
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            if self._writing:
                self._drop()
                raise Gone from None
            raise KernelFault("timeout", f"the whole answer took longer than {seconds:g} s", f"ask for less, or send the header "
                              f"{TIMEOUT} with more seconds", retriable=True) from None  # fmt: skip

    def _drop(self) -> None:
        """End the connection with whatever waits to be sent: else that would wait for the client for ever."""
        if (abort := self.scope.get(ABORT)) is not None:
            abort()

    async def body(self, limit: int) -> bytes:
        """All of it; ClientFault "too_large" as soon as it is known to be over `limit` bytes, "timeout" if it does not come."""
        size = self.header("content-length")
        if size.isdecimal() and int(size) > limit:
            raise too_large(limit)
        message = await self._receive()
        parts = [self._part(message)]
        if message.get("more_body"):
            try:
                async with asyncio.timeout(BODY_S):
                    while message.get("more_body") and sum(map(len, parts)) <= limit:
                        message = await self._receive()
                        parts.append(self._part(message))
            except TimeoutError:
                raise ClientFault("timeout", f"the body did not arrive within {BODY_S:g} s", "send it faster") from None
        body = b"".join(parts)
        if len(body) > limit:
            raise too_large(limit)
        return body

    @staticmethod
    def _part(message: MutableMapping[str, Any]) -> bytes:
        if message["type"] == "http.disconnect":
            raise Gone
        part: bytes = message.get("body", b"")
        return part

    async def reply(self, struct: msgspec.Struct) -> None:
        """200 with the struct as JSON."""
        await self._whole(200, encode(struct), ())

    async def _whole(self, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self._begun = True
        length = (b"content-length", str(len(body)).encode())
        await self._send({"type": "http.response.start", "status": status, "headers": [JSON, length, *headers]})
        await self._send({"type": "http.response.body", "body": body})

    async def write(self, events: bytes) -> None:
        """Server-sent events, the first of which begin the answer. Waits while the client's buffers are full."""
        if self._begun and events and self._chunk is not None and self._chunk(events):  # a chunk of nothing would end the answer
            return
        await self._part_of_answer(events, True)

    async def end(self, events: bytes = b"") -> None:
        """The last events."""
        await self._part_of_answer(events, False)

    async def _part_of_answer(self, events: bytes, more: bool) -> None:
        if not self._begun:
            self._begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(EVENTS)})
        self._writing = time.monotonic()
        await self._send({"type": "http.response.body", "body": events, "more_body": more})
        self._writing = 0.0

    async def refuse(self, error: Exception) -> None:
        """The fault in OpenAI's form: as the answer, or as the last event of one that has begun."""
        fault = self._fault(error)
        body = encode(faults.http_body(fault))
        if self._begun:
            await self.end(b"data: " + body + b"\n\n")
            return
        headers = tuple((k.lower().encode(), v.encode()) for k, v in faults.http_headers(fault).items())
        if allow := fault.details.get("allow"):
            headers += ((b"allow", allow.encode()),)
        await self._whole(faults.http_status(fault), body, headers)

    def _fault(self, error: Exception) -> Fault:
        if isinstance(error, Fault):
            return error
        log.exception("%s %s failed", self.scope["method"], self.scope["path"], exc_info=error)
        return faults.of_bug()

    @contextlib.asynccontextmanager
    async def while_there(self) -> AsyncIterator[None]:
        """Cancels what is done inside, and raises Gone, as soon as the client has left, or takes nothing for STALLED_S."""
        work, loop, left = asyncio.current_task(), asyncio.get_running_loop(), False
        assert work is not None

        def leave() -> None:
            nonlocal left
            left = True
            work.cancel()

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            leave()

        def look() -> None:  # now and then: a timer for each write would cost more than the write
            nonlocal looking
            if self._writing and time.monotonic() - self._writing > STALLED_S:
                self._drop()
                leave()
            else:
                looking = loop.call_later(STALLED_S / 4, look)

        watching, looking = asyncio.create_task(watch()), loop.call_later(STALLED_S / 4, look)
        try:
            yield
        except asyncio.CancelledError:
            if not left or work.uncancel() > 0:
                raise
            raise Gone from None
        finally:
            watching.cancel()
            looking.cancel()


def too_large(limit: int) -> ClientFault:
    return ClientFault("too_large", "the request is too large", f"send at most {limit} bytes a request, in several requests")


def read(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """The request; ClientFault "invalid" whose `param` is the field at fault."""
    if not body.strip():
        raise ClientFault("invalid", "the body is empty", "send an object in UTF-8")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        param = path.strip("`.")
        if unknown := re.search(r"unknown field `(.+)`", what):
            param = f"{param}.{unknown[1]}" if param else unknown[1]
        raise ClientFault("invalid", f"{param or 'the request'}: {what}", "see /docs", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ClientFault("invalid", f"the body is no JSON: {error}", "send an object in UTF-8") from None
