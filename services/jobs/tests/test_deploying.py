"""Deployments through a real broker, kernel and job service, under load: swaps, canaries, going back, crashes in between."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kernelm.testing.harness import until
from kernelm_contracts.deployments import Deployment, RollbackDeployment
from kernelm_contracts.jobs import JobRecord, Jobs, RunName
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Server
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import Bounds, Kernel, SwapRequest

Kit = Any  # of conftest.py, which can't be imported


def deploy(kit: Kit, model: str, **more: Any) -> dict[str, Any]:
    return {"uses": "deploy", "name": "deploy", "resources": {"cpu": 0.5}, "attempts": 3,
            "with": {"name": "news", "model": kit.digest(model)} | more}  # fmt: skip


class Caller:
    """Calls the deployment without a pause, four at a time, and counts what came back."""

    def __init__(self, kit: Kit) -> None:
        self.kit, self.answers, self.faults = kit, Counter[int](), Counter[str]()

    async def _call(self) -> None:
        while True:
            try:
                reply: ClassifyReply = await self.kit.bus.call(Server.classify, ClassifyRequest(("text",)), model="news")
                self.answers[reply.generation] += 1
            except Fault as fault:
                self.faults[fault.code] += 1
            await asyncio.sleep(0.002)

    @contextlib.asynccontextmanager
    async def calling(self) -> AsyncIterator["Caller"]:
        tasks = [asyncio.create_task(self._call()) for _ in range(4)]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def record(kit: Kit) -> Deployment:
    found, _ = await kit.bus.bucket("deployments", Deployment).get("model.news")
    assert found is not None
    return found


async def generation(kit: Kit, at_least: int = 0) -> int:
    reply: ClassifyReply = await kit.bus.call(Server.classify, ClassifyRequest(("text",), at_least=at_least), model="news")
    return reply.generation


async def test_a_model_is_replaced_under_load_and_nothing_is_lost(kit: Kit) -> None:
    await kit.pools("scheduler")
    assert (await kit.end((await kit.submit(deploy(kit, "m1"))).id)).run.state == "done"
    async with Caller(kit).calling() as caller:
        for number in (2, 3):
            before = caller.answers.total()
            view = await kit.end((await kit.submit(deploy(kit, f"m{number}"))).id)
            assert view.jobs[0].result["generation"] == number
            await until(lambda before=before: caller.answers.total() > before + 20)
            assert await generation(kit) == number
    assert not caller.faults
    assert set(caller.answers) == {1, 2, 3}
    assert [p.generation for p in (await record(kit)).history] == [2, 1]


async def test_a_client_that_has_seen_a_generation_is_never_served_an_older_one(kit: Kit) -> None:
    await kit.pools("scheduler")
    await kit.end((await kit.submit(deploy(kit, "m1"))).id)
    assert await generation(kit, at_least=1) == 1
    with pytest.raises(ClientFault) as caught:
        await generation(kit, at_least=2)
    assert (caught.value.code, caught.value.retriable, caught.value.details["generation"]) == ("stale_generation", True, 1)
    assert caught.value.details["pool"] == (await record(kit)).pool


async def test_a_canary_that_fails_goes_back_by_itself(kit: Kit) -> None:
    await kit.pools("scheduler")
    await kit.end((await kit.submit(deploy(kit, "m1"))).id)
    async with Caller(kit).calling() as caller:
        view = await kit.end((await kit.submit(deploy(kit, "failing", canary=20, watch_s=60.0, min_calls=10))).id, 50.0)
        assert view.run.state == "failed"
        job = view.jobs[0]
        assert (job.state, job.attempt) == ("dead", 1)  # as bad the next time: not tried again
        assert job.fault.code == "rolled_back"
        assert "which goes on serving" in job.fault.message
        assert "calls failed" in job.fault.message
        caller.faults.clear()
        done = caller.answers.total()
        await until(lambda: caller.answers.total() > done + 50)
        assert not caller.faults
        again = await kit.end((await kit.submit(deploy(kit, "m2", canary=20, watch_s=1.0))).id, 40.0)
    assert again.run.state == "done", again.run.fault
    assert again.jobs[0].result["generation"] == 3  # callers have seen 2
    state = await kit.system.state()
    assert all("-g2-" not in p.pool for p in state.pools)


async def test_a_deployment_is_rolled_back_to_the_model_before(kit: Kit) -> None:
    await kit.pools("scheduler")
    with pytest.raises(ClientFault, match="there is no deployment 'news'"):
        await kit.bus.call(Jobs.rollback, RollbackDeployment("news"))
    await kit.end((await kit.submit(deploy(kit, "m1"))).id)
    with pytest.raises(ClientFault, match="has served no other model"):
        await kit.bus.call(Jobs.rollback, RollbackDeployment("news"))
    await kit.end((await kit.submit(deploy(kit, "m2"))).id)
    job: JobRecord = await kit.bus.call(Jobs.rollback, RollbackDeployment("news", why="m2 is rude"))
    served = await kit.job(job.id, lambda j: j.result)
    assert (served.result["generation"], served.result["artifact"]) == (3, kit.digest("m1"))
    route = next(r for r in (await kit.system.state()).routes if r.name == "news")
    assert (route.generation, route.why) == (3, "m2 is rude")
    assert [(p.generation, p.artifact) for p in (await record(kit)).history] == [(2, kit.digest("m2")), (1, kit.digest("m1"))]


async def test_a_swap_goes_on_when_the_job_service_is_killed_while_it_watches(kit: Kit) -> None:
    await kit.pools("scheduler")
    await kit.end((await kit.submit(deploy(kit, "m1"))).id)
    async with Caller(kit).calling() as caller:
        run = await kit.submit(deploy(kit, "m2", canary=20, watch_s=6.0))
        await kit.job(f"{run.id}-deploy", lambda j: j.progress.phase == "watching")
        await kit.restart_jobs()
        view = await kit.end(run.id, 40.0)
    assert (view.run.state, view.jobs[0].epoch, view.jobs[0].result["generation"]) == ("done", 1, 2), view.run.fault
    assert not caller.faults
    assert len([s for s in (await kit.system.state()).swaps if s.pool == view.jobs[0].result["pool"]]) == 1


async def test_a_canary_that_is_promoted_has_all_calls_at_once(kit: Kit) -> None:
    await kit.pools("scheduler")
    await kit.end((await kit.submit(deploy(kit, "m1"))).id)
    async with Caller(kit).calling() as caller:
        run = await kit.submit(deploy(kit, "m2", canary=20, watch_s=120.0))
        await kit.job(f"{run.id}-deploy", lambda j: j.progress.phase == "watching")
        state = await kit.system.state()
        spec = next(p for p in state.pools if p.pool == state.swaps[-1].pool)
        await kit.bus.call(Kernel.swap, SwapRequest(spec, ("news",), bounds=Bounds(watch_s=0.0)))
        assert (await kit.end(run.id, 40.0)).run.state == "done"
        assert {await generation(kit) for _ in range(30)} == {2}
    assert not caller.faults
    assert [p.generation for p in (await record(kit)).history] == [1]


async def test_a_model_that_can_not_be_loaded_is_tried_once(kit: Kit) -> None:
    await kit.pools("scheduler")
    await kit.end((await kit.submit(deploy(kit, "m1"))).id)
    for more in ({}, {"canary": 20, "watch_s": 60.0}, {"checks": [{"text": "the sun", "expect": "bright"}]}):
        view = await kit.end((await kit.submit(deploy(kit, "unfit", **more))).id)
        [job] = view.jobs
        assert (view.run.state, job.state, job.attempt) == ("failed", "dead", 1)
        assert job.fault is not None
        assert (job.fault.whose, job.fault.code, job.fault.message) == ("client", "invalid_model", "weights.safetensors: too short")
        assert job.fault.remedy == "store it again"
    assert await generation(kit) == 1, "what served goes on"
    assert len({p.pool for p in (await kit.system.state()).pools if p.pool.startswith("news-")}) == 1


async def test_an_instance_that_is_killed_while_it_loads_is_tried_again(kit: Kit) -> None:
    await kit.pools("scheduler")
    run = await kit.submit(deploy(kit, "held"))

    async def loading() -> str:
        mine = [i for i in (await kit.system.state()).instances if i.pool.startswith("news-") and i.state == "joined"]
        return mine[0].id if mine else ""

    await kit.node.kill(await until(loading, 20.0, "an instance that loads"))
    again = await kit.job(f"{run.id}-deploy", lambda j: j.attempt == 1 and j.state == "running")
    assert again.fault is not None
    assert (again.fault.code, again.fault.retriable) == ("not_ready", True)
    kit.loaded.set()
    assert (await kit.end(run.id)).run.state == "done"


async def test_a_model_that_knows_too_little_never_gets_a_call(kit: Kit) -> None:
    await kit.pools("scheduler")
    known = {"checks": [{"text": "the sun", "expect": "bright"}, {"text": "the stars", "expect": "bright"},
                        {"text": "the void", "expect": "dark"}], "quality": 0.6}  # fmt: skip
    first = await kit.end((await kit.submit(deploy(kit, "m1", **known))).id)
    assert first.run.state == "done", first.run.fault
    async with Caller(kit).calling() as caller:
        view = await kit.end((await kit.submit(deploy(kit, "dull", **known))).id)
        assert view.run.state == "failed"
        assert view.run.fault is not None
        assert view.run.fault.code == "poor_quality"
        assert "0 of 3 known answers" in view.run.fault.message
        assert "'the sun' is answered with 'dull'" in view.run.fault.message
        assert view.jobs[0].attempt == 1  # it would be as bad the next time
        better = await kit.end((await kit.submit(deploy(kit, "m2", canary=50, watch_s=1.0, **known))).id)
        assert better.run.state == "done", better.run.fault
    assert set(caller.answers) == {1, 3}
    assert not caller.faults
    assert all("-g2-" not in p.pool for p in (await kit.system.state()).pools)
    assert {s.pool for s in (await kit.system.state()).swaps if s.routes and "-g2-" in s.pool} == set()


async def test_a_deployment_that_is_cancelled_while_it_is_watched_goes_back(kit: Kit) -> None:
    await kit.pools("scheduler")
    await kit.end((await kit.submit(deploy(kit, "m1"))).id)
    run = await kit.submit(deploy(kit, "m2", canary=20, watch_s=60.0))
    await kit.job(f"{run.id}-deploy", lambda j: j.progress.phase == "watching")
    await kit.bus.call(Jobs.cancel_run, RunName(run.id))

    async def back() -> bool:
        state = await kit.system.state()
        return state.swaps[-1].phase == "rolled_back" and all("-g2-" not in p.pool for p in state.pools)

    await until(back, 20.0)
    assert await generation(kit) == 1


async def test_a_patient_client_waits_for_the_generation_that_it_asks_for(kit: Kit) -> None:
    await kit.pools("scheduler")
    await kit.end((await kit.submit(deploy(kit, "m1"))).id)
    call = kit.bus.call(Server.classify, ClassifyRequest(("text",), at_least=2), model="news", patience_s=30.0)
    patient = asyncio.create_task(call)
    await kit.end((await kit.submit(deploy(kit, "m2"))).id)
    assert (await patient).generation == 2


async def test_a_deployment_goes_on_when_the_kernel_is_restarted_while_it_watches(kit: Kit) -> None:
    await kit.pools("scheduler")
    await kit.end((await kit.submit(deploy(kit, "m1"))).id)
    async with Caller(kit).calling() as caller:
        run = await kit.submit(deploy(kit, "m2", canary=20, watch_s=6.0))
        await kit.job(f"{run.id}-deploy", lambda j: j.progress.phase == "watching")
        await kit.system.kernel.stop()
        done = caller.answers.total()
        await until(lambda: caller.answers.total() > done + 50)  # nobody needs the kernel to call a model
        await kit.system.start_kernel()
        view = await kit.end(run.id, 60.0)
    assert (view.run.state, view.jobs[0].epoch, view.jobs[0].result["generation"]) == ("done", 1, 2), view.run.fault
    assert not caller.faults
