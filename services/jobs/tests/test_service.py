"""The job table through a real broker and a real kernel: placing, fencing, resuming, deploying."""

import asyncio
import time
from collections import Counter
from typing import Any

import msgspec
import pytest

from kernelm.testing.harness import until
from kernelm_contracts.jobs import JobChanged, JobName, JobQuery, Jobs, JobSpec, RunName
from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, Scheduler
from kernelm_contracts.trainer import Trained, TrainRequest
from kernelm_scheduler.plugin import SchedulerPlugin
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.events import Received
from kernelm_sdk.plugin import Job, JobCancelled
from kernelm_sdk.system import InstanceChanged, Report, Work

Kit = Any  # of conftest.py, which can't be imported
PREPARE = {"uses": "data/1.prepare", "with": {"source": "s"}, "resources": {"cpu": 0.5}}
TRAIN = {"uses": "trainer/1.train", "with": {"dataset": "${prepare.dataset}"}}
ALONE = {"uses": "trainer/1.train", "with": {"dataset": "d"}}


async def forever(request: TrainRequest, job: Job) -> Trained:
    for step in range(10_000):
        job.progress(step / 10_000, "train")
        await asyncio.sleep(0.05)
    raise AssertionError("never taken away")


async def test_a_run_goes_through_and_the_next_one_reuses_it(kit: Kit) -> None:
    await kit.pools("scheduler", "data", "trainer")
    run = await kit.submit(PREPARE, TRAIN)
    frames = [view async for view in kit.bus.stream(Jobs.follow_run, RunName(run.id))]
    assert frames[-1].run.state == "done"
    assert [(j.id, j.state, j.attempt, j.node) for j in frames[-1].jobs] == [("news-1-prepare", "done", 0, "local"),
                                                                            ("news-1-train", "done", 0, "local")]  # fmt: skip
    assert frames[-1].jobs[1].result["model"] == "model of d"
    again = await kit.end((await kit.submit(PREPARE, TRAIN)).id)
    assert again.run.id == "news-2"
    assert [(j.state, j.reused) for j in again.jobs] == [("done", True), ("done", True)]
    assert again.jobs[1].result == frames[-1].jobs[1].result
    assert [name for name, _, _ in kit.done] == ["train"]  # once in all
    found = (await kit.bus.call(Jobs.find, JobQuery(state="done"))).jobs
    assert {j.id for j in found} == {"news-1-prepare", "news-1-train", "news-2-prepare", "news-2-train"}
    for _ in range(2):
        await kit.bus.call(Jobs.submit, JobSpec("other", "trainer/1.train", {"dataset": "e"}, tenant="initech"))
    newest = await kit.bus.call(Jobs.find, JobQuery(limit=1, tenant="default"))
    assert ([j.spec.tenant for j in newest.jobs], newest.total) == (["default"], 4), "the newest of a tenant, not of all"
    assert (await kit.bus.call(Jobs.find, JobQuery(state="no such", tenant="initech"))).total == 0


async def test_the_same_run_under_way_is_the_same_run(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer")
    kit.acts["train"] = forever
    first = await kit.submit(ALONE)
    assert (await kit.submit(ALONE)).id == first.id
    other = await kit.submit(ALONE | {"with": {"dataset": "e"}})
    assert other.id != first.id


async def test_bad_input_fails_at_once_and_ends_in_the_dead_letter_queue(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer")

    async def refuse(request: TrainRequest, job: Job) -> Trained:
        raise ClientFault("invalid", "class 'sport' has one document", "add some")

    kit.acts["train"] = refuse
    view = await kit.end((await kit.submit(ALONE)).id)
    assert view.run.state == "failed"
    assert view.run.fault is not None
    assert view.run.fault.message == "stage 'train': class 'sport' has one document"
    assert (view.jobs[0].state, view.jobs[0].attempt, len(kit.done)) == ("dead", 1, 1)

    async def letters() -> list[str]:
        return [subject async for _, subject, _, _ in kit.bus.read("DLQ")]

    assert await until(letters) == ["dlq.jobs.news-1-train"]


async def test_a_cancelled_run_s_half_done_work_is_taken_up_by_the_next_run(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer")
    saved = asyncio.Event()

    async def half(request: TrainRequest, job: Job) -> Trained:
        if not job.checkpoint:
            assert job.report is not None
            await job.report("sha256:half")
            saved.set()
            return await forever(request, job)
        return kit.trained(f"from {job.checkpoint}")

    kit.acts["train"] = half
    first = await kit.submit(ALONE)
    await asyncio.wait_for(saved.wait(), 60)
    await kit.bus.call(Jobs.cancel_run, RunName(first.id))
    view = await kit.end((await kit.submit(ALONE)).id)
    assert (view.run.state, view.jobs[0].result["model"]) == ("done", "from sha256:half")


async def test_a_killed_worker_s_job_goes_on_from_its_checkpoint(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer")
    saved = asyncio.Event()

    async def train(request: TrainRequest, job: Job) -> Trained:
        if job.attempt == 1:
            assert job.report is not None
            job.progress(0.5, "train")
            await job.report("sha256:half")
            saved.set()
            await forever(request, job)
        return kit.trained(f"from {job.checkpoint}")

    kit.acts["train"] = train
    run = await kit.submit(ALONE)
    await asyncio.wait_for(saved.wait(), 60)
    job = (await kit.view(run.id)).jobs[0]
    assert (job.state, job.epoch, job.checkpoint) == ("running", 1, "sha256:half")
    await kit.node.kill(job.instance)
    view = await kit.end(run.id)
    after = view.jobs[0]
    assert (after.state, after.epoch, after.attempt, after.result["model"]) == ("done", 2, 1, "from sha256:half")
    assert after.instance != job.instance
    assert kit.done == [("train", 1, ""), ("train", 2, "sha256:half")]


async def test_who_lost_a_job_can_write_nothing_to_it(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer")
    kit.acts["train"] = forever
    run = await kit.submit(ALONE)
    job = await kit.job(f"{run.id}-train", lambda j: j.state == "running")
    owner = kit.node.members[job.instance][0].bus
    result = msgspec.to_builtins(kit.trained("forged"))
    intruder: Bus = await kit.system.connect("gateway")
    with pytest.raises(ClientFault, match="gateway reports") as refusal:
        await intruder.call(Work.report, Report(job.id, job.epoch, result=result))
    assert refusal.value.code == "stale_epoch"
    for epoch in (job.epoch - 1, job.epoch + 1):
        with pytest.raises(ClientFault) as refusal:
            await owner.call(Work.report, Report(job.id, epoch, checkpoint="sha256:old", result=result))
        assert refusal.value.code == "stale_epoch"
    now = await kit.bus.call(Jobs.get, JobName(job.id))
    assert (now.state, now.checkpoint, now.result) == ("running", "", {})
    for checkpoint in ("sha256:1", "sha256:2", "sha256:1"):  # the last one is the first one again, late
        await owner.call(Work.report, Report(job.id, job.epoch, checkpoint=checkpoint))
    assert (await kit.bus.call(Jobs.get, JobName(job.id))).checkpoint == "sha256:2"
    await owner.call(Work.report, Report(job.id, job.epoch, result=result))
    await owner.call(Work.report, Report(job.id, job.epoch, result=result))  # its answer was lost: told again
    assert (await kit.bus.call(Jobs.get, JobName(job.id))).state == "done"


async def test_only_the_kernel_s_word_on_an_instance_counts(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer")
    kit.acts["train"] = forever
    run = await kit.submit(ALONE)
    job = await kit.job(f"{run.id}-train", lambda j: j.state == "running")
    lie = InstanceChanged(instance=job.instance, plugin="trainer", pool="trainer", state="lost", was="ready")
    with pytest.raises(ClientFault, match="may not publish"):
        await kit.node.members[job.instance][0].bus.publish(lie)
    await kit.bus.publish(lie)  # the administrator may publish anything, and is not the kernel
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        now = await kit.bus.call(Jobs.get, JobName(job.id))
        assert (now.state, now.epoch) == ("running", job.epoch), now.why


async def test_without_a_scheduler_jobs_wait_and_say_so(kit: Kit) -> None:
    await kit.pools("trainer")
    run = await kit.submit(ALONE)
    job = await kit.job(f"{run.id}-train", lambda j: "no scheduler" in j.why)
    assert (job.state, job.epoch) == ("queued", 0)
    await kit.pools("scheduler")
    assert (await kit.end(run.id)).run.state == "done"


async def test_what_does_not_fit_waits_with_a_reason_and_what_never_fits_is_rejected(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer", "data")
    kit.acts["train"] = forever
    first = await kit.submit(ALONE | {"resources": {"cpu": 1.5}})
    await kit.job(f"{first.id}-train", lambda j: j.state == "running")
    second = await kit.submit(PREPARE | {"resources": {"cpu": 1.0}}, name="second")
    waiting = await kit.job(f"{second.id}-prepare", lambda j: j.why)
    assert (waiting.state, waiting.why) == ("queued", "waits: needs 1 core, node local has 0.5 free")
    never = await kit.end((await kit.submit(PREPARE | {"resources": {"cpu": 3.0}}, name="third")).id)
    assert never.run.fault is not None
    assert "can never run: needs 3 cores, node local has 2 in all" in never.run.fault.message
    await kit.bus.call(Jobs.cancel_run, RunName(first.id))
    assert (await kit.end(second.id)).run.state == "done"


async def test_the_service_may_die_while_jobs_run(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer")
    go = asyncio.Event()

    async def train(request: TrainRequest, job: Job) -> Trained:
        job.progress(0.1, "train")
        await go.wait()
        return kit.trained()

    kit.acts["train"] = train
    run = await kit.submit(ALONE, ALONE | {"name": "second", "with": {"dataset": "${train.model}"}})
    await kit.job(f"{run.id}-train", lambda j: j.state == "running")
    kit.system.processes["jobs"].kill()
    await asyncio.to_thread(kit.system.processes["jobs"].wait)
    go.set()  # the result is reported while nobody listens, and again until somebody does
    await kit.system.service("jobs")
    view = await kit.end(run.id)
    assert [(j.state, j.epoch, j.attempt) for j in view.jobs] == [("done", 1, 0), ("done", 1, 0)]
    assert [name for name, _, _ in kit.done] == ["train", "second"]


async def test_a_silent_job_is_taken_away_and_its_instance_stopped(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer")

    async def hang(request: TrainRequest, job: Job) -> Trained:
        if job.attempt == 1:
            job.progress(0.3, "load", deadline_s=0.5)
            await asyncio.sleep(60)
        return kit.trained()

    kit.acts["train"] = hang
    view = await kit.end((await kit.submit(ALONE)).id)
    assert [(j.state, j.attempt, j.epoch) for j in view.jobs] == [("done", 1, 2)]
    assert len(kit.node.stopped) == 1


async def test_attempts_are_limited_and_the_last_fault_stands(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer")

    async def boom(request: TrainRequest, job: Job) -> Trained:
        raise ValueError("nan")

    kit.acts["train"] = boom
    view = await kit.end((await kit.submit(ALONE | {"attempts": 2})).id)
    assert (view.run.state, view.jobs[0].state, view.jobs[0].attempt) == ("failed", "dead", 2)
    assert view.run.fault is not None
    assert "ValueError: nan" in view.run.fault.message
    retry = await kit.submit(ALONE | {"attempts": 2})
    assert retry.id == "news-2"  # a failure is not reused


async def test_cancelling_a_run_ends_jobs_and_their_children(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer", "encoder")
    cancelled = asyncio.Event()

    async def parent(request: TrainRequest, job: Job) -> Trained:
        spec = JobSpec("child", "data/1.prepare", {"source": "s"}, parent=job.id, tenant="other")
        first, second = await job.context.call(Jobs.submit, spec), await job.context.call(Jobs.submit, spec)
        assert first.id == second.id
        assert (first.spec.run, first.spec.tenant) == (job.run_id, "default")
        try:
            return await forever(request, job)
        except (JobCancelled, asyncio.CancelledError):
            cancelled.set()
            raise

    kit.acts["train"] = parent
    run = await kit.submit(ALONE | {"resources": {"cpu": 0.5}})

    async def with_child() -> bool:
        return len((await kit.view(run.id)).jobs) == 2

    await until(with_child)
    view = await kit.view(run.id)
    assert [j.spec.name for j in view.jobs] == ["train", "child"]
    await kit.bus.call(Jobs.cancel_run, RunName(run.id))
    await asyncio.wait_for(cancelled.wait(), 60)
    view = await kit.end(run.id)
    assert view.run.state == "cancelled"
    assert [j.state for j in view.jobs] == ["cancelled", "cancelled"]


class Greedy(SchedulerPlugin):
    """A scheduler with a bug: everything goes to the first node, whatever is free there."""

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        return Decisions(request.version, tuple(Decision(j.id, "place", "local", j.plugins[0], "why not") for j in request.pending))

    update = Scheduler.update  # takes no deltas


async def test_a_scheduler_that_oversubscribes_is_refused_loudly(kit: Kit) -> None:
    kit.factories["scheduler"] = Greedy
    await kit.pools("scheduler", "trainer", "data")
    changes: list[JobChanged] = []

    async def note(received: Received) -> None:
        assert isinstance(received.event, JobChanged)
        changes.append(received.event)

    await kit.bus.follow(note, "evt.job.state.*")
    kit.acts["train"] = forever
    first = await kit.submit(ALONE | {"resources": {"cpu": 1.5}})
    await kit.job(f"{first.id}-train", lambda j: j.state == "running")
    second = await kit.submit(PREPARE | {"resources": {"cpu": 1.0}}, name="second")
    job = await kit.job(f"{second.id}-prepare", lambda j: "oversubscribed" in j.why)
    assert (job.state, job.epoch) == ("queued", 0)
    await until(lambda: any(c.state == "queued" and "oversubscribed node local" in c.why for c in changes))
    await kit.bus.call(Jobs.cancel_run, RunName(first.id))
    assert (await kit.end(second.id)).run.state == "done"


async def test_a_child_that_can_not_run_beside_its_parent_does_not_hang_the_run(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer", "data")

    async def parent(request: TrainRequest, job: Job) -> Trained:
        child = await job.context.call(Jobs.submit, JobSpec("child", "data/1.prepare", {"source": "s"}, parent=job.id))
        while child.state not in ("done", "dead"):
            await asyncio.sleep(0.05)
            child = await job.context.call(Jobs.get, JobName(child.id))
        assert child.fault is not None
        raise ClientFault(child.fault.code, child.fault.message, child.fault.remedy)

    kit.acts["train"] = parent
    view = await kit.end((await kit.submit(ALONE | {"resources": {"cpu": 1.5}})).id)
    assert view.run.fault is not None
    assert view.run.fault.message.endswith("beside the jobs that wait for it: train holds 1.5 cores, 512 MiB, 0 GPUs")


@pytest.mark.slow
async def test_killed_again_and_again_the_service_loses_and_repeats_nothing(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer")

    worked: Counter[str] = Counter()

    async def train(request: TrainRequest, job: Job) -> Trained:
        worked[job.name] += 1
        job.progress(0.5, "train")
        await asyncio.sleep(0.3)
        return kit.trained(f"after {request.dataset}")

    names = [f"s{i}" for i in range(8)]
    kit.acts.update(dict.fromkeys(names, train))
    stages = [ALONE | {"name": name, "with": {"dataset": f"${{{before}.model}}" if before else "d"}}
              for before, name in zip(["", *names], names, strict=False)]  # fmt: skip
    run = await kit.submit(*stages)
    for pause in (0.2, 0.5, 0.05, 0.35, 0.1):
        await asyncio.sleep(pause)
        await kit.restart_jobs()
    view = await kit.end(run.id, 40.0)
    # the epoch may be more than 1: an instance that still waits for the answer to its last report declines the next job
    assert [(j.spec.name, j.state, j.attempt) for j in view.jobs] == [(name, "done", 0) for name in names]
    assert worked == dict.fromkeys(names, 1)
    assert [name for name, _, _ in kit.done] == names


@pytest.mark.slow
async def test_a_killed_broker_costs_no_attempt(kit: Kit) -> None:
    await kit.pools("scheduler", "trainer")
    go = asyncio.Event()

    async def train(request: TrainRequest, job: Job) -> Trained:
        job.progress(0.5, "train")
        await go.wait()
        return kit.trained()

    kit.acts["train"] = train
    run = await kit.submit(ALONE, ALONE | {"name": "second", "with": {"dataset": "${train.model}"}})
    await kit.job(f"{run.id}-train", lambda j: j.state == "running")
    kit.system.processes["broker"].kill()
    await asyncio.to_thread(kit.system.processes["broker"].wait)
    go.set()
    await asyncio.sleep(1.0)  # the outage
    kit.system.start_broker()
    last = await kit.job(f"{run.id}-second", lambda j: j.state == "done", 40.0)
    assert last.attempt == 0
    assert [name for name, _, _ in kit.done] == ["train", "second"]


async def test_a_deployment_can_be_cancelled_while_it_starts(kit: Kit) -> None:
    await kit.pools("scheduler")
    run = await kit.submit(kit.deploy("slow"))
    await kit.job(f"{run.id}-deploy", lambda j: j.progress.phase == "starting")
    await kit.bus.call(Jobs.cancel_run, RunName(run.id))
    assert (await kit.end(run.id)).jobs[0].state == "cancelled"

    async def gone() -> bool:
        return all(not p.pool.startswith("news-g1") for p in (await kit.system.state()).pools)

    await until(gone)
    assert (await kit.end((await kit.submit(kit.deploy("m1"))).id)).jobs[0].result["generation"] == 2  # no number twice


async def test_a_deployment_goes_on_after_the_service_was_killed(kit: Kit) -> None:
    await kit.pools("scheduler")
    await kit.end((await kit.submit(kit.deploy("m1"))).id)
    run = await kit.submit(kit.deploy("held"))
    await kit.job(f"{run.id}-deploy", lambda j: j.progress.phase == "starting")
    await kit.restart_jobs()
    assert not (await kit.view(run.id)).jobs[0].result  # it is still loading
    kit.loaded.set()
    view = await kit.end(run.id)
    assert (view.run.state, view.jobs[0].epoch, view.jobs[0].result["generation"]) == ("done", 1, 2)


async def test_a_model_is_deployed_replaced_and_not_deployed_twice(kit: Kit) -> None:
    await kit.pools("scheduler")
    old, new = (f"news-g{n}-{kit.digest(f'm{n}')[7:15]}" for n in (1, 2))
    first = await kit.end((await kit.submit(kit.deploy("m1"))).id)
    assert first.run.state == "done", first.run.fault
    assert first.jobs[0].result == {"model": "news", "generation": 1, "artifact": kit.digest("m1"), "pool": old}
    assert first.jobs[0].state == "running"  # it holds its resources
    again = await kit.end((await kit.submit(kit.deploy("m1"))).id)
    assert (again.jobs[0].reused, again.jobs[0].result) == (True, first.jobs[0].result)
    second = await kit.end((await kit.submit(kit.deploy("m2"))).id)
    assert second.jobs[0].result["generation"] == 2
    await kit.job(first.jobs[0].id, lambda j: j.state == "done")

    async def only_new() -> bool:
        state = await kit.system.state()
        return [p.pool for p in state.pools] == ["scheduler", new]

    await until(only_new)
    route = next(r for r in (await kit.system.state()).routes if r.name == "news")
    assert (route.generation, route.artifact, [d.pool for d in route.to]) == (2, kit.digest("m2"), [new])
    with pytest.raises(ClientFault, match="serves deployment 'news'"):
        await kit.bus.call(Jobs.cancel, JobName(second.jobs[0].id))
    await kit.restart_jobs()
    assert (await kit.end((await kit.submit(kit.deploy("m2"))).id)).jobs[0].reused


@pytest.mark.slow
async def test_a_model_that_can_not_be_loaded_leaves_the_old_one_in_place(kit: Kit) -> None:
    await kit.pools("scheduler")
    old = await kit.end((await kit.submit(kit.deploy("m1"))).id)
    failed = await kit.end((await kit.submit(kit.deploy("broken") | {"attempts": 1})).id, 40.0)
    assert failed.run.state == "failed"
    assert failed.run.fault is not None
    assert "news-g2" in failed.run.fault.message
    state = await kit.system.state()
    assert [d.pool for r in state.routes if r.name == "news" for d in r.to] == [old.jobs[0].result["pool"]]
    assert any(i.pool == old.jobs[0].result["pool"] and i.state == "ready" for i in state.instances)
    assert all(not p.pool.startswith("news-g2") for p in state.pools)
