"""Batches are stored whole or not at all, by a real broker."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec import Struct

from kernelm.testing.harness import System
from kernelm_sdk.batches import BREATH, MOST, Message, store
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.serving import encode


class Note(Struct, frozen=True):
    text: str


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    async with System() as system:
        yield await system.connect("jobs")


def note(key: str, text: str, expected: int = -1) -> Message:
    return Message(f"$KV.jobs.job.{key}", encode(Note(text)), expected)


async def test_a_batch_is_stored_whole_and_the_sequences_are_the_revisions(bus: Bus) -> None:
    bucket = bus.bucket("jobs", Note)
    sequences = await store(bus, [note("a", "1", 0), note("b", "2", 0), note("c", "3", 0)])
    for key, text, sequence in zip("abc", "123", sequences, strict=True):
        assert await bucket.get(f"job.{key}") == (Note(text), sequence)
    assert await store(bus, []) == []
    assert len(await store(bus, [note("d", "alone")])) == 1


async def test_one_conflict_refuses_all_of_it(bus: Bus) -> None:
    bucket = bus.bucket("jobs", Note)
    first = await bucket.put("job.a", Note("here"), 0)
    with pytest.raises(ClientFault) as refused:
        await store(bus, [note("b", "new", 0), note("a", "again", first + 7), note("c", "new", 0)])
    assert refused.value.code == "conflict"
    assert set(await bucket.all("job")) == {"job.a"}
    assert (await bucket.get("job.a"))[0] == Note("here")


async def test_the_largest_batch_is_stored_and_a_larger_one_is_refused(bus: Bus) -> None:
    assert len(await store(bus, [note(f"n{i}", "x" * 800, 0) for i in range(MOST)])) == MOST
    assert len(await bus.bucket("jobs", Note).all("job")) == MOST
    with pytest.raises(ClientFault, match="at most 1000"):
        await store(bus, [note(f"m{i}", "x") for i in range(MOST + 1)])


async def test_batches_at_once_are_each_whole_and_refused_each_by_itself(bus: Bus) -> None:
    bucket = bus.bucket("jobs", Note)
    await bucket.put("job.b7", Note("here"), 0)
    batches = [[note(f"{name}{i}", name, 0) for i in range(3 * BREATH + 1)] for name in "abc"]
    first, second, third = await asyncio.gather(*(store(bus, batch) for batch in batches), return_exceptions=True)
    assert isinstance(second, ClientFault)
    assert isinstance(first, list)
    assert isinstance(third, list)
    stored = await bucket.all("job")
    assert {key: revision for key, (_, revision) in stored.items() if key != "job.b7"} == {
        f"job.{name}{i}": revision for name, revisions in (("a", first), ("c", third)) for i, revision in enumerate(revisions)}
    assert stored["job.b7"][0] == Note("here")
