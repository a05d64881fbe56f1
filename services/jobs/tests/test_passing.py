"""Which checkpoints stay in the store, through a real broker, kernel, job service and artifact store."""

import asyncio
from pathlib import Path
from typing import Any

from kernelm.testing.harness import until
from kernelm_contracts.jobs import JobName, JobRecord, Jobs, JobSpec
from kernelm_contracts.trainer import Trained, TrainRequest
from kernelm_sdk.plugin import Job
from kernelm_sdk.system import ArtifactQuery, Artifacts, Resources

Kit = Any  # of conftest.py, which can't be imported


def folder(job: Job, number: int) -> Path:
    made = job.scratch / f"checkpoint-{number}"
    made.mkdir()
    (made / "state.json").write_text(str(number))
    return made


async def run(kit: Kit, act: Any) -> JobRecord:
    kit.acts["train"] = act
    await kit.system.service("artifacts")
    await kit.pools("scheduler", "trainer")
    job = await kit.bus.call(Jobs.submit, JobSpec("train", "trainer/1.train", {"dataset": "d"}, Resources(0.5, 16)))
    return await kit.job(job.id, lambda j: j.state == "done")  # type: ignore[no-any-return]


async def stay(kit: Kit, *wanted: str) -> None:
    """Wait until these are the checkpoints in the store."""
    async def there() -> bool:
        found = await kit.bus.call(Artifacts.find, ArtifactQuery("checkpoint"))
        return sorted(a.digest for a in found.artifacts) == sorted(wanted)

    await until(there, 20.0, "the checkpoints that stay")


async def test_a_passing_checkpoint_goes_when_the_next_is_on_record(kit: Kit) -> None:
    digests: list[str] = []

    async def act(request: TrainRequest, job: Job) -> Trained:
        for number in range(5):
            digests.append(await job.save(folder(job, number), passing=number not in (2, 4)))
        return kit.trained("m")  # type: ignore[no-any-return]

    await run(kit, act)
    await stay(kit, digests[2], digests[4])


async def test_what_a_crash_has_left_goes_with_the_next_one(kit: Kit) -> None:
    digests: list[str] = []

    async def act(request: TrainRequest, job: Job) -> Trained:
        # on record and not erased, since the service was killed in between
        job.checkpoint = await job.context.store(folder(job, 0), "checkpoint", {"passing": True}, job=job.id)
        for number in (1, 2):
            digests.append(await job.save(folder(job, number), passing=number == 1))
        return kit.trained("m")  # type: ignore[no-any-return]

    await run(kit, act)
    await stay(kit, digests[1])


async def test_a_job_can_have_nothing_erased_but_its_own_passing_checkpoints(kit: Kit) -> None:
    """It reports a model, another job's checkpoint and one that is to last, and then a new checkpoint."""
    kept: list[str] = []

    async def act(request: TrainRequest, job: Job) -> Trained:
        assert job.report is not None
        model = await job.context.store(folder(job, 0), "model", {"passing": True}, job=job.id)
        kept.append(await job.context.store(folder(job, 1), "checkpoint", {"passing": True}, job="another"))
        kept.append(await job.context.store(folder(job, 2), "checkpoint", {}, job=job.id))
        for digest in (model, *kept):
            await job.report(digest)
        kept.append(await job.save(folder(job, 3)))
        return kit.trained(model)  # type: ignore[no-any-return]

    await run(kit, act)
    await stay(kit, *kept)
    assert len((await kit.bus.call(Artifacts.find, ArtifactQuery("model"))).artifacts) == 1


async def test_the_last_one_goes_with_the_result(kit: Kit) -> None:
    async def act(request: TrainRequest, job: Job) -> Trained:
        for number in range(2):
            await job.save(folder(job, number), passing=True)
        return kit.trained("m")  # type: ignore[no-any-return]

    job = await run(kit, act)
    await stay(kit)
    assert (await kit.bus.call(Jobs.get, JobName(job.id))).checkpoint == "", "no twin is sent to one that is erased"


async def test_the_last_one_stays_while_a_twin_goes_on_from_it(kit: Kit) -> None:
    """Two of the same content, of two tenants: the second begins where the first stands, and the first is done before it."""
    saved, handed, begun, over = list[str](), list[str](), asyncio.Event(), asyncio.Event()

    async def first(request: TrainRequest, job: Job) -> Trained:
        saved.append(await job.save(folder(job, 0), passing=True))
        await begun.wait()
        return kit.trained("m")  # type: ignore[no-any-return]

    async def second(request: TrainRequest, job: Job) -> Trained:
        handed.append(job.checkpoint)
        begun.set()
        await over.wait()
        return kit.trained("m")  # type: ignore[no-any-return]

    kit.acts |= {"first": first, "second": second}
    await kit.system.service("artifacts")
    await kit.pools("scheduler")
    await kit.system.pool(kit.pool("trainer", "trainer", instances=2))
    one = await kit.bus.call(Jobs.submit, JobSpec("first", "trainer/1.train", {"dataset": "d"}, Resources(0.5, 16)))
    await kit.job(one.id, lambda j: j.checkpoint)
    two = await kit.bus.call(Jobs.submit, JobSpec("second", "trainer/1.train", {"dataset": "d"}, Resources(0.5, 16), tenant="t"))
    await kit.job(one.id, lambda j: j.state == "done" and not j.checkpoint)
    assert handed == saved
    await stay(kit, *saved)
    over.set()
    await kit.job(two.id, lambda j: j.state == "done")
