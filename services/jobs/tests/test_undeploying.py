"""Deployments that are taken away, through a real broker, kernel and job service."""

import asyncio
from typing import Any

import pytest

from kernelm.testing.harness import until
from kernelm_contracts.deployments import Deployment, Undeploy
from kernelm_contracts.jobs import Jobs
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Server
from kernelm_contracts.shadows import ShadowRequest
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.plugin import Call
from kernelm_sdk.system import Kernel, PoolSpec, UnloadRequest

Kit = Any  # of conftest.py, which can't be imported
SLEEPY = {"serving": {"down_after_s": 1.0, "idle_s": 1.0, "drain_s": 1.0}, "preemption": {"rest_s": 0.0}}


async def ask(kit: Kit) -> ClassifyReply:
    reply: ClassifyReply = await kit.bus.call(Server.classify, ClassifyRequest(("text",)), model="news", timeout_s=60.0)
    return reply


async def undeploy(kit: Kit, why: str = "") -> Deployment:
    last: Deployment = await kit.bus.call(Jobs.undeploy, Undeploy("news", why), timeout_s=60.0)
    return last


async def gone(kit: Kit) -> bool:
    """Whether nothing is left of it: record, route, pool."""
    state = await kit.system.state()
    found, _ = await kit.bus.bucket("deployments", Deployment).get("model.news")
    return found is None and not any(r.name == "news" for r in state.routes) and [p.pool for p in state.pools] == ["scheduler"]


async def test_calls_under_way_are_answered_and_nothing_is_left(kit: Kit) -> None:
    base, entered, leave = kit.factories["encoder"], asyncio.Event(), asyncio.Event()

    class Held(base):  # type: ignore[misc, valid-type]
        async def classify(self, request: ClassifyRequest, call: Call) -> ClassifyReply:
            entered.set()
            await leave.wait()
            reply: ClassifyReply = await super().classify(request, call)
            return reply

    kit.factories["encoder"] = Held
    await kit.pools("scheduler")
    view = await kit.end((await kit.submit(kit.deploy())).id)
    under_way = asyncio.create_task(ask(kit))
    await entered.wait()
    last = await undeploy(kit, "no longer wanted")
    assert (last.name, last.generation, last.artifact) == ("news", 1, kit.digest("m1"))
    with pytest.raises(Fault) as caught:
        await ask(kit)
    assert caught.value.code == "no_responders"
    leave.set()
    assert (await under_way).generation == 1
    await until(lambda: gone(kit), 20.0, "the end of route and pool")
    job = await kit.job(view.jobs[0].id, lambda j: j.state == "done")
    assert job.why == "no longer wanted"
    view = await kit.end((await kit.submit(kit.deploy(), name="again")).id)
    again = view.jobs[0]
    assert view.run.state == "done", view.run.fault
    assert (again.reused, again.result["generation"]) == (False, 2), "no number twice"


async def test_one_that_sleeps_is_taken_away_and_no_call_wakes_it(kit: Kit) -> None:
    await kit.system.pool(PoolSpec("scheduler", "scheduler", settings=SLEEPY))
    await kit.end((await kit.submit(kit.deploy(minimum=0, maximum=2))).id)

    async def asleep() -> bool:
        return any(r.name == "news" and r.to[0].pool == "jobs" for r in (await kit.system.state()).routes)

    await until(asleep, 30.0, "zero replicas")
    assert (await undeploy(kit)).replicas == 0
    with pytest.raises(Fault) as caught:
        await ask(kit)
    assert caught.value.code == "no_responders"
    await until(lambda: gone(kit), 20.0, "the end of route and pool")


async def test_what_was_begun_is_ended_by_the_next_call(kit: Kit) -> None:
    """As after a kill between the two: the kernel has let go of the pool, and the record is there."""
    await kit.pools("scheduler")
    view = await kit.end((await kit.submit(kit.deploy())).id)
    await kit.bus.call(Kernel.unload, UnloadRequest(view.jobs[0].result["pool"], force=True))
    await kit.restart_jobs()
    last: Deployment = await kit.bus.call(Jobs.undeploy, Undeploy("news"), timeout_s=60.0, patience_s=20.0)
    assert last.generation == 1
    await until(lambda: gone(kit), 20.0, "the end of the record")
    await kit.job(view.jobs[0].id, lambda j: j.state == "done")


async def test_one_that_is_changing_or_part_of_a_shadow_stays(kit: Kit) -> None:
    await kit.pools("scheduler")
    with pytest.raises(ClientFault, match="no deployment 'news'") as caught:
        await undeploy(kit)
    assert caught.value.code == "unknown_model"
    for name in ("news", "next"):
        await kit.end((await kit.submit(kit.deploy(name=name), name=name)).id)
    await kit.bus.call(Jobs.shadow, ShadowRequest("next", "news", 10))
    with pytest.raises(ClientFault, match="news answers copies of the calls of next"):
        await undeploy(kit)
    await kit.bus.call(Jobs.shadow, ShadowRequest("next"))
    run = await kit.submit(kit.deploy("held"))
    await kit.job(f"{run.id}-deploy", lambda j: j.progress.phase == "starting")
    with pytest.raises(ClientFault, match=f"{run.id}-deploy is deploying another version"):
        await undeploy(kit)
    assert (await ask(kit)).generation == 1
    kit.loaded.set()
    assert (await kit.end(run.id)).jobs[0].result["generation"] == 2
