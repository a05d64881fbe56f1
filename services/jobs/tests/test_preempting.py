"""Making room and saying why, through a real broker and kernel: a burst job gives way at its checkpoint, and comes back."""

import asyncio

from msgspec.structs import replace

from kernelm_contracts.jobs import JobName, Jobs, JobSpec, Outlook, Plan, RunSpec, StageSpec
from kernelm_contracts.trainer import Trained, TrainRequest
from kernelm_scheduler.plugin import SchedulerPlugin
from kernelm_scheduler.settings import Preemption, Settings
from kernelm_sdk.plugin import Context, Job
from kernelm_sdk.system import Resources

TRAIN = {"dataset": "d", "algorithm": "adamw"}


class Quick(SchedulerPlugin):
    """Stops jobs however short they have run."""

    def __init__(self, context: Context, settings: Settings) -> None:
        super().__init__(context, replace(settings, preemption=Preemption(rest_s=0.0)))


def spec(name: str, cpu: float, **more) -> JobSpec:
    return JobSpec(name, "trainer/1.train", TRAIN | {"seed": len(name)}, Resources(cpu, 16), **more)


async def test_a_burst_job_makes_room_at_its_checkpoint_and_goes_on_from_it(kit) -> None:
    kit.factories["scheduler"] = Quick
    go, begun = asyncio.Event(), asyncio.Event()

    async def burst(request: TrainRequest, job: Job) -> Trained:
        if job.checkpoint:
            return kit.trained(f"from {job.checkpoint}")
        begun.set()
        await go.wait()
        assert job.report is not None
        await job.report("sha256:half")
        await asyncio.Event().wait()
        raise AssertionError

    async def urgent(request: TrainRequest, job: Job) -> Trained:
        return kit.trained("urgent")

    kit.acts |= {"burst": burst, "urgent": urgent}
    await kit.pools("scheduler", "trainer", "trainer")
    first = await kit.bus.call(Jobs.submit, spec("burst", 1.5, preemptible=True))
    await asyncio.wait_for(begun.wait(), 60)
    second = await kit.bus.call(Jobs.submit, spec("urgent", 1.0))
    told = await kit.job(first.id, lambda j: j.stopping > 0)
    assert (told.state, told.epoch) == ("running", 1)  # it works on until its checkpoint
    assert "preemptible" in told.why
    waiting = await kit.job(second.id, lambda j: j.why == "waits: others make room for it")
    assert waiting.state == "queued"
    go.set()
    done = await kit.job(second.id, lambda j: j.state == "done")
    assert done.result["model"] == "urgent"
    back = await kit.job(first.id, lambda j: j.state == "done")
    assert (back.result["model"], back.attempt, back.preemptions, back.stopping) == ("from sha256:half", 0, 1, 0.0)


async def test_why_and_plan_say_what_the_scheduler_would(kit) -> None:
    async def forever(request: TrainRequest, job: Job) -> Trained:
        await asyncio.Event().wait()
        raise AssertionError

    kit.acts |= {"long": forever, "later": forever}
    await kit.pools("scheduler", "trainer", "trainer")
    first = await kit.bus.call(Jobs.submit, spec("long", 1.5, estimate_s=1000.0))
    await kit.job(first.id, lambda j: j.state == "running")
    second = await kit.bus.call(Jobs.submit, spec("later", 1.0))
    await kit.job(second.id, lambda j: j.why.startswith("waits"))
    outlook: Outlook = await kit.bus.call(Jobs.why, JobName(second.id))
    assert (outlook.state, outlook.action) == ("queued", "wait")
    assert outlook.reason == (await kit.job(second.id, lambda j: True)).why
    assert outlook.remedy
    assert outlook.starts > first.submitted + 900.0  # when the first one ends, by its estimate
    assert (await kit.bus.call(Jobs.why, JobName(first.id))).state == "running"
    stages = (StageSpec("small", "trainer/1.train", TRAIN, resources=Resources(0.25, 16), estimate_s=5.0),
              StageSpec("vast", "trainer/1.train", TRAIN, resources=Resources(99.0, 16)))  # fmt: skip
    plan: Plan = await kit.bus.call(Jobs.plan, RunSpec("p", stages))
    assert [(s.name, s.action, s.node) for s in plan.stages] == [("small", "wait", ""), ("vast", "reject", "")]
    assert plan.stages[0].reason == "waits: every instance of trainer on node local is at work"
    await kit.bus.call(Jobs.cancel, JobName(first.id))
    await kit.bus.call(Jobs.cancel, JobName(second.id))
    plan = await kit.bus.call(Jobs.plan, RunSpec("p", stages[:1]))
    assert (plan.stages[0].action, plan.stages[0].node) == ("place", "local")


async def test_why_counts_those_that_come_before_it_whatever_the_ids_are(kit) -> None:
    async def forever(request: TrainRequest, job: Job) -> Trained:
        await asyncio.Event().wait()
        raise AssertionError

    kit.acts |= {"first": forever}
    await kit.pools("scheduler", "trainer", "trainer")
    first = await kit.bus.call(Jobs.submit, spec("first", 1.5))
    await kit.job(first.id, lambda j: j.state == "running")
    waiting: list[str] = []
    for ahead, name in enumerate(("zebras", "mule", "ape", "antelope")):  # ids begin with the name
        job = await kit.bus.call(Jobs.submit, spec(name, 1.0, priority=-ahead))
        await kit.job(job.id, lambda j: j.why.startswith("waits"))
        waiting.append(job.id)
        outlook: Outlook = await kit.bus.call(Jobs.why, JobName(job.id))  # each time on what has changed since the last one
        assert (name, outlook.ahead) == (name, ahead)
    assert [(await kit.bus.call(Jobs.why, JobName(id))).ahead for id in waiting] == [0, 1, 2, 3]
    await kit.bus.call(Jobs.cancel, JobName(waiting[0]))
    assert [(await kit.bus.call(Jobs.why, JobName(id))).ahead for id in waiting[1:]] == [0, 1, 2]
