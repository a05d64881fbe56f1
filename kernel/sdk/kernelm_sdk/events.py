"""Typed events: facts that happened, published once and kept.

Defining the class registers it; a second class with the same type name is an error at import. On the wire an event is
its JSON body with a CloudEvents 1.0 envelope in NATS headers (NATS protocol binding). `ce-id` equals `Nats-Msg-Id`, so
that the stream drops a repeated publish. Two extension attributes let the journal audit the stream, since JetStream
does not notice a flipped bit: `ce-sequence` counts per source and boot, `ce-digest` is the BLAKE2b-128 of the body.
"""

import hashlib
import time
from datetime import UTC, datetime
from typing import Any, ClassVar

import msgspec

EVENTS: dict[str, type["Event"]] = {}  # "domain.name" -> class


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all events. A subclass sets `TYPE = "job.done"`; its subject is then `evt.job.done.<source>`."""

    TYPE: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        kind = cls.TYPE
        if kind.count(".") != 1:
            raise TypeError(f"event {cls.__qualname__}: TYPE must be '<domain>.<name>', not {kind!r}")
        # a struct class may be built twice by msgspec; a clash is another class of the same type
        if (other := EVENTS.get(kind)) and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"event type {kind!r} is defined twice: in {other.__module__} and in {cls.__module__}")
        EVENTS[kind] = cls


class Received(msgspec.Struct, frozen=True):
    """An event as a subscriber sees it. `event` is None when no class of that type is known here."""

    type: str
    source: str  # the publisher, fixed by its JWT as the last token of the subject
    id: str
    time: str  # RFC 3339, UTC
    body: bytes
    event: Event | None = None
    stream_sequence: int = 0
    source_sequence: int = 0
    boot: str = ""
    intact: bool = True  # the digest in the envelope matches the body


def digest(body: bytes) -> str:
    """BLAKE2b-128 of an event's body, in hex."""
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def envelope(event: Event, source: str, boot: str, sequence: int) -> tuple[str, bytes, dict[str, str]]:
    """Subject, body and headers of `event` when `source` publishes it as its `sequence`-th since `boot`."""
    kind = event.TYPE
    body = msgspec.json.encode(event)
    identifier = f"{source}.{boot}.{sequence}"
    stamp = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    headers = {
        "Nats-Msg-Id": identifier, "ce-id": identifier, "ce-specversion": "1.0", "ce-type": kind, "ce-source": source,
        "ce-time": stamp, "ce-datacontenttype": "application/json", "ce-boot": boot, "ce-sequence": str(sequence),
        "ce-digest": digest(body),
    }  # fmt: skip
    return f"evt.{kind}.{source}", body, headers


def received(subject: str, body: bytes, headers: dict[str, str] | None, stream_sequence: int = 0) -> Received:
    """The event behind a message. The source is the subject's last token; what the headers say of it is not trusted."""
    headers = headers or {}
    _, domain, name, source = subject.split(".", 3)
    kind = f"{domain}.{name}"
    intact = headers.get("ce-digest", "") == digest(body)
    number = headers.get("ce-sequence", "")  # whoever may publish at all may write anything here
    event = None
    if intact and kind in EVENTS:
        try:
            event = msgspec.json.decode(body, type=EVENTS[kind])
        except (msgspec.DecodeError, UnicodeDecodeError):
            intact = False
    return Received(kind, source, headers.get("ce-id", ""), headers.get("ce-time", ""), body, event, stream_sequence,
                    int(number) if number.isascii() and number.isdigit() and len(number) < 19 else 0, headers.get("ce-boot", ""),
                    intact)  # fmt: skip
