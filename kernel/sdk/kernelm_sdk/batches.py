"""Several messages stored in one stream together, or none of them (JetStream atomic batch publish, ADR-50; nats-server 2.12)."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kernelm_sdk.errors import ClientFault, KernelFault

if TYPE_CHECKING:
    from kernelm_sdk.records import Storage

MOST = 1000  # messages in a batch: the broker's limit
BREATH = 100  # messages, after which they are let out: the broker begins while the rest is made
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

    def headers(number: int, expected: int) -> dict[str, str]:
        said = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
        return said if expected < 0 else said | {"Nats-Expected-Last-Subject-Sequence": str(expected)}

    async with bus._batching:  # the broker stores one while the next one is sent, and not all of them at the end
        for number, (subject, body, expected) in enumerate(messages[:-1], 1):
            await bus._link.client.publish(subject, body, headers=headers(number, expected))
            if number % BREATH == 0:
                await asyncio.sleep(0)
    subject, body, expected = messages[-1]
    commit = headers(last, expected) | {"Nats-Batch-Commit": "1"}
    answer = msgspec.json.decode((await bus.request(subject, body, timeout_s, commit)).data)
    if error := answer.get("error"):
        if error.get("err_code") in CONFLICTS:
            raise ClientFault("conflict", "another writer was first on a message of a batch", "read again, retry", retriable=True)
        said = f"{error.get('description')} ({error.get('err_code')})"
        hint = "has the stream allow_atomic, is the disk full?"
        raise KernelFault("storage", f"a batch of {last} messages: {said}", hint, retriable=True)
    return list(range(answer["seq"] - last + 1, answer["seq"] + 1))
