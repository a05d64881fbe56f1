"""The bus: calls, streams and subscriptions over NATS. The only file that imports nats.

Requests use an inbox of our own in place of nats-py's: a permission violation arrives on the connection and not as a
reply, and must become the error of the very call that was denied; a lost connection must fail the calls in flight at
once; and one call may have many replies (streams, reading a bucket).
"""

import asyncio
import logging
import re
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import msgspec
import nats
from nats.aio.msg import Msg

from kernelm_sdk.contract import TOKEN, Method, method_of
from kernelm_sdk.errors import ClientFault, Fault, FaultBody, KernelFault, PluginFault, from_body
from kernelm_sdk.links import Credentials, Link, Refusals, Subscription
from kernelm_sdk.records import Bucket, Storage
from kernelm_sdk.serving import DEADLINE, ERROR, ERROR_CODE, LAST, MOVED, WINDOW, Direct, Frames, Served, encode, handlers_of
from kernelm_sdk.system import Dispatch

DEFAULT_TIMEOUT_S = 30.0
SETTLE_S = 0.1  # a message that the broker matched before a subscription was there may be on its way for so long; the broker
# tries the next member of a queue group for it, and drops it where there is none
log = logging.getLogger("kernelm.bus")


class Bus(Storage):
    """One identity on the bus. Make it with `await Bus.connect(...)`, end it with `await bus.close()`."""

    def __init__(self, url: str, user: str, tls: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self.user, self.boot = user, secrets.token_hex(16)  # of events, which are numbered per source and boot
        self.reconnected: list[Callable[[], Awaitable[None]]] = []
        self.ended = asyncio.Event()  # `closed`, for those who wait for it
        self._url, self._tls = url, tls
        self._link: Link
        self._client: Any  # of the link, as is
        self._waiting: dict[str, tuple[str, asyncio.Queue[Msg | Fault] | asyncio.Future[Msg], Link]] = {}  # token -> subject, sink
        self._next, self._random = 0, ""
        self._methods: dict[Any, tuple[Method, msgspec.json.Decoder[Any]]] = {}
        self._subjects: dict[tuple[Any, str, str], str] = {}
        self._denied: dict[str, str] = {}
        self._subscriptions: list[Subscription] = []
        self._changing = asyncio.Lock()  # subscriptions and connections change one at a time
        self._retiring: dict[Link, asyncio.Task[None]] = {}
        self._guards: set[asyncio.Task[None]] = set()

    # ---- connection ----
    @classmethod
    async def connect(cls, url: str, credentials: Credentials, *, tls: ssl.SSLContext | None = None,
                      timeout_s: float = 10.0) -> "Bus":  # fmt: skip
        """Connect, or KernelFault "broker_unreachable" / ClientFault "unauthorized", "bad_certificate" within `timeout_s`. A
        "tls://" URL is TLS from the first byte, with the certificates of the environment (tls.py) if none are given."""
        bus = cls(url, credentials.user, tls)
        bus._use(await bus._open(credentials, timeout_s))
        return bus

    async def _open(self, credentials: Credentials, timeout_s: float) -> Link:
        link, refusals = Link(nats.NATS(), credentials), Refusals()

        async def on_error(error: Exception) -> None:
            self._on_error(error)
            if refusals.note(error):  # nats-py would try for ever, and its member be a ghost until its patience ends
                await link.close(0)

        async def on_disconnect() -> None:
            link.lost()
            self._lost(link, "the connection to the broker was lost before the answer came")

        async def on_reconnect() -> None:
            refusals.clear()
            for callback in self.reconnected if link is self._link else ():
                await callback()

        try:
            await link.connect(
                self._url, timeout_s, name=self.user, user_jwt_cb=link.jwt, signature_cb=link.sign, inbox_prefix=link.inbox,
                tls=self._tls, hopeless=refusals.hopeless,
                skip_subject_validation=True,  # subjects are made of checked tokens: see `_subject`
                max_reconnect_attempts=-1, reconnect_time_wait=0.1, ping_interval=1, max_outstanding_pings=3,
                error_cb=on_error, disconnected_cb=on_disconnect, reconnected_cb=on_reconnect,
            )
        except Exception as error:
            await link.close()
            raise refusals.fault(error, self._url, self.user) from None
        refusals.clear()
        Direct.replace(await link.client.subscribe(f"{link.inbox}.*", pending_bytes_limit=0), self._on_reply)
        guard = asyncio.create_task(self._guard(link))
        self._guards.add(guard)
        guard.add_done_callback(self._guards.discard)
        return link

    async def _guard(self, link: Link) -> None:
        """What waits on a connection that is closed for good waits for nothing."""
        await link.gone.wait()
        self._lost(link, "the connection to the broker is closed")
        if link is self._link:
            self.ended.set()

    def _use(self, link: Link) -> None:
        self._link, self._client, self.credentials = link, link.client, link.credentials

    async def close(self) -> None:
        """Flush what was published and disconnect."""
        for subscription in self._subscriptions:
            subscription.stop()
        for task in (*self._retiring.values(), *self._guards):
            task.cancel()
        for link in [*self._retiring, self._link]:
            await link.close()

    @property
    def closed(self) -> bool:
        """For good: closed by us, or shut out by the broker (expired or revoked)."""
        return bool(self._client.is_closed)

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    async def renewed(self, credentials: Credentials, overlap_s: float = 60.0) -> None:
        """Go on under a new JWT, on a connection of its own; nothing is lost and nothing handled twice. What waits for an
        answer on the old connection gets it there within `overlap_s`, if the old JWT and key are good for so long."""
        link = await self._open(credentials, 10.0)
        async with self._changing:
            try:
                for subscription in self._subscriptions:
                    self._denied.pop(subscription.subject.lower(), None)
                    await subscription.open(link, moving=True)
                await link.barrier()
                if denied := [s.subject for s in self._subscriptions if s.subject.lower() in self._denied]:
                    raise ClientFault("permission_denied", f"{self.user!r} may no longer subscribe to {', '.join(denied)}")
            except BaseException:
                for subscription in self._subscriptions:
                    subscription.left(link)
                await link.close()
                raise
            old = self._link
            self._use(link)
            if not all(s.queue for s in self._subscriptions):
                await asyncio.sleep(SETTLE_S)
            await self._leave(old, self._subscriptions)
        self._retiring[old] = asyncio.create_task(self._retire(old, overlap_s))

    async def _leave(self, link: Link, subscriptions: Iterable[Subscription]) -> None:
        for subscription in subscriptions:
            await subscription.leave(link)
        try:
            if link.client.is_connected:
                await link.barrier()
        except KernelFault as fault:
            log.warning("%s: %s", self.user, fault.message)  # then nothing more comes from there either
        for subscription in subscriptions:
            subscription.left(link)

    async def _retire(self, link: Link, overlap_s: float) -> None:
        """Close a connection that was replaced, once nothing waits there."""
        until = time.monotonic() + overlap_s
        while link.client.is_connected and time.monotonic() < until:
            if not link.held and all(on is not link for _, _, on in self._waiting.values()):
                break
            await asyncio.sleep(0.02)
        self._lost(link, "the connection to the broker was renewed, and the answer did not come in time")
        await link.close()
        self._retiring.pop(link, None)

    def _on_error(self, error: Exception) -> None:
        denied = re.search(r"permissions violation for (\w+) to \"([^\"]+)\"", str(error), re.IGNORECASE)
        if not denied:
            log.warning("broker: %s", str(error) or type(error).__name__)
            return
        what, subject = denied[1], denied[2]  # nats-py gives the broker's text in lower case
        self._denied[subject] = what
        fault = ClientFault("permission_denied", f"{self.user!r} may not {what.replace('ion', 'e').replace('publishe', 'publish')} "
                            f"{subject!r}", "ask for a key or a manifest that grants it")  # fmt: skip
        # the broker names the subject after mapping: impl.<pool>.<tail> for a call that was made on [svc.]<tail>
        tail = subject.split(".", 2)[2] if subject.startswith("impl.") else ""
        for token, (wanted, _, _) in list(self._waiting.items()):
            if subject == wanted.lower() or (tail and tail == wanted.removeprefix("svc.")):
                self._fail(token, fault)

    def _lost(self, link: Link, why: str) -> None:
        fault = KernelFault("disconnected", why, retriable=True)
        for token in [token for token, (_, _, on) in self._waiting.items() if on is link]:
            self._fail(token, fault)

    # ---- requests ----

    def _fail(self, token: str, fault: Fault) -> None:
        _, sink, _ = self._waiting.pop(token, ("", None, None))
        if isinstance(sink, asyncio.Queue):
            sink.put_nowait(fault)
        elif sink is not None and not sink.done():
            sink.set_exception(fault)

    def _expire(self, token: str, after_s: float) -> None:
        if entry := self._waiting.get(token):
            self._fail(token, KernelFault("timeout", f"no answer on {entry[0]} within {after_s:.3g} s", retriable=True))

    def _on_reply(self, msg: Msg) -> None:
        token = msg.subject.rpartition(".")[2]
        _, sink, _ = self._waiting.get(token, ("", None, None))
        if isinstance(sink, asyncio.Queue):
            sink.put_nowait(msg)
        elif sink is not None and not sink.done():
            sink.set_result(msg)
        elif sink is None and msg.reply.startswith("_INBOX."):  # a frame for a reader who left before its first one
            self._guards.add(late := asyncio.ensure_future(self._client.publish(msg.reply, b"cancel")))
            late.add_done_callback(self._guards.discard)

    def _token(self) -> str:
        """A name for a request in the inbox. Who is asked learns it, and the inbox with it, and must not guess the next."""
        at = self._next % 256 * 16
        if at == 0:
            self._random = secrets.token_hex(2048)
        self._next += 1
        return f"{self._next:x}{self._random[at : at + 16]}"

    async def request(self, subject: str, body: bytes, timeout_s: float, headers: dict[str, str] | None = None) -> Msg:
        """One raw request and its one reply; faults: "no_responders", "timeout", "permission_denied", "disconnected"."""
        token, link = self._token(), self._link
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Msg] = loop.create_future()
        self._waiting[token] = (subject, future, link)
        timer = loop.call_later(timeout_s, self._expire, token, timeout_s)
        try:
            await link.client.publish(subject, body, reply=f"{link.inbox}.{token}", headers=headers)
            msg = await future
        except nats.errors.Error as error:
            raise _of_nats(error, subject) from None
        finally:
            timer.cancel()
            self._waiting.pop(token, None)
        _raise_if_fault(msg, subject)
        return msg

    def resolve(self, declared: Any) -> tuple[Method, msgspec.json.Decoder[Any]]:
        """The method behind a contract's attribute, with the decoder of its replies."""
        entry = self._methods.get(declared)
        if entry is None:
            method = declared if isinstance(declared, Method) else method_of(declared)
            entry = self._methods[declared] = (method, msgspec.json.Decoder(method.reply))
        return entry

    def _subject(self, declared: Any, method: Method, model: str, instance: str) -> str:
        key = (declared, model, instance)
        subject = self._subjects.get(key)
        if subject is None:
            for name in filter(None, (model, instance)):
                if not TOKEN.match(name):
                    raise ClientFault("unknown_model" if model else "invalid", f"{name!r} is no name", "use a-z, 0-9 and '-'")
            subject = f"inst.{instance}.{method.tail(self.user, model)}" if instance else method.subject(self.user, model)
            self._subjects[key] = subject
        return subject

    async def call(self, declared: Any, request: msgspec.Struct, *, model: str = "", instance: str = "",
                   timeout_s: float = DEFAULT_TIMEOUT_S, patience_s: float = 0.0,
                   headers: dict[str, str] | None = None) -> Any:  # fmt: skip
        """Call a method: where it is routed, on the deployment `model`, or on one `instance`. Faults of the far side are
        raised here. With `patience_s` a retriable KernelFault is tried again so long, and so is `stale_generation`: for handlers
        that are idempotent."""
        method, decoder = self.resolve(declared)
        subject = self._subject(declared, method, model, instance)
        body, until, pause = encode(request), time.monotonic() + patience_s, 0.05
        while True:
            own = {} if timeout_s == DEFAULT_TIMEOUT_S else {DEADLINE: f"{time.time() + timeout_s:.3f}"}  # of this try alone
            try:
                msg = await self.request(subject, body, timeout_s, {**(headers or {}), **own} or None)
                return decoder.decode(msg.data)
            except (KernelFault, ClientFault) as fault:
                waits = isinstance(fault, KernelFault) or fault.code == "stale_generation"  # the route may be on its way
                if not waits or not fault.retriable or time.monotonic() + pause > until:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def stream(self, declared: Any, request: msgspec.Struct, *, model: str = "", instance: str = "",
                     idle_s: float = DEFAULT_TIMEOUT_S, headers: dict[str, str] | None = None) -> AsyncIterator[Any]:  # fmt: skip
        """The frames of a streamed method, in order. At most WINDOW are in flight; leaving the loop stops the producer."""
        method, decoder = self.resolve(declared)
        subject = self._subject(declared, method, model, instance)
        late = KernelFault("timeout", f"no frame on {subject} within {idle_s:g} s", retriable=True)
        link, token, frames = self._link, self._token(), Frames(idle_s, late)
        moved: tuple[str, Frames] | None = None  # where the frames will come from soon
        self._waiting[token] = (subject, frames, link)
        count, credit = 0, ""
        try:
            await link.client.publish(subject, encode(request), reply=f"{link.inbox}.{token}", headers=headers)
            while True:
                msg = await frames.get()
                if isinstance(msg, Fault):
                    raise msg
                _raise_if_fault(msg, subject)
                if msg.headers and LAST in msg.headers:
                    credit = ""
                    return
                if msg.headers and MOVED in msg.headers and moved:
                    del self._waiting[token]
                    frames.close()
                    (token, frames), moved = moved, None
                    continue
                count, credit = count + 1, msg.reply
                yield decoder.decode(msg.data)
                if credit and not moved and self._link is not link:  # have the rest sent to the new connection
                    link, moved = self._link, (self._token(), Frames(idle_s, late))
                    self._waiting[moved[0]] = (subject, moved[1], link)
                    await link.client.publish(credit, str(count).encode(), reply=f"{link.inbox}.{moved[0]}")
                elif credit and count % (WINDOW // 2) == 0:
                    await self._client.publish(credit, str(count).encode())
        except nats.errors.Error as error:
            raise _of_nats(error, subject) from None
        finally:
            for waiting, queue in filter(None, ((token, frames), moved)):
                self._waiting.pop(waiting, None)
                queue.close()
            if credit:
                await self._client.publish(credit, b"cancel")

    async def dispatch(self, method: Method, work: Dispatch, instance: str, timeout_s: float = 10.0) -> None:
        """Hand a job to an instance; it answers as soon as it has accepted. Faults: "busy", "invalid", "no_responders"."""
        await self.request(f"inst.{instance}.{method.tail(self.user)}", encode(work), timeout_s)

    # ---- serving ----
    async def serve(self, handlers: dict[str, tuple[Method, Callable[..., Any]]], *, pool: str, instance: str,
                    models: tuple[str, ...] = (), make_call: Callable[..., Any] | None = None) -> Served:  # fmt: skip
        """Answer for `handlers` ("<contract>.v<major>.<method>" -> method and coroutine function) in the queue group of the
        pool and on the instance's own subjects. The token of the caller comes from the subject, which the broker guards."""
        served = Served(self, handlers, models, make_call)
        served.subscriptions = [await self._subscribe(f"impl.{pool}.>", None, pool, served.on_message),
                                await self._subscribe(f"inst.{instance}.>", None, self.boot, served.on_message)]  # fmt: skip
        return served

    async def _subscribe(self, subject: str, handler: Callable[[Any], Awaitable[None]] | None, queue: str = "",
                         direct: Callable[[Any], None] | None = None) -> Subscription:  # fmt: skip
        async with self._changing:
            self._denied.pop(subject.lower(), None)
            subscription = Subscription(self, subject, queue, handler, direct)
            try:
                await subscription.open(self._link)
                await self._link.barrier()  # a denial comes back before its answer
                if subject.lower() in self._denied:
                    raise ClientFault("permission_denied", f"{self.user!r} may not subscribe to {subject!r}")
            except BaseException:
                subscription.stop()
                subscription.left(self._link)
                raise
            self._subscriptions.append(subscription)
        return subscription

    async def unsubscribe(self, *subscriptions: Subscription) -> None:
        """End subscriptions at the broker. What it had sent before is with the handlers when this returns. nats-py's own
        drain loses messages."""
        async with self._changing:
            await self._leave(self._link, subscriptions)
            self._subscriptions = [s for s in self._subscriptions if s not in subscriptions]

    async def subscribe(self, subject: str, callback: Callable[[str, bytes, str], Awaitable[bytes | None]],
                        queue: str = "") -> Subscription:  # fmt: skip
        """Raw: `callback(subject, body, reply subject)` for each message; what it returns is the answer."""

        async def on_message(msg: Msg) -> None:
            answer = await callback(msg.subject, msg.data, msg.reply)
            if answer is not None and msg.reply:
                await self._client.publish(msg.reply, answer)

        return await self._subscribe(subject, on_message, queue or self.boot)


def _raise_if_fault(msg: Msg, subject: str) -> None:
    if not msg.headers:
        return
    if msg.headers.get("Status") == "503":
        raise KernelFault("no_responders", f"nobody answers on {subject}", "is the plugin running, is the name right?",
                          retriable=True)  # fmt: skip
    if ERROR_CODE in msg.headers:
        try:
            raise from_body(msgspec.json.decode(msg.data, type=FaultBody))
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise PluginFault("internal", f"{subject}: {msg.headers.get(ERROR, 'failed')}") from None


def _of_nats(error: Exception, subject: str) -> Fault:
    if isinstance(error, nats.errors.MaxPayloadError):
        return ClientFault("too_large", f"{subject}: the message is larger than the broker's limit",
                           "send a reference to an artifact instead", limit="broker")  # fmt: skip
    return KernelFault("disconnected", f"{subject}: {error}", "is the broker up?", retriable=True)


__all__ = ["Bucket", "Bus", "Credentials", "Served", "encode", "handlers_of"]
