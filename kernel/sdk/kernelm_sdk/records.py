"""What the broker keeps: events in streams, and typed records in its key-value store, written compare-and-set."""

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from kernelm_sdk.batches import Message, store
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.events import Event, Received, envelope, received
from kernelm_sdk.serving import encode
from kernelm_sdk.usage import Meter

if TYPE_CHECKING:
    from kernelm_sdk.links import Link

T = TypeVar("T", bound=msgspec.Struct)


class Storage(ABC):
    """The part of the bus that is about what the broker keeps."""

    user: str
    boot: str  # events are numbered per source and boot
    _link: "Link"
    _waiting: dict[str, tuple[str, Any, "Link"]]

    def __init__(self) -> None:
        self._sequence = 0
        self._publishing = asyncio.Lock()
        self._batching = asyncio.Lock()  # held while the messages of a batch are sent
        self.meter = Meter()  # of what this identity has served

    @abstractmethod
    async def request(self, subject: str, body: bytes, timeout_s: float, headers: dict[str, str] | None = None) -> Any: ...

    @abstractmethod
    def _token(self) -> str: ...

    @abstractmethod
    async def _subscribe(self, subject: str, handler: Callable[[Any], Awaitable[None]] | None, queue: str = "",
                         direct: Callable[[Any], None] | None = None) -> Any: ...  # fmt: skip

    async def publish(self, event: Event, patience_s: float = 30.0) -> int:
        """Publish a fact and wait until it is on disk; its sequence in the stream. A publish that timed out may have been
        stored, so it is repeated under the same id, which the stream deduplicates."""
        async with self._publishing:  # keeps the source's sequence free of gaps and in order
            subject, body, headers = envelope(event, self.user, self.boot, self._sequence + 1)
            try:
                sequence = await self.append(subject, body, headers, patience_s)
            except BaseException:
                # it may be stored all the same: under its id another event would be dropped as its copy, and acknowledged
                self.boot, self._sequence = secrets.token_hex(16), 0
                raise
            self._sequence += 1
        return sequence

    async def append(self, subject: str, body: bytes, headers: dict[str, str] | None = None, patience_s: float = 0.0,
                     timeout_s: float = 5.0) -> int:  # fmt: skip
        """Store a message in the stream that holds `subject`; its sequence. KernelFault "conflict" when an expected
        sequence in the headers is not the last one."""
        until = time.monotonic() + patience_s
        while True:
            try:
                answer = msgspec.json.decode((await self.request(subject, body, timeout_s, headers)).data)
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

        async def on_message(msg: Any) -> None:
            await handler(received(msg.subject, msg.data, msg.headers))

        return await self._subscribe(pattern, on_message)

    async def read(self, stream: str, pattern: str = "", first: int = 1, batch: int = 500, since: float = 0.0
                   ) -> AsyncIterator[tuple[int, str, bytes, dict[str, str]]]:  # fmt: skip
        """(sequence, subject, body, headers) of all messages stored in `stream` from `first` on, or from the moment `since` (Unix
        seconds), to its present end."""
        begin: dict[str, Any] = {"start_time": datetime.fromtimestamp(since, UTC).isoformat()} if since else {"seq": first}
        while True:
            query = encode({**begin, "batch": batch, "next_by_subj": pattern or ">"})
            token, replies, link = self._token(), asyncio.Queue[Any](), self._link
            subject = f"$JS.API.DIRECT.GET.{stream}"
            self._waiting[token] = (subject, replies, link)
            pending = 0
            try:
                await link.client.publish(subject, query, reply=f"{link.inbox}.{token}")
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
                    sequence = int(headers["Nats-Sequence"])
                    begin = {"seq": sequence + 1}
                    yield sequence, headers["Nats-Subject"], msg.data, headers
            except TimeoutError:
                raise KernelFault("timeout", f"no answer of stream {stream}", "is the broker up?", retriable=True) from None
            finally:
                self._waiting.pop(token, None)
            if pending == 0:
                return

    def bucket(self, name: str, kind: type[T]) -> "Bucket[T]":
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


class Bucket(Generic[T]):
    """Typed records under keys, all writes compare-and-set. Keys are `[a-z0-9.-]+`."""

    def __init__(self, bus: "Storage", name: str, kind: type[T]) -> None:
        self._bus, self._name, self._decoder = bus, name, msgspec.json.Decoder(kind)

    async def get(self, key: str) -> tuple[T | None, int]:
        """The record and its revision; (None, revision to expect for a new one) where there is none."""
        msg = await self._bus.request(f"$JS.API.DIRECT.GET.KV_{self._name}.$KV.{self._name}.{key}", b"", 5.0)
        headers = msg.headers or {}
        if headers.get("Status") == "404":
            return None, 0
        revision = int(headers["Nats-Sequence"])
        return (None, revision) if _deleted(headers) else (self._decoder.decode(msg.data), revision)

    async def put(self, key: str, record: T, revision: int, ttl_s: int = 0, patience_s: float = 0.0) -> int:
        """Write if `revision` is still the last one (0: there must be none; -1: whatever it is); the new revision."""
        headers = {} if revision < 0 else {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        if ttl_s:
            headers["Nats-TTL"] = str(ttl_s)
        return await self._bus.append(f"$KV.{self._name}.{key}", encode(record), headers, patience_s)

    async def put_all(self, records: Sequence[tuple[str, T, int]]) -> list[int]:
        """As `put` for several keys (key, record, revision), all of them or none; faults as of `batches.store`."""
        return await store(self._bus, [Message(f"$KV.{self._name}.{key}", encode(record), revision)
                                       for key, record, revision in records])  # fmt: skip

    async def delete(self, key: str, revision: int = -1) -> None:
        headers = {"KV-Operation": "DEL"}
        if revision >= 0:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(revision)
        await self._bus.append(f"$KV.{self._name}.{key}", b"", headers)

    async def all(self, prefix: str = "") -> dict[str, tuple[T, int]]:
        """Every record, with its revision, whose key is `prefix` or begins with it and a dot."""
        start = len(f"$KV.{self._name}.")
        pattern = f"$KV.{self._name}." + (f"{prefix}.>" if prefix else ">")
        found: dict[str, tuple[T, int]] = {}
        async for sequence, subject, body, headers in self._bus.read(f"KV_{self._name}", pattern):
            key = subject[start:]
            found.pop(key, None)
            if not _deleted(headers):
                found[key] = (self._decoder.decode(body), sequence)
        return found


def _deleted(headers: dict[str, str]) -> bool:
    return headers.get("KV-Operation") in ("DEL", "PURGE") or "Nats-Marker-Reason" in headers
