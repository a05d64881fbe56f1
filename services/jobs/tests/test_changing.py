"""Jobs that grow, shrink and move while they run, and jobs of several instances, through a real broker, kernel and job service. Two
nodes are two of this process; what a scheduler decides is scripted where the default one would take longer."""

import asyncio
from typing import Any, ClassVar

import pytest

from kernelm.testing.harness import until
from kernelm.testing.node import InlineNode
from kernelm_contracts.jobs import JobRecord, Jobs, JobSpec
from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, Share
from kernelm_contracts.trainer import Trained, TrainRequest
from kernelm_scheduler.plugin import SchedulerPlugin
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.plugin import Call, Job
from kernelm_sdk.system import Resources

Kit = Any  # of conftest.py, which can't be imported
TRAIN = {"dataset": "d", "algorithm": "adamw"}


class Wilful(SchedulerPlugin):
    """The default scheduler, and once, for placed jobs of a name, what a test wants."""

    wants: ClassVar[dict[str, tuple[str, tuple[Share, ...]]]] = {}  # job's name -> action, allocation

    async def update(self, request: Any, call: Call) -> Decisions:
        raise ClientFault("unsupported_method", "whole states only")

    async def decide(self, request: ClusterState, call: Call) -> Decisions:
        answer = await super().decide(request, call)
        decided = {d.job for d in answer.decisions}
        more = []
        for job in request.placed:
            if job.name in self.wants and job.movable and job.id not in decided:
                action, allocation = self.wants.pop(job.name)
                more.append(Decision(job.id, action, allocation[0].node, job.plugins[0], "a test", 0.0, allocation))  # type: ignore[arg-type]
        return Decisions(answer.version, (*answer.decisions, *more))


class Steps:
    """A training of ten steps that goes on where its checkpoint was, waits at step four until it is let go, and notes its cores."""

    def __init__(self, kit: Kit) -> None:
        self.kit, self.seen, self.go, self.there = kit, list[tuple[str, int, float]](), asyncio.Event(), asyncio.Event()

    async def act(self, request: TrainRequest, job: Job) -> Trained:
        first = int(job.checkpoint.rpartition("-")[2] or 0)
        assert job.resources is not None
        self.seen.append((job.context.instance, first, job.resources.cpu))
        for step in range(first, 10):
            job.progress(step / 10, "train")
            if step == 4 and not self.go.is_set():
                self.there.set()
                await self.go.wait()
                assert job.report is not None
                await job.report(f"sha256:step-{step}")
            await asyncio.sleep(0.02)
        return self.kit.trained("m")  # type: ignore[no-any-return]


def spec(name: str, cpu: float = 0.5, **more: Any) -> JobSpec:
    return JobSpec(name, "trainer/1.train", TRAIN | {"seed": len(name)}, Resources(cpu, 16), **more)


async def second_node(kit: Kit) -> InlineNode:
    manifests, factories = kit.node.manifests, kit.node.factories
    node: InlineNode = await kit.system.node({"trainer": (manifests["trainer"], factories["trainer"])}, "node-other")
    return node


async def test_a_job_changes_its_size_at_its_checkpoint_and_knows_its_cores(kit: Kit) -> None:
    kit.factories["scheduler"] = Wilful
    steps = Steps(kit)
    kit.acts["grow"] = steps.act
    await kit.pools("scheduler", "trainer")
    job: JobRecord = await kit.bus.call(Jobs.submit, spec("grow", most=4))
    await asyncio.wait_for(steps.there.wait(), 60)
    has = (await kit.job(job.id, lambda j: j.state == "running")).allocation
    Wilful.wants["grow"] = "resize", (Share("local", 3),)
    told = await kit.job(job.id, lambda j: j.target)
    assert (told.state, told.epoch, told.target, told.heir) == ("running", 1, (Share("local", 3),), told.instance)
    assert sum(s.members for s in has) == 4  # all that was free
    steps.go.set()
    done = await kit.job(job.id, lambda j: j.state == "done")
    assert (done.epoch, done.attempt, done.preemptions, done.target, done.stopping) == (2, 0, 0, (), 0.0)
    assert done.allocation == (Share("local", 3),)
    assert [(at, cpu) for _, at, cpu in steps.seen][-1] == (4, 1.5)


async def test_a_job_moves_to_another_node_at_its_checkpoint(kit: Kit) -> None:
    kit.factories["scheduler"] = Wilful
    steps = Steps(kit)
    kit.acts["move"] = steps.act
    await kit.pools("scheduler", "trainer")
    job: JobRecord = await kit.bus.call(Jobs.submit, spec("move"))
    await asyncio.wait_for(steps.there.wait(), 60)
    await second_node(kit)
    await kit.system.pool(kit.pool("trainer-other", "trainer", node="other"))
    Wilful.wants["move"] = "migrate", (Share("other", 1),)
    told = await kit.job(job.id, lambda j: j.target)
    assert told.heir not in ("", told.instance)
    steps.go.set()
    done = await kit.job(job.id, lambda j: j.state == "done")
    assert (done.node, done.instance, done.epoch, done.attempt) == ("other", told.heir, 2, 0)
    assert [at for _, at, _ in steps.seen] == [0, 4]
    assert steps.seen[0][0] != steps.seen[1][0]


async def test_a_move_is_called_off_when_no_checkpoint_comes(kit: Kit) -> None:
    (kit.system.home / "jobs.toml").write_text("preempt_after_s = 0.5\nround_every_s = 0.5\n")
    await kit.restart_jobs()
    kit.factories["scheduler"] = Wilful
    steps = Steps(kit)
    kit.acts["stay"] = steps.act
    await kit.pools("scheduler", "trainer")
    job: JobRecord = await kit.bus.call(Jobs.submit, spec("stay", most=2))
    await asyncio.wait_for(steps.there.wait(), 60)
    Wilful.wants["stay"] = "resize", (Share("local", 2),)
    called_off = await kit.job(job.id, lambda j: j.why.startswith("stays as it is"))
    assert (called_off.state, called_off.epoch, called_off.target) == ("running", 1, ())
    steps.go.set()
    done = await kit.job(job.id, lambda j: j.state == "done")
    assert [at for _, at, _ in steps.seen] == [0]
    assert done.epoch == 1


async def test_what_can_not_be_moved_is_refused_and_stays(kit: Kit) -> None:
    kit.factories["scheduler"] = Wilful
    steps = Steps(kit)
    kit.acts["fixed"] = steps.act
    await kit.pools("scheduler", "trainer")
    job: JobRecord = await kit.bus.call(Jobs.submit, spec("fixed"))
    await asyncio.wait_for(steps.there.wait(), 60)
    log = kit.system.home / "logs" / "jobs.log"

    def refused() -> bool:
        Wilful.wants["fixed"] = "resize", (Share("local", 2),)  # again, as schedulers do: a round may be overtaken by what happens
        return "a gang starts whole or not at all" in log.read_text()

    await until(refused, 20.0, "the refusal in the log")
    Wilful.wants.clear()
    steps.go.set()
    done = await kit.job(job.id, lambda j: j.state == "done")
    assert done.epoch == 1
    for bad in ({"most": 0}, {"most": 2, "gang": 2}):
        with pytest.raises(ClientFault, match="`most` is"):
            await kit.bus.call(Jobs.submit, spec("bad", **bad))


class Ring:
    """Members of a gang that meet at rank 0 over TCP and add up their ranks. `fails`: the rank that fails, the first time."""

    def __init__(self, kit: Kit, fails: int = -1) -> None:
        self.kit, self.fails, self.seen = kit, fails, list[tuple[int, int, int]]()  # attempt, rank, peers

    async def act(self, request: TrainRequest, job: Job) -> Trained:
        self.seen.append((job.attempt, job.rank, len(job.peers)))
        if job.rank == self.fails and job.attempt == 1:
            raise PluginFault("broken", "this member fails", retriable=True)
        return await (self.lead(job) if job.rank == 0 else self.join(job))

    async def lead(self, job: Job) -> Trained:
        total, all_there = 0, asyncio.Event()
        heard = list[int]()

        async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.append(int(await reader.readline()))
            if len(heard) == len(job.peers) - 1:
                all_there.set()
            await all_there.wait()
            writer.write(b"done\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(meet, "127.0.0.1", 0)
        try:
            host, port = server.sockets[0].getsockname()
            await job.announce(f"{host}:{port}")
            await all_there.wait()
            total = sum(heard)
        finally:
            server.close()
        return self.kit.trained(f"sum {total}")  # type: ignore[no-any-return]

    async def join(self, job: Job) -> Trained:
        host, _, port = job.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{job.rank}\n".encode())
        await writer.drain()
        await reader.readline()
        writer.close()
        return self.kit.trained("of a follower: not looked at")  # type: ignore[no-any-return]


async def test_a_gang_waits_for_all_its_members_and_works_as_one(kit: Kit) -> None:
    ring = Ring(kit)
    kit.acts["gang"] = ring.act
    await kit.pools("scheduler", "trainer")
    job: JobRecord = await kit.bus.call(Jobs.submit, spec("gang", gang=3))
    waiting = await kit.job(job.id, lambda j: "needs 3 instances of trainer at once" in j.why)
    assert (waiting.state, ring.seen) == ("queued", [])  # one instance is free, and none of it is taken
    await kit.system.pool(kit.pool("more", "trainer", instances=2))
    done = await kit.job(job.id, lambda j: j.state == "done", 30.0)
    assert done.result["model"] == "sum 3"
    assert sorted(ring.seen) == [(1, 0, 3), (1, 1, 3), (1, 2, 3)]
    assert len(set(done.gang)) == 3
    assert done.gang[0] == done.instance


async def test_a_gang_fails_as_a_whole_and_is_tried_again_as_a_whole(kit: Kit) -> None:
    ring = Ring(kit, fails=1)
    kit.acts["gang"] = ring.act
    await kit.pools("scheduler")
    await kit.system.pool(kit.pool("trainer", "trainer", instances=3))
    job: JobRecord = await kit.bus.call(Jobs.submit, spec("gang", gang=3))
    failed = await kit.job(job.id, lambda j: j.attempt == 1)
    assert "rank 1" in failed.fault.message
    done = await kit.job(job.id, lambda j: j.state == "done", 30.0)
    assert (done.result["model"], done.attempt) == ("sum 3", 1)
    assert {rank for attempt, rank, _ in ring.seen if attempt == 2} == {0, 1, 2}
