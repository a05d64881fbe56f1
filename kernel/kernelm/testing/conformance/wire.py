"""Raw exchanges with a plugin, below the SDK's own decoding: what was sent, and every message that came back."""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import msgspec

from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault, FaultBody
from kernelm_sdk.serving import ERROR, ERROR_CODE, LAST

SHOWN = 600  # characters of a body in a report


class Reply(msgspec.Struct, frozen=True):
    """One message that came back."""

    body: bytes
    headers: dict[str, str]
    at: float  # monotonic, s

    @property
    def is_fault(self) -> bool:
        """It says so in its headers."""
        return ERROR_CODE in self.headers


class Exchange(msgspec.Struct):
    """A request, and what came back for it."""

    subject: str
    request: bytes
    replies: list[Reply] = []
    problem: str = ""  # instead of an answer: no responders, a time-out, a denial
    took_s: float = 0.0

    @property
    def fault(self) -> FaultBody | None:
        """The fault that it was answered with; None for a result, and for what is no well-formed fault."""
        if not self.replies or not self.replies[-1].is_fault:
            return None
        try:
            return msgspec.json.decode(self.replies[-1].body, type=FaultBody)
        except msgspec.DecodeError:
            return None

    @property
    def body(self) -> Any:
        """The answer, decoded; ValueError where it is no JSON."""
        return msgspec.json.decode(self.replies[-1].body)

    @property
    def answered(self) -> bool:
        """With a result."""
        return bool(self.replies) and not self.replies[-1].is_fault

    @property
    def text(self) -> str:
        """For people: both sides, cut to a readable length."""
        lines = [f"-> {self.subject}  {_cut(self.request)}"]
        lines += [f"<- {_headers(r.headers)}{_cut(r.body)}" for r in self.replies[:5]]
        if self.problem:
            lines.append(f"<- {self.problem}")
        return "\n".join(lines)


class Wire:
    """Speaks to one instance under the identity of `bus`. All that was exchanged is kept in `seen`."""

    def __init__(self, bus: Bus, instance: str, pool: str) -> None:
        self.bus, self.instance, self.pool = bus, instance, pool
        self.seen: list[Exchange] = []

    def subject(self, contract: str, method: str, *, model: str = "", pool: bool = False) -> str:
        """Where a method of `name/major` is called on the instance, or with `pool` on its pool."""
        name, _, major = contract.partition("/")
        tail = f"model.{model}.{method}" if model else f"{name}.v{major}.{method}"
        return (f"impl.{self.pool}." if pool else f"inst.{self.instance}.") + f"{tail}.{self.bus.user}"

    async def ask(self, subject: str, body: Any, *, headers: dict[str, str] | None = None, timeout_s: float = 20.0) -> Exchange:
        """One request (bytes as they are, all else as JSON) and its answer, or the end of a stream."""
        (exchange,) = await self.ask_all([(subject, body)], headers=headers, timeout_s=timeout_s)
        return exchange

    async def ask_all(self, requests: Iterable[tuple[str, Any]], *, headers: dict[str, str] | None = None, timeout_s: float = 20.0,
                      linger_s: float = 0.0) -> list[Exchange]:  # fmt: skip
        """Requests sent one right behind the other, in this order; `linger_s` waits for what should not come."""
        bus, link, waiting = self.bus, self.bus._link, list[tuple[str, Exchange, asyncio.Queue[Any]]]()
        began = time.monotonic()
        try:
            for subject, body in requests:
                raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
                token, queue, exchange = bus._token(), asyncio.Queue[Any](), Exchange(subject, raw, [])
                bus._waiting[token] = (subject, queue, link)
                waiting.append((token, exchange, queue))
                self.seen.append(exchange)
                await link.client.publish(subject, raw, reply=f"{link.inbox}.{token}", headers=headers)
            await asyncio.gather(*(self._collect(e, q, began + timeout_s) for _, e, q in waiting))
            if linger_s:
                await asyncio.sleep(linger_s)
                for _, exchange, queue in waiting:
                    while not queue.empty():
                        self._take(exchange, queue.get_nowait())
        finally:
            for token, _, _ in waiting:
                bus._waiting.pop(token, None)
        return [exchange for _, exchange, _ in waiting]

    async def _collect(self, exchange: Exchange, queue: "asyncio.Queue[Any]", until: float) -> None:
        began, credit, count = time.monotonic(), "", 0
        while True:
            try:
                msg = await asyncio.wait_for(queue.get(), max(until - time.monotonic(), 0.01))
            except TimeoutError:
                exchange.problem = f"no answer within {time.monotonic() - began:.1f} s"
                break
            if not self._take(exchange, msg):
                break
            credit, count = msg.reply, count + 1
            if not credit or exchange.replies[-1].is_fault or LAST in exchange.replies[-1].headers:
                break  # unary, or the end of a stream
            if count % 32 == 0:
                await self.bus._link.client.publish(credit, str(count).encode())
        exchange.took_s = time.monotonic() - began

    def _take(self, exchange: Exchange, msg: Any) -> bool:
        if isinstance(msg, Fault):
            exchange.problem = str(msg)
            return False
        headers = dict(msg.headers or {})
        if headers.get("Status") == "503":
            exchange.problem = "no responders"
            return False
        exchange.replies.append(Reply(msg.data, headers, time.monotonic()))
        return True


def _cut(raw: bytes) -> str:
    text = raw.decode("utf-8", "backslashreplace")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(raw):,} bytes)"


def _headers(headers: dict[str, str]) -> str:
    shown = {k: v for k, v in headers.items() if k in (ERROR, ERROR_CODE, LAST)}
    return f"{shown} " if shown else ""
