"""Streams as files: JetStream's snapshot and restore, for backups.

Source: nats-server's API subjects `$JS.API.STREAM.SNAPSHOT.<stream>` and `$JS.API.STREAM.RESTORE.<stream>`: chunks of an
archive in a format of the server's own, acknowledged where it asks for it, an empty one at the end. A snapshot is consistent
within its stream.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from kernelm_sdk.errors import KernelFault

if TYPE_CHECKING:
    from kernelm_sdk.bus import Bus

CHUNK = 128 * 1024  # bytes
SILENCE_S = 30.0  # so long the server may take for the next chunk


async def streams(bus: "Bus") -> list[str]:
    """The names of the streams that are on disk, sorted."""
    found: list[Any] = []
    while True:
        answer = await _ask(bus, "$JS.API.STREAM.LIST", {"offset": len(found)})
        found += answer["streams"] or []
        if len(found) >= answer["total"]:
            return sorted(s["config"]["name"] for s in found if s["config"]["storage"] == "file")


async def snapshot(bus: "Bus", stream: str, write: Callable[[bytes], Any]) -> dict[str, Any]:
    """Give the stream's snapshot to `write`, chunk by chunk; its configuration and state, which `restore` needs."""
    chunks: asyncio.Queue[Any] = asyncio.Queue()
    inbox = f"{bus._link.inbox}.snapshot.{stream}"
    subscription = await bus._link.client.subscribe(inbox, cb=chunks.put)
    try:
        answer = await _ask(bus, f"$JS.API.STREAM.SNAPSHOT.{stream}", {"deliver_subject": inbox, "chunk_size": CHUNK})
        while True:
            try:
                message = await asyncio.wait_for(chunks.get(), SILENCE_S)
            except TimeoutError:
                raise _fault(f"the snapshot of {stream} stopped", f"no chunk for {SILENCE_S:g} s") from None
            if not message.data:
                status = (message.headers or {}).get("Status", "")
                if status:  # the server gives up with one, and ends without
                    raise _fault(f"the snapshot of {stream} stopped", f"{status} {message.headers.get('Description', '')}")
                break
            await asyncio.to_thread(write, message.data)
            if message.reply:  # what opens the window again
                await bus._link.client.publish(message.reply, b"")
    finally:
        await subscription.unsubscribe()
    return {"config": answer["config"], "state": answer["state"]}


async def restore(bus: "Bus", stream: str, described: dict[str, Any], chunks: Iterable[bytes]) -> None:
    """Make the stream from what `snapshot` gave. KernelFault "storage" if it is there, or if the archive is damaged."""
    to = (await _ask(bus, f"$JS.API.STREAM.RESTORE.{stream}", described))["deliver_subject"]
    for chunk in chunks:
        reply = (await bus.request(to, chunk, SILENCE_S)).data
        if reply:  # a chunk that is taken is acknowledged without a word
            _judge(stream, msgspec.json.decode(reply))
    _judge(stream, msgspec.json.decode((await bus.request(to, b"", SILENCE_S)).data))


async def _ask(bus: "Bus", subject: str, request: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = msgspec.json.decode((await bus.request(subject, msgspec.json.encode(request), SILENCE_S)).data)
    _judge(subject, answer)
    return answer


def _judge(what: str, answer: dict[str, Any]) -> None:
    if error := answer.get("error"):
        raise _fault(what, f"{error.get('description')} ({error.get('err_code')})")


def _fault(what: str, why: str) -> KernelFault:
    return KernelFault("storage", f"{what}: {why}", "is the disk full, is the broker up?", retriable=True)
