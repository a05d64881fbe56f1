"""`GET /v1/events`: what happens, as server-sent events, as far as a key may know.

An administrator's key sees all. Another one sees what concerns its tenant's jobs and runs, and the deployments that it was
granted. Who reads too slowly is disconnected and told so. Who comes again with `Last-Event-ID` first gets what it has missed, at
most of the last hour: the id of an event is when it was published and its CloudEvents id, by which it is found in the stream.
Sources: HTML Living Standard, "Server-sent events"; CloudEvents 1.0, JSON format.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs

import msgspec

from kernelm_contracts.jobs import JobName, JobRecord, Jobs, RunName, RunView
from kernelm_gateway.exchange import Exchange, encode
from kernelm_gateway.gate import Gate
from kernelm_gateway.keys import sees
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.events import Received, received
from kernelm_sdk.system import Key

BACKLOG = 1000  # events that wait for one listener
QUIET_S = 10.0  # without an event for so long a comment is sent, so that nobody takes the connection for dead
REMEMBERED = 10_000  # jobs and runs whose tenants are known
MISSED_S = 3600.0  # events older than that are not sent again
SKEW_S = 5.0  # by which the clocks of publishers and broker may differ
OF_MODELS = ("model.deployed", "model.scaled", "model.loading")


class EventMessage(msgspec.Struct, frozen=True):
    """The data of one event: CloudEvents' JSON form."""

    type: str  # "job.state"
    source: str  # who published it
    id: str
    time: str  # RFC 3339, UTC
    data: Any  # the event's own fields
    specversion: str = "1.0"


class Feed:
    """One subscription of this gateway, shared by all listeners."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._listeners: set[asyncio.Queue[Received | None]] = set()
        self._subscription: Any = None
        self._changing = asyncio.Lock()
        self._tenants: dict[str, str] = {}  # job or run -> tenant

    async def _heard(self, event: Received) -> None:
        for listener in self._listeners:
            if listener.qsize() < BACKLOG:
                listener.put_nowait(event)
            elif listener.qsize() == BACKLOG:
                listener.put_nowait(None)  # the last it gets

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[asyncio.Queue[Received | None]]:
        """A queue with all events from now on; None in it: it was too slow, and there are no more."""
        listener: asyncio.Queue[Received | None] = asyncio.Queue()
        async with self._changing:
            if self._subscription is None:
                self._subscription = await self._gate.bus.follow(self._heard)
            self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            async with self._changing:
                if not self._listeners and self._subscription is not None:
                    subscription, self._subscription = self._subscription, None
                    await subscription.unsubscribe()

    async def missed(self, at: float, identifier: str) -> AsyncIterator[Received]:
        """The stored events behind that one, which was published at `at` (Unix seconds); all since then if it is not kept."""
        found = False
        for since in (at - SKEW_S, at):
            async for _, subject, body, headers in self._gate.bus.read("EVT", since=since):
                event = received(subject, body, headers)
                if found or since == at:
                    yield event
                found = found or event.id == identifier
            if found:
                return

    async def concerns(self, key: Key, event: Received) -> bool:
        """Whether `key` may know of it."""
        if key.admin:
            return True
        told: Any = event.event  # None: of a type that this gateway does not know
        if event.type in OF_MODELS:
            return told is not None and sees(key, told.model)
        for subject in ("job", "run"):
            if identifier := getattr(told, subject, ""):
                tenant = getattr(told, "tenant", "") or await self._tenant(subject, identifier)
                self._remember(identifier, tenant)
                return bool(tenant == key.tenant)
        return False

    def _remember(self, identifier: str, tenant: str) -> None:
        if tenant:
            if len(self._tenants) >= REMEMBERED:
                self._tenants.clear()
            self._tenants[identifier] = tenant

    async def _tenant(self, subject: str, identifier: str) -> str:
        """Whose job or run it is; "" where nobody knows."""
        if identifier in self._tenants:
            return self._tenants[identifier]
        try:
            if subject == "job":
                job: JobRecord = await self._gate.bus.call(Jobs.get, JobName(identifier), timeout_s=5.0)
                return job.spec.tenant
            run: RunView = await self._gate.bus.call(Jobs.get_run, RunName(identifier), timeout_s=5.0)
            return run.run.spec.tenant
        except Fault:  # it is gone, or the job table is away: nobody but administrators is told of it
            return ""


async def events(feed: Feed, gate: Gate, key: Key, exchange: Exchange) -> None:
    """Send events until the client leaves or its key is good no more. `?type=job.state&type=model.deployed`: only those. With the
    header `Last-Event-ID`, first those behind that one."""
    if not key.admin and not {"*", "events"} & set(key.methods):
        raise ClientFault("permission_denied", f"API key {key.id} ({key.name}) may not follow events",
                          'ask for a key whose methods name "events"')  # fmt: skip
    wanted = frozenset(parse_qs(exchange.scope["query_string"].decode("ascii", "replace")).get("type", ()))
    at, identifier = _position(exchange.header("last-event-id"))
    sent = set[str]()

    async def tell(event: Received) -> None:
        if (not wanted or event.type in wanted) and await feed.concerns(await gate.identify(exchange.authorization), event):
            await exchange.write(_message(event))

    async with exchange.while_there(), feed.listening() as heard:
        await exchange.write(b": listening\n\n")
        if identifier:
            async for event in feed.missed(max(at, time.time() - MISSED_S), identifier):
                sent.add(event.id)
                await tell(event)
        while True:
            try:
                async with asyncio.timeout(QUIET_S):
                    event = await heard.get()
            except TimeoutError:
                await gate.identify(exchange.authorization)
                await exchange.write(b":\n\n")
                continue
            if event is None:
                raise ClientFault("too_slow", f"{BACKLOG} events wait for this client", "connect again, and read faster")
            if event.id not in sent:
                await tell(event)


def _position(last: str) -> tuple[float, str]:
    """When the event of a `Last-Event-ID` was published, in Unix seconds, and its CloudEvents id; "" for none. ClientFault
    "invalid"."""
    stamp, _, identifier = last.partition(" ")
    try:
        return (datetime.fromisoformat(stamp).timestamp() if last else 0.0), identifier
    except ValueError:
        raise ClientFault("invalid", f"Last-Event-ID: {last[:64]!r} is no id of an event", "send one as it came, or none",
                          param="Last-Event-ID") from None  # fmt: skip


def _message(event: Received) -> bytes:
    data = EventMessage(event.type, event.source, event.id, event.time, msgspec.Raw(event.body))
    return f"event: {event.type}\nid: {event.time} {event.id}\ndata: ".encode() + encode(data) + b"\n\n"
