"""Several messages stored in one stream together, or none of them (JetStream atomic batch publish, ADR-50; nats-server 2.12)."""

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kernelm_sdk.errors import ClientFault, KernelFault

if TYPE_CHECKING:
    from kernelm_sdk.records import Storage

MOST = 1000  # messages in a batch: the broker's limit
CONFLICTS = (10071, 10164)  # wrong last sequence


class Message(NamedTuple):
    subject: str
    body: bytes
    expected: int = -1  # last sequence of the subject; -1 for whatever it is


async def store(bus: "Storage", messages: Sequence[Message], timeout_s: float = 10.0) -> list[int]:
    """Store all `messages` (at most MOST, of one stream that has `allow_atomic`); their sequences, when they are on disk.
    ClientFault "conflict" if another writer was first on any of them. A KernelFault leaves it open whether they are stored: read
    them again."""
    if not messages:
        return []
    if len(messages) > MOST:
        raise ClientFault("too_large", f"{len(messages)} messages in a batch, at most {MOST}", "make several batches")
    batch, last = secrets.token_hex(12), len(messages)
    for number, message in enumerate(messages, 1):
        headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
        if message.expected >= 0:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(message.expected)
        if number < last:
            await bus._link.client.publish(message.subject, message.body, headers=headers)
            continue
        headers["Nats-Batch-Commit"] = "1"
        answer = msgspec.json.decode((await bus.request(message.subject, message.body, timeout_s, headers)).data)
    if error := answer.get("error"):
        if error.get("err_code") in CONFLICTS:
            raise ClientFault("conflict", "another writer was first on a message of a batch", "read again, retry", retriable=True)
        said = f"{error.get('description')} ({error.get('err_code')})"
        hint = "has the stream allow_atomic, is the disk full?"
        raise KernelFault("storage", f"a batch of {last} messages: {said}", hint, retriable=True)
    return list(range(answer["seq"] - last + 1, answer["seq"] + 1))
