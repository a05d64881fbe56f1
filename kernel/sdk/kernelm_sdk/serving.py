"""The serving side of a call: dispatch to handlers, faults as answers, streams within their credit, fencing."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from kernelm_sdk.contract import CONTRACTS, Method
from kernelm_sdk.errors import ClientFault, Fault, KernelFault, PluginFault, invalid
from kernelm_sdk.system import Dispatch

if TYPE_CHECKING:
    from kernelm_sdk.bus import Bus

ERROR, ERROR_CODE = "Nats-Service-Error", "Nats-Service-Error-Code"  # ADR-32, so that the stock tool shows faults
DEADLINE, LAST, MOVED = "Kernelm-Deadline", "Kernelm-Last", "Kernelm-Moved"
BUCKETS = 24  # of the latency histogram: up to 2**23 / 16 ms, nearly nine minutes
LATEST_S = 120.0  # after which a message that waited in a frozen process or a full buffer is not expected any more
WINDOW = 64  # frames of a stream in flight; the consumer grants more at every half
log = logging.getLogger("kernelm.serving")
encode = msgspec.json.Encoder().encode


class Direct(asyncio.Queue[Any]):
    """In place of a nats-py subscription's queue: hands each message over at once. The queue and the task behind it cost
    a turn of the event loop on both sides of every call, and would handle one message after another."""

    def __init__(self, deliver: Callable[[Any], None]) -> None:
        super().__init__()
        self._deliver = deliver

    def put_nowait(self, item: Any) -> None:
        self._deliver(item)

    @classmethod
    def replace(cls, subscription: Any, deliver: Callable[[Any], None]) -> None:
        """Deliver what waits already, then everything that comes."""
        waiting = subscription._pending_queue
        subscription._pending_queue = cls(deliver)
        while not waiting.empty():
            deliver(waiting.get_nowait())


class Reader(asyncio.Queue[Any]):
    """What the reader of a stream says. When it cancels or is gone, the work on the stream is cancelled at once, also where it
    has no frame to send for long."""

    def __init__(self) -> None:
        super().__init__()
        self.gone, self._work = False, asyncio.current_task()

    def put_nowait(self, item: Any) -> None:
        if isinstance(item, Fault) or item.data == b"cancel" or (item.headers or {}).get("Status") == "503":
            self.gone = True
            if self._work is not None:
                self._work.cancel()
        else:
            super().put_nowait(item)


class Frames(asyncio.Queue[Any]):
    """What comes of a stream, for its one reader, who gets the fault `late` after waiting `idle_s` for the next message. One timer
    looks after the whole stream: to set and cancel one for each message costs more than to read it."""

    _queue: deque[Any]  # of the base class

    def __init__(self, idle_s: float, late: Fault) -> None:
        super().__init__()
        self._idle_s, self._late, self._loop = idle_s, late, asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None  # who waits, and since when
        self._since = 0.0
        self._timer = self._loop.call_later(idle_s, self._look)

    def put_nowait(self, item: Any) -> None:
        self._queue.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Any:
        while not self._queue:
            self._since, self._reader = self._loop.time(), self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._queue.popleft()

    def _look(self) -> None:
        waited = 0.0 if self._reader is None else self._loop.time() - self._since
        if waited >= self._idle_s:
            self.put_nowait(self._late)
            waited = 0.0
        self._timer = self._loop.call_later(self._idle_s - waited, self._look)

    def close(self) -> None:
        """Nobody reads any more."""
        self._timer.cancel()


class Served:
    """What one instance serves. `fence()` ends it without losing a message."""

    def __init__(self, bus: "Bus", handlers: dict[str, tuple[Method, Callable[..., Any]]], models: tuple[str, ...],
                 make_call: Callable[..., Any] | None) -> None:  # fmt: skip
        from kernelm_sdk.plugin import Call

        self.subscriptions: list[Any] = []
        self.answered = self.failed = 0
        self.latency = [0] * BUCKETS  # as in `Probe.latency`
        self.in_flight = 0  # calls being answered
        self._busy_s = self._busy_since = 0.0
        self.absent: Callable[[str, str], Fault] = _absent  # (model, caller) -> what a call of a model not served here is told
        self.tasks: set[asyncio.Task[None]] = set()
        self._bus, self._models, self._make_call = bus, models, make_call or Call
        self._handlers: dict[tuple[str, str, str], tuple[Method, Callable[..., Any], msgspec.json.Decoder[Any]]] = {}
        for key, (method, handler) in handlers.items():
            entry = (method, handler, msgspec.json.Decoder(Dispatch if method.kind == "job" else method.request))
            contract, version, name = key.split(".")
            self._handlers[contract, version, name] = entry
            if method.scope == "model":
                self._handlers["model", "", name] = entry

    def on_message(self, msg: Any) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(msg))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    @property
    def busy_s(self) -> float:
        """Time in which at least one call was being answered."""
        return self._busy_s + (time.perf_counter() - self._busy_since if self.in_flight else 0.0)

    async def _answer(self, msg: Any) -> None:
        begun, tokens = time.perf_counter(), msg.subject.split(".")
        work = tokens[2:3] != ["plugin"]  # the verbs are no work: who watches a pool must not see itself
        if work and not self.in_flight:
            self._busy_since = begun
        self.in_flight += work
        try:
            await self._handle(msg, tokens)
        finally:
            self.in_flight -= work
            if work and not self.in_flight:
                self._busy_s += time.perf_counter() - self._busy_since
        if work:
            self.answered += 1
            self.latency[min(int((time.perf_counter() - begun) * 16e3).bit_length(), BUCKETS - 1)] += 1

    async def _handle(self, msg: Any, tokens: list[str]) -> None:
        try:
            _, _, contract, version, name, caller = tokens
            model = version if contract == "model" else ""
            entry = self._handlers.get((contract, "" if model else version, name))
            if model and model not in self._models:
                raise self.absent(model, caller)
            if entry is None:
                raise ClientFault("unsupported_method", f"{msg.subject}: not served here")
            method, handler, decoder = entry
            # a deadline that is older than a message can wait is a sign of a wrong clock, of which nobody may die
            if msg.headers and (deadline := msg.headers.get(DEADLINE)) and 0 < time.time() - _seconds(deadline) < LATEST_S:
                raise KernelFault("timeout", f"{name}: the caller's deadline has passed", retriable=True)
            try:
                request = decoder.decode(msg.data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise invalid(f"{name}: the request", error) from None
            call = self._make_call(caller, model, msg.headers)
            if method.kind == "streamed":
                reply = await self._stream(msg, handler(request, call))
            else:
                reply = await handler(request, call)
                if msg.reply:
                    await self._bus._client.publish(msg.reply, encode(reply))
            if model:
                self._bus.meter.note(model, reply, caller=caller)
        except Exception as error:
            if tokens[2:3] == ["model"] and len(tokens) == 6:
                self._bus.meter.note(tokens[3], caller=tokens[5])
            self.failed += not isinstance(error, ClientFault)
            await self._refuse(msg, error)

    async def _refuse(self, msg: Any, error: Exception) -> None:
        if not isinstance(error, Fault):  # a bug: its text stays here, since it may hold what callers must not see
            log.exception("%s failed", msg.subject, exc_info=error)
            error = PluginFault("internal", f"the handler of {msg.subject.split('.')[-2]} failed with {type(error).__name__}",
                                "see the log of the instance")  # fmt: skip
        if msg.reply:
            line = error.message.splitlines()[0][:200] if error.message else error.code
            headers = {ERROR: line.encode("ascii", "replace").decode(), ERROR_CODE: str(error.http_status)}
            await self._bus._client.publish(msg.reply, encode(error.body()), headers=headers)

    async def _stream(self, msg: Any, frames: AsyncIterator[Any]) -> Any:
        """Send frames within the consumer's credit; a consumer that is gone (no responders) or cancels stops the work. The last
        frame."""
        bus, token, target = self._bus, self._bus._token(), msg.reply
        link, left, reader = bus._link, list[Any](), Reader()
        bus._waiting[token] = (target, reader, link)
        sent = acknowledged = 0
        frame = None
        try:
            async for frame in frames:
                if bus._link is not link:  # the connection was renewed: acknowledgements are asked for on the new one
                    await link.barrier()  # or this frame might overtake the one before
                    link.held.add(token)
                    left.append(link)
                    link = bus._link
                    bus._waiting[token] = (target, reader, link)
                await link.client.publish(target, encode(frame), reply=f"{link.inbox}.{token}")
                if not sent:  # the first one leaves now, also where the handler makes more of them without a pause
                    await asyncio.sleep(0)
                sent += 1
                while not reader.empty() or sent - acknowledged >= WINDOW:
                    answer = await asyncio.wait_for(reader.get(), 60.0)
                    acknowledged = max(acknowledged, int(answer.data))
                    if answer.subject.startswith(link.inbox):  # all frames that named an older one are read
                        while left:
                            left.pop().held.discard(token)
                    if answer.reply and answer.reply != target:  # the consumer's connection was renewed
                        await link.client.publish(target, b"", headers={MOVED: str(sent)})
                        target = answer.reply
            await link.client.publish(target, b"", headers={LAST: str(sent)})
        except asyncio.CancelledError:
            if not reader.gone:
                raise
        finally:
            bus._waiting.pop(token, None)
            for old in left:
                old.held.discard(token)
            if (close := getattr(frames, "aclose", None)) is not None:
                await close()
        return frame

    async def fence(self, deadline_s: float = 30.0, keep_instance: bool = False) -> bool:
        """Unsubscribe, and let what was delivered be answered. With `keep_instance` the instance's own subjects stay open
        (drain). True if all was answered in time."""
        ending = [s for s in self.subscriptions if not keep_instance or s.subject.startswith("impl.")]
        await self._bus.unsubscribe(*ending)
        self.subscriptions = [s for s in self.subscriptions if s not in ending]
        until = time.monotonic() + deadline_s
        while self.tasks and time.monotonic() < until:
            await asyncio.wait(list(self.tasks), timeout=0.05)
        return not self.tasks


def _absent(model: str, caller: str) -> Fault:
    return ClientFault("unknown_model", f"model {model!r} is not served here", retriable=True)


def _seconds(deadline: str) -> float:
    try:
        return float(deadline)
    except ValueError:
        raise ClientFault("invalid", f"{DEADLINE}: {deadline[:40]!r} is no number", "give Unix seconds") from None


def handlers_of(implementation: Any, *contracts: str) -> dict[str, tuple[Method, Callable[..., Any]]]:
    """The handlers of an object that implements whole contracts (a service), for `Bus.serve`."""
    return {f"{c.name}.v{c.major}.{m.name}": (m, getattr(implementation, m.attribute))
            for c in map(CONTRACTS.__getitem__, contracts) for m in c.methods.values()}  # fmt: skip
