"""Compare-and-set through a real broker: other writers, lost answers, refused changes."""

from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from kernelm.testing.harness import System
from kernelm_contracts.jobs import JobRecord, JobSpec
from kernelm_jobs.records import JobRecords, Records
from kernelm_jobs.states import advance
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


async def test_where_another_was_first_on_one_of_many_all_are_written_and_each_on_the_newest(bus: Bus) -> None:
    mine, other = await records(bus), await records(bus)
    ids = [f"j{n:03}" for n in range(250)]
    for id in ids:
        await mine.create(id, replace(JOB, id=id))
    await other.load()
    await other.update("j007", lambda now: replace(now, checkpoint="sha256:c"))
    done = await mine.update_all({id: lambda now: advance(now, "place", epoch=now.epoch + 1) for id in ids})
    assert list(done) == ids
    assert {(before.state, after.state, after.epoch) for before, after in done.values()} == {("queued", "placed", 1)}
    assert done["j007"][1].checkpoint == "sha256:c"
    assert (await records(bus)).items() == {id: after for id, (_, after) in done.items()}
    await other.update("j008", lambda now: advance(now, "cancel"))
    with pytest.raises(ClientFault, match="can't happen to a job that is 'cancelled'"):
        await mine.update_all({id: lambda now: advance(now, "accept") for id in ids})
    stored = (await records(bus)).items()
    assert {id for id, job in stored.items() if job.state != "running"} == {"j008"}  # the others go on without it


async def test_a_deleted_record_is_gone(bus: Bus) -> None:
    table = await records(bus)
    await table.create("j", JOB)
    bucket: Bucket[JobRecord] = bus.bucket("jobs", JobRecord)
    await bucket.delete("job.j")
    with pytest.raises(ClientFault, match="there is no job 'j'"):
        await table.update("j", lambda now: advance(now, "cancel"))


async def test_jobs_are_found_by_state_work_and_parent_whatever_became_of_them(bus: Bus) -> None:
    table = JobRecords(bus.bucket("jobs", JobRecord), "job")
    child = replace(JOB, id="c", spec=replace(JOB.spec, parent="j"), key="other")
    assert await table.create("j", JOB)
    assert await table.create("c", child)
    after = await table.update_all({"j": lambda now: advance(now, "place", epoch=1), "c": lambda now: replace(now, key="key")})
    placed, renamed = after["j"][1], after["c"][1]
    assert table.in_states("queued") == [renamed]
    assert table.in_states("placed", "running") == [placed]
    assert {job.id for job in table.with_key("key")} == {"j", "c"}
    assert (table.with_key("other"), table.children("j"), table.children("c")) == ([], [renamed], [])
    await table.load()
    assert ([job.id for job in table.in_states("queued")], table.children("j")) == (["c"], [renamed])
    await bus.bucket("jobs", JobRecord).delete("job.c")
    await table.load()
    assert (table.in_states("queued"), table.children("j"), [job.id for job in table.with_key("key")]) == ([], [], ["j"])
