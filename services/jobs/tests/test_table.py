"""Compare-and-set through a real broker: other writers, lost answers, refused changes."""

from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from kernelm.testing.harness import System
from kernelm_contracts.jobs import JobRecord, JobSpec
from kernelm_jobs.states import advance
from kernelm_jobs.table import Records
from kernelm_sdk.bus import Bucket, Bus
from kernelm_sdk.errors import ClientFault

JOB = JobRecord("j", JobSpec("train", "trainer/1.train", {"dataset": "d"}), "key")


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    async with System() as system:
        yield await system.connect("jobs")


async def records(bus: Bus) -> Records[JobRecord]:
    made: Records[JobRecord] = Records(bus.bucket("jobs", JobRecord), "job")
    await made.load()
    return made


async def test_a_change_is_made_on_what_another_writer_left(bus: Bus) -> None:
    mine, other = await records(bus), await records(bus)
    assert await mine.create("j", JOB)
    assert not await other.create("j", replace(JOB, key="another"))
    assert other.get("j") == JOB
    await other.update("j", lambda now: replace(now, checkpoint="sha256:c"))
    before, after = await mine.update("j", lambda now: advance(now, "place", epoch=now.epoch + 1))
    assert (before.checkpoint, after.checkpoint, after.state, after.epoch) == ("sha256:c", "sha256:c", "placed", 1)
    assert (await records(bus)).get("j") == after


async def test_two_owners_can_not_both_take_a_job(bus: Bus) -> None:
    mine, other = await records(bus), await records(bus)
    await mine.create("j", JOB)
    await other.load()
    await mine.update("j", lambda now: advance(now, "place", epoch=now.epoch + 1, instance="a"))
    with pytest.raises(ClientFault, match="can't happen to a job that is 'placed'"):
        await other.update("j", lambda now: advance(now, "place", epoch=now.epoch + 1, instance="b"))
    assert other.need("j").instance == "a"


async def test_an_own_write_whose_answer_was_lost_is_not_made_twice(bus: Bus) -> None:
    table = await records(bus)
    await table.create("j", JOB)
    bucket: Bucket[JobRecord] = bus.bucket("jobs", JobRecord)
    changes = 0

    def place(now: JobRecord) -> JobRecord:
        nonlocal changes
        changes += 1
        return advance(now, "place", epoch=now.epoch + 1)

    _, revision = await bucket.get("job.j")
    await bucket.put("job.j", place(JOB), revision)  # stored, and nobody was told
    _, after = await table.update("j", place)
    assert (after.state, after.epoch, changes) == ("placed", 1, 2)


async def test_a_refused_change_leaves_everything_as_it_was(bus: Bus) -> None:
    table = await records(bus)
    await table.create("j", JOB)
    with pytest.raises(ClientFault):
        await table.update("j", lambda now: advance(now, "finish"))
    assert table.need("j") == JOB
    assert (await records(bus)).need("j") == JOB
    with pytest.raises(ClientFault, match="there is no job 'k'"):
        await table.update("k", lambda now: now)


async def test_a_deleted_record_is_gone(bus: Bus) -> None:
    table = await records(bus)
    await table.create("j", JOB)
    bucket: Bucket[JobRecord] = bus.bucket("jobs", JobRecord)
    await bucket.delete("job.j")
    with pytest.raises(ClientFault, match="there is no job 'j'"):
        await table.update("j", lambda now: advance(now, "cancel"))
