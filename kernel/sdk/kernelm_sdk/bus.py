"""The bus: calls, streams, events and records over NATS. The only file that imports nats.

Requests use an inbox of our own in place of nats-py's: a permission violation arrives on the connection and not as a
reply, and must become the error of the very call that was denied; a lost connection must fail the calls in flight at
once; and one call may have many replies (streams, reading a bucket).
"""

import asyncio
import base64
import contextlib
import logging
import re
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import nats
import nkeys
from nats.aio.msg import Msg

from kernelm_sdk.contract import TOKEN, Method, method_of
from kernelm_sdk.errors import ClientFault, Fault, FaultBody, KernelFault, PluginFault, from_body
from kernelm_sdk.events import Event, Received, envelope, received
from kernelm_sdk.records import Bucket
from kernelm_sdk.serving import DEADLINE, ERROR, ERROR_CODE, LAST, WINDOW, Direct, Served, encode, handlers_of
from kernelm_sdk.system import Dispatch

T = TypeVar("T", bound=msgspec.Struct)
DEFAULT_TIMEOUT_S = 30.0
log = logging.getLogger("kernelm.bus")


class Credentials(msgspec.Struct):
    """Who connects: the name that the JWT fixes, the JWT, and the seed that signs the server's nonce."""

    user: str
    jwt: str
    seed: str
    expires: int = 0  # Unix seconds; 0 for never



class Bus:
    """One connection of one identity. Make it with `await Bus.connect(...)`, end it with `await bus.close()`."""
    def __init__(self, credentials: Credentials) -> None:
        self.credentials, self.user = credentials, credentials.user
        self.boot = secrets.token_hex(16)  # events are numbered per source and boot; 128 bits, for it names the inbox too
        self.reconnected: list[Callable[[], Awaitable[None]]] = []
        self._client = nats.NATS()
        self._inbox = f"_INBOX.{self.user}.{self.boot}"
        self._waiting: dict[str, tuple[str, asyncio.Queue[Msg | Fault] | asyncio.Future[Msg]]] = {}  # token -> subject, sink
        self._next = 0
        self._sequence = 0
        self._publishing = asyncio.Lock()
        self._methods: dict[Any, tuple[Method, msgspec.json.Decoder[Any]]] = {}
        self._subjects: dict[tuple[Any, str, str], str] = {}
        self._denied: dict[str, str] = {}

    # ---- connection ----
    @classmethod
    async def connect(cls, url: str, credentials: Credentials, *, tls: ssl.SSLContext | None = None,
                      timeout_s: float = 10.0) -> "Bus":  # fmt: skip
        """Connect, or KernelFault "broker_unreachable" / ClientFault "unauthorized" within `timeout_s`."""
        bus = cls(credentials)
        problems: list[str] = []

        async def on_error(error: Exception) -> None:
            problems.append(str(error) or type(error).__name__)
            bus._on_error(error)

        try:
            await asyncio.wait_for(bus._client.connect(
                url, name=bus.user, user_jwt_cb=bus._jwt, signature_cb=bus._sign, inbox_prefix=bus._inbox, tls=tls,
                skip_subject_validation=True,  # subjects are made of checked tokens: see `_subject`
                max_reconnect_attempts=-1, reconnect_time_wait=0.1, ping_interval=1, max_outstanding_pings=3,
                error_cb=on_error, disconnected_cb=bus._on_disconnect, reconnected_cb=bus._on_reconnect,
            ), timeout_s)  # fmt: skip
        except Exception as error:
            await bus.close()
            cause = "; ".join(problems[-1:]) or str(error) or type(error).__name__
            if "uthorization" in cause:
                raise ClientFault("unauthorized", f"the broker at {url} refused {bus.user!r}: {cause}",
                                  "the key is wrong, expired or revoked: get a new one") from None  # fmt: skip
            raise KernelFault("broker_unreachable", f"no broker at {url}: {cause}", "is `kernelm up` running?",
                              retriable=True) from None  # fmt: skip
        Direct.replace(await bus._client.subscribe(f"{bus._inbox}.*", pending_bytes_limit=0), bus._on_reply)
        return bus

    async def close(self) -> None:
        """Flush what was published and disconnect."""
        with contextlib.suppress(Exception):  # a dead broker must not keep anybody from ending
            await self._client.flush(2)
            await self._client.close()

    @property
    def closed(self) -> bool:
        """For good: closed by us, or shut out by the broker (expired or revoked)."""
        return bool(self._client.is_closed)

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    async def renewed(self, credentials: Credentials) -> None:
        """Go on under a new JWT: nats-py closes for good when the old one expires."""
        self.credentials = credentials
        await self._client.flush()
        await self._client.force_reconnect()

    def _jwt(self) -> bytearray:
        return bytearray(self.credentials.jwt.encode())

    def _sign(self, nonce: str) -> bytes:
        return base64.b64encode(nkeys.from_seed(self.credentials.seed.encode()).sign(nonce.encode()))

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
        for token, (wanted, _) in list(self._waiting.items()):
            if subject == wanted.lower() or (tail and tail == wanted.removeprefix("svc.")):
                self._fail(token, fault)

    async def _on_disconnect(self) -> None:
        fault = KernelFault("disconnected", "the connection to the broker was lost before the answer came", retriable=True)
        for token in list(self._waiting):
            self._fail(token, fault)

    async def _on_reconnect(self) -> None:
        for callback in self.reconnected:
            await callback()

    # ---- requests ----

    def _fail(self, token: str, fault: Fault) -> None:
        _, sink = self._waiting.pop(token, ("", None))
        if isinstance(sink, asyncio.Queue):
            sink.put_nowait(fault)
        elif sink is not None and not sink.done():
            sink.set_exception(fault)

    def _expire(self, token: str, after_s: float) -> None:
        if entry := self._waiting.get(token):
            self._fail(token, KernelFault("timeout", f"no answer on {entry[0]} within {after_s:g} s", retriable=True))

    def _on_reply(self, msg: Msg) -> None:
        token = msg.subject.rpartition(".")[2]
        _, sink = self._waiting.get(token, ("", None))
        if isinstance(sink, asyncio.Queue):
            sink.put_nowait(msg)
        elif sink is not None and not sink.done():
            sink.set_result(msg)

    def _token(self) -> str:
        self._next += 1
        return format(self._next, "x")

    async def request(self, subject: str, body: bytes, timeout_s: float, headers: dict[str, str] | None = None) -> Msg:
        """One raw request and its one reply; faults: "no_responders", "timeout", "permission_denied", "disconnected"."""
        token = self._token()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Msg] = loop.create_future()
        self._waiting[token] = (subject, future)
        timer = loop.call_later(timeout_s, self._expire, token, timeout_s)
        try:
            await self._client.publish(subject, body, reply=f"{self._inbox}.{token}", headers=headers)
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
                   timeout_s: float = DEFAULT_TIMEOUT_S, patience_s: float = 0.0) -> Any:  # fmt: skip
        """Call a method: where it is routed, on the deployment `model`, or on one `instance`. Faults of the far side are
        raised here. With `patience_s` a retriable KernelFault is tried again so long: for handlers that are idempotent."""
        method, decoder = self.resolve(declared)
        subject = self._subject(declared, method, model, instance)
        headers = None if timeout_s == DEFAULT_TIMEOUT_S else {DEADLINE: f"{time.time() + timeout_s:.3f}"}
        body, until, pause = encode(request), time.monotonic() + patience_s, 0.05
        while True:
            try:
                msg = await self.request(subject, body, timeout_s, headers)
                return decoder.decode(msg.data)
            except KernelFault as fault:
                if not fault.retriable or time.monotonic() + pause > until:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def stream(self, declared: Any, request: msgspec.Struct, *, model: str = "", instance: str = "",
                     idle_s: float = DEFAULT_TIMEOUT_S) -> AsyncIterator[Any]:  # fmt: skip
        """The frames of a streamed method, in order. At most WINDOW are in flight; leaving the loop stops the producer."""
        method, decoder = self.resolve(declared)
        subject = self._subject(declared, method, model, instance)
        token, frames = self._token(), asyncio.Queue[Msg | Fault]()
        self._waiting[token] = (subject, frames)
        count, credit, late = 0, "", KernelFault("timeout", f"no frame on {subject} within {idle_s:g} s", retriable=True)
        try:
            await self._client.publish(subject, encode(request), reply=f"{self._inbox}.{token}")
            while True:
                try:
                    msg = await asyncio.wait_for(frames.get(), idle_s)
                except TimeoutError:
                    raise late from None
                if isinstance(msg, Fault):
                    raise msg
                _raise_if_fault(msg, subject)
                if msg.headers and LAST in msg.headers:
                    credit = ""
                    return
                count, credit = count + 1, msg.reply
                yield decoder.decode(msg.data)
                if credit and count % (WINDOW // 2) == 0:
                    await self._client.publish(credit, str(count).encode())
        finally:
            self._waiting.pop(token, None)
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
                                await self._subscribe(f"inst.{instance}.>", None, "", served.on_message)]  # fmt: skip
        return served

    async def _subscribe(self, subject: str, callback: Callable[[Msg], Awaitable[None]] | None, queue: str = "",
                         direct: Callable[[Msg], None] | None = None) -> Any:  # fmt: skip
        self._denied.pop(subject.lower(), None)
        subscription = await self._client.subscribe(subject, queue=queue, cb=callback, pending_bytes_limit=0 if direct else 2**27)
        if direct:
            Direct.replace(subscription, direct)
        await self._barrier()  # a denial comes back before its answer
        if subject.lower() in self._denied:
            raise ClientFault("permission_denied", f"{self.user!r} may not subscribe to {subject!r}")
        return subscription

    async def _barrier(self) -> None:
        """All that was sent before has reached the broker. nats-py's flush writes its ping past the commands that wait in
        its buffer, so one flush proves nothing; the second one's ping follows them."""
        await self._client.flush()
        await self._client.flush()

    async def subscribe(self, subject: str, callback: Callable[[str, bytes, str], Awaitable[bytes | None]], queue: str = "") -> Any:
        """Raw: `callback(subject, body, reply subject)` for each message; what it returns is the answer."""

        async def on_message(msg: Msg) -> None:
            answer = await callback(msg.subject, msg.data, msg.reply)
            if answer is not None and msg.reply:
                await self._client.publish(msg.reply, answer)

        return await self._subscribe(subject, on_message, queue)

    # ---- events and records ----
    async def publish(self, event: Event, patience_s: float = 30.0) -> int:
        """Publish a fact and wait until it is on disk; its sequence in the stream. A publish that timed out may have been
        stored, so it is repeated under the same id, which the stream deduplicates."""
        async with self._publishing:  # keeps the source's sequence free of gaps and in order
            subject, body, headers = envelope(event, self.user, self.boot, self._sequence + 1)
            sequence = await self.append(subject, body, headers, patience_s)
            self._sequence += 1
        return sequence

    async def append(self, subject: str, body: bytes, headers: dict[str, str] | None = None, patience_s: float = 0.0) -> int:
        """Store a message in the stream that holds `subject`; its sequence. KernelFault "conflict" when an expected
        sequence in the headers is not the last one."""
        until = time.monotonic() + patience_s
        while True:
            try:
                answer = msgspec.json.decode((await self.request(subject, body, 5.0, headers)).data)
                break
            except KernelFault as fault:
                if not fault.retriable or time.monotonic() > until:
                    raise
            await asyncio.sleep(0.2)
        if error := answer.get("error"):
            if error.get("err_code") in (10071, 10164):  # wrong last sequence
                raise ClientFault("conflict", f"{subject}: another writer was first", "read it again and retry", retriable=True)
            raise KernelFault("storage", f"{subject}: {error.get('description')}", "is the broker's disk full?", retriable=True)
        return int(answer["seq"])

    async def follow(self, handler: Callable[[Received], Awaitable[None]], pattern: str = "evt.>") -> Any:
        """Live events that match `pattern`, in order; stop with `.unsubscribe()` on what is returned."""

        async def on_message(msg: Msg) -> None:
            await handler(received(msg.subject, msg.data, msg.headers))

        return await self._subscribe(pattern, on_message)

    async def read(self, stream: str, pattern: str = "", first: int = 1, batch: int = 500
                   ) -> AsyncIterator[tuple[int, str, bytes, dict[str, str]]]:  # fmt: skip
        """(sequence, subject, body, headers) of all messages stored in `stream` from `first` on, to its present end."""
        while True:
            query = encode({"seq": first, "batch": batch, "next_by_subj": pattern or ">"})
            token, replies = self._token(), asyncio.Queue[Msg | Fault]()
            subject = f"$JS.API.DIRECT.GET.{stream}"
            self._waiting[token] = (subject, replies)
            pending = 0
            try:
                await self._client.publish(subject, query, reply=f"{self._inbox}.{token}")
                while True:
                    msg = await asyncio.wait_for(replies.get(), 5.0)
                    if isinstance(msg, Fault):
                        raise msg
                    headers = dict(msg.headers or {})
                    if status := headers.get("Status"):
                        if status == "404":  # none from `first` on
                            return
                        if status != "204":
                            raise KernelFault("storage", f"{stream}: {status} {headers.get('Description', '')}", retriable=True)
                        pending = int(headers.get("Nats-Num-Pending", 0))
                        break
                    first = int(headers["Nats-Sequence"]) + 1
                    yield first - 1, headers["Nats-Subject"], msg.data, headers
            except TimeoutError:
                raise KernelFault("timeout", f"no answer of stream {stream}", "is the broker up?", retriable=True) from None
            finally:
                self._waiting.pop(token, None)
            if pending == 0:
                return

    def bucket(self, name: str, kind: type[T]) -> Bucket[T]:
        """The records of type `kind` in KV bucket `name`."""
        return Bucket(self, name, kind)

    async def ensure_stream(self, name: str, subjects: list[str], **config: Any) -> None:
        """Create the stream, or update it if it exists with other settings. Only the kernel may."""
        body = {"name": name, "subjects": subjects, "storage": "file", "retention": "limits", "num_replicas": 1,
                "allow_direct": True, "max_consumers": -1, "max_msgs": -1, "max_age": 0, "discard": "old", **config}  # fmt: skip
        for verb in ("CREATE", "UPDATE"):
            answer = msgspec.json.decode((await self.request(f"$JS.API.STREAM.{verb}.{name}", encode(body), 10.0)).data)
            if "error" not in answer:
                return
        raise KernelFault("storage", f"stream {name}: {answer['error'].get('description')}", "is the disk full?")


def _raise_if_fault(msg: Msg, subject: str) -> None:
    if not msg.headers:
        return
    if msg.headers.get("Status") == "503":
        raise KernelFault("no_responders", f"nobody answers on {subject}", "is the plugin running, is the name right?",
                          retriable=True)  # fmt: skip
    if ERROR_CODE in msg.headers:
        try:
            raise from_body(msgspec.json.decode(msg.data, type=FaultBody))
        except msgspec.DecodeError:
            raise PluginFault("internal", f"{subject}: {msg.headers.get(ERROR, 'failed')}") from None


def _of_nats(error: Exception, subject: str) -> Fault:
    if isinstance(error, nats.errors.MaxPayloadError):
        return ClientFault("too_large", f"{subject}: the message is larger than the broker's limit",
                           "send a reference to an artifact instead")  # fmt: skip
    return KernelFault("disconnected", f"{subject}: {error}", "is the broker up?", retriable=True)


__all__ = ["Bucket", "Bus", "Credentials", "Served", "encode", "handlers_of"]
