"""Deployments that follow their load, through a real broker, kernel and job service: up, down, to zero, and back on demand."""

import asyncio
from typing import Any

import pytest

from kernelm.testing.harness import until
from kernelm_contracts.deployments import Deployment
from kernelm_contracts.jobs import JobRecord, Jobs, RunName
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Server
from kernelm_sdk.errors import Fault, KernelFault
from kernelm_sdk.plugin import Call
from kernelm_sdk.system import PoolSpec

Kit = Any  # of conftest.py, which can't be imported
QUICK = {"serving": {"down_after_s": 1.0, "idle_s": 1.5, "drain_s": 2.0, "spare": 1.2}, "preemption": {"rest_s": 0.0}}


async def deployment(kit: Kit) -> Deployment:
    found, _ = await kit.bus.bucket("deployments", Deployment).get("model.news")
    assert found is not None
    return found


async def ask(kit: Kit, patience_s: float = 0.0) -> ClassifyReply:
    reply: ClassifyReply = await kit.bus.call(Server.classify, ClassifyRequest(("text",)), model="news", patience_s=patience_s)
    return reply


async def ready(kit: Kit, pool: str) -> int:
    return sum(i.pool == pool and i.state == "ready" for i in (await kit.system.state()).instances)


def slow_server(kit: Kit, seconds: float) -> None:
    """One call at a time, each of which takes so long."""
    base = kit.factories["encoder"]

    class Slow(base):  # type: ignore[misc, valid-type]
        turn: asyncio.Lock

        async def on_start(self) -> None:
            self.turn = asyncio.Lock()
            await super().on_start()

        async def classify(self, request: ClassifyRequest, call: Call) -> ClassifyReply:
            async with self.turn:
                await asyncio.sleep(seconds)
            reply: ClassifyReply = await super().classify(request, call)
            return reply

    kit.factories["encoder"] = Slow


async def test_replicas_follow_the_load_and_nothing_is_lost(kit: Kit) -> None:
    slow_server(kit, 0.05)
    await kit.system.pool(PoolSpec("scheduler", "scheduler", settings=QUICK))
    view = await kit.end((await kit.submit(kit.deploy(maximum=3, objective_ms=400.0))).id)
    pool = view.jobs[0].result["pool"]
    faults: list[Fault] = []
    answered = 0

    async def ready_is(count: int) -> bool:
        return await ready(kit, pool) == count

    async def client() -> None:
        nonlocal answered
        while True:
            try:
                await ask(kit)
                answered += 1
            except Fault as fault:
                faults.append(fault)
                await asyncio.sleep(0.1)

    clients = [asyncio.create_task(client()) for _ in range(8)]
    try:
        await until(lambda: ready_is(3), 30.0, "three replicas")
        record = await deployment(kit)
        assert (record.replicas, record.generation) == (3, 1)
        assert "calls/s" in record.why
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    await until(lambda: ready_is(1), 30.0, "one replica")
    assert not faults
    assert answered >= 20
    assert (await deployment(kit)).replicas == 1


async def test_a_model_without_calls_goes_to_zero_and_the_next_call_brings_it_back(kit: Kit) -> None:
    await kit.system.pool(PoolSpec("scheduler", "scheduler", settings=QUICK))
    view = await kit.end((await kit.submit(kit.deploy(minimum=0, maximum=2))).id)
    pool = view.jobs[0].result["pool"]
    assert (await ask(kit)).generation == 1

    async def asleep() -> bool:
        state = await kit.system.state()
        route = next(r for r in state.routes if r.name == "news")
        return route.to[0].pool == "jobs" and not any(i.pool == pool and i.state in ("ready", "draining") for i in state.instances)

    await until(asleep, 30.0, "zero replicas")
    # the first call is told at once, and starts it; whoever has patience gets the answer
    with pytest.raises(KernelFault) as told:
        await ask(kit)
    assert (told.value.code, told.value.retriable, told.value.http_status) == ("starting", True, 503)
    assert told.value.details["retry_after_s"] > 0
    assert (await ask(kit, patience_s=20.0)).generation == 1
    again = await kit.submit(kit.deploy(minimum=0, maximum=2), name="again")
    assert (await kit.end(again.id)).jobs[0].reused  # it serves this model already
    # asleep again, the service is killed, and the next one still knows
    await until(asleep, 30.0, "zero replicas again")
    await kit.restart_jobs()
    assert (await ask(kit, patience_s=20.0)).generation == 1
    # a new version while there is none of the old one
    await until(asleep, 30.0, "zero replicas once more")
    new = await kit.end((await kit.submit(kit.deploy("m2", minimum=0, maximum=2), name="new")).id)
    assert new.run.state == "done", new.run.fault
    assert (await ask(kit, patience_s=20.0)).generation == 2
    old: JobRecord = await kit.job(view.jobs[0].id, lambda j: j.state == "done")
    assert "serves news now" in old.why
    assert (await kit.bus.call(Jobs.get_run, RunName(view.run.id))).run.state == "done"
