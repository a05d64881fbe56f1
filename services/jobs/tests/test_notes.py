"""What an instance has to say of how it does a job, through a real broker, kernel, job service and artifact store."""

from typing import Any

from kernelm.testing.harness import until
from kernelm_contracts.jobs import JobChanged, JobName, Jobs, JobSpec
from kernelm_contracts.trainer import Trained, TrainRequest
from kernelm_sdk.errors import PluginFault
from kernelm_sdk.events import Received
from kernelm_sdk.plugin import Job
from kernelm_sdk.system import Resources

Kit = Any  # of conftest.py, which can't be imported


async def test_a_job_that_begins_anew_says_so_on_its_record_and_in_an_event(kit: Kit) -> None:
    """The first attempt leaves a checkpoint as an older version of the plugin would, the second is of the new version."""
    seen: list[Any] = []

    async def act(request: TrainRequest, job: Job) -> Trained:
        if job.attempt == 1:
            folder = job.scratch / "checkpoint"
            folder.mkdir()
            (folder / "state.json").write_text("{}")
            await job.save(folder, format=1)
            raise PluginFault("killed", "as if by an upgrade", retriable=True)
        seen.extend([job.checkpoint, await job.resume(2), await kit.bus.call(Jobs.get, JobName(job.id))])
        return kit.trained("m")  # type: ignore[no-any-return]

    events: list[JobChanged] = []

    async def note(received: Received) -> None:
        assert isinstance(received.event, JobChanged)
        events.append(received.event)

    await kit.bus.follow(note, "evt.job.state.*")
    kit.acts["train"] = act
    await kit.system.service("artifacts")
    await kit.pools("scheduler", "trainer")
    job = await kit.bus.call(Jobs.submit, JobSpec("train", "trainer/1.train", {"dataset": "d"}, Resources(0.5, 16)))
    await kit.job(job.id, lambda j: j.state == "done")
    checkpoint, folder, record = seen
    assert (checkpoint != "", folder) == (True, None)
    assert (record.state, "of format 1 of trainer" in record.why, "begins anew" in record.why) == ("running", True, True)
    assert record.progress.message == record.why
    assert record.left == checkpoint, "no twin is sent to it"
    await until(lambda: any(e.why == record.why and e.state == "running" for e in events))
