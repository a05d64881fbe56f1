"""A deployment that does not get ready on the node that it moved to, through a real broker, kernel and job service: it is stopped
there, the node is avoided for a while, and the record and its callers are told why."""

import asyncio
from typing import Any

from kernelm.testing.harness import until
from kernelm_contracts.jobs import JobName, Jobs, Outlook
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Resources

Kit = Any  # of conftest.py, which can't be imported
NONE, ROOM = Resources(0.25, 8000), Resources(2.0, 8000)  # what a node has for models: nothing, or enough
AVOIDED = "node local is avoided until "


async def crashes(server: Any) -> None:
    raise RuntimeError("no such device")


async def hangs(server: Any) -> None:
    await asyncio.Event().wait()


def can_not(kit: Kit, on_start: Any) -> None:
    """From now on no instance gets ready on the first node: a driver that is broken there, say."""
    kit.node.factories["encoder"] = type("Unable", (kit.node.factories["encoder"],), {"on_start": on_start})


async def settings(kit: Kit, **values: float) -> None:
    """Other settings of the job table, from its next life on, which begins."""
    file = kit.system.home / "jobs.toml"
    lines = [line for line in file.read_text().splitlines() if line.partition(" = ")[0] not in values]
    file.write_text("\n".join([*lines, *(f"{name} = {value}" for name, value in values.items())]))
    await kit.restart_jobs()


async def avoids(kit: Kit) -> bool:
    return "local" in (await kit.deployment()).avoid


async def test_a_node_on_which_it_crashes_is_avoided_and_it_goes_on_elsewhere(kit: Kit) -> None:
    other = await kit.start()
    job = await kit.deployed()
    pool, kit.node.capacity = job.result["pool"], ROOM
    can_not(kit, crashes)
    await kit.die(other)
    await until(lambda: avoids(kit), 60.0, "the first node is given up")
    tried = len(kit.node.started)
    waits = await kit.waiting(job.id)
    assert waits.why.startswith("waits: node local is avoided until ")
    assert waits.why.endswith(" UTC: 6 failures within 60 s; the last: RuntimeError: no such device; elsewhere: no node that is "
                              "there has the plugin that serves news")  # fmt: skip
    assert (await kit.deployment()).why == waits.why
    outlook: Outlook = await kit.bus.call(Jobs.why, JobName(job.id))
    assert (outlook.action, outlook.reason) == ("wait", waits.why)
    assert waits.why in await kit.kernelm("model", "list")
    fault: Fault | None = await kit.told()
    assert fault is not None
    assert (fault.code, fault.retriable) == ("starting", True)
    assert waits.why in fault.message
    assert await kit.where(pool) == []
    await kit.restart_jobs()
    assert (await kit.waiting(job.id)).why == waits.why, "the next service avoids it as well"

    await kit.second("third")
    again = await kit.job(job.id, lambda j: j.why == "answers as news, generation 1", 60.0)
    record = await kit.deployment()
    assert (again.node, record.node, record.replicas, record.generation) == ("third", "third", 1, 1)
    assert record.why.startswith(AVOIDED), "it says why it is there"
    assert (await kit.ask(patience_s=10.0)).generation == 1
    assert await kit.where(pool) == ["third"]
    assert len(kit.node.started) == tried, "nothing more was begun where it does not get ready"


async def test_a_node_that_hangs_is_tried_again_after_a_while(kit: Kit) -> None:
    other = await kit.start()
    await settings(kit, deploy_s=2.0, avoid_s=6.0)
    job = await kit.deployed()
    pool, kit.node.capacity, able = job.result["pool"], ROOM, kit.node.factories["encoder"]
    third = await kit.second("third")
    third.capacity = NONE
    can_not(kit, hangs)
    await kit.die(other)
    waits = await kit.job(job.id, lambda j: AVOIDED in j.why and j.why.startswith("waits: "), 60.0)
    assert " UTC: no instance was ready within 2 s; elsewhere: " in waits.why
    await until(lambda: kit.is_on(pool), 20.0, "what hangs is stopped")
    kit.node.factories["encoder"] = able
    again = await kit.job(job.id, lambda j: j.why == "answers as news, generation 1", 60.0)
    record = await kit.deployment()
    assert (again.node, record.avoid, await kit.where(pool)) == ("local", {}, ["local"])
    assert not third.started
    assert (await kit.ask(patience_s=10.0)).generation == 1


async def test_one_that_is_slow_is_waited_for_where_no_other_node_could_have_it(kit: Kit) -> None:
    other = await kit.start()
    await settings(kit, deploy_s=2.0)
    kit.loaded.set()
    job = await kit.deployed(model="held")
    pool, kit.node.capacity = job.result["pool"], ROOM
    kit.loaded.clear()
    await kit.die(other)
    why = "no instance was ready within 2 s, and no other node has encoder: it is waited for"
    await kit.job(job.id, lambda j: j.why == f"node local: {why}", 60.0)
    fault = await until(lambda: told_of(kit, why), 20.0, "callers are told")
    assert fault.code == "starting"
    assert len(await kit.where(pool)) == 1, "it was not stopped"
    kit.loaded.set()
    await kit.job(job.id, lambda j: j.why == "answers as news, generation 1", 60.0)
    assert len(kit.node.started) == 2, "of the scheduler, and of the one that was slow"


async def told_of(kit: Kit, why: str) -> Fault | None:
    fault: Fault | None = await kit.told()
    return fault if fault is not None and why in fault.message else None


async def test_one_that_wakes_up_and_can_not_goes_elsewhere(kit: Kit) -> None:
    await kit.system.pool(kit.pool("scheduler", "scheduler", node="local",
                                   settings={"serving": {"down_after_s": 1.0, "idle_s": 1.5}}))  # fmt: skip
    job = await kit.deployed(minimum=0, maximum=1)
    pool = job.result["pool"]
    await until(lambda: kit.is_on(pool), 30.0, "zero replicas")
    can_not(kit, crashes)
    await kit.told()  # a call, which wakes it up
    await until(lambda: avoids(kit), 60.0, "the first node is given up")
    await kit.second()
    assert (await kit.ask(patience_s=60.0)).generation == 1
    assert (await kit.deployment()).node == "other"


async def test_a_model_that_served_and_crashes_again_and_again_goes_elsewhere(kit: Kit) -> None:
    await kit.system.pool(kit.pool("scheduler", "scheduler", node="local"))
    job = await kit.deployed()
    pool = job.result["pool"]
    can_not(kit, crashes)
    [serves] = [i.id for i in (await kit.system.state()).instances if i.pool == pool and i.state == "ready"]
    await kit.node.kill(serves)
    waits = await kit.waiting(job.id)
    assert waits.why.startswith(f"waits: {AVOIDED}")
    fault = await until(lambda: told_of(kit, waits.why), 20.0, "callers are told")
    assert (fault.code, fault.retriable) == ("starting", True)
    await kit.second()
    assert (await kit.ask(patience_s=60.0)).generation == 1
    assert await kit.where(pool) == ["other"]


async def test_one_node_of_two_on_which_it_crashes_is_left_and_the_other_goes_on(kit: Kit) -> None:
    other = await kit.start()
    kit.node.capacity = other.capacity = Resources(0.5, 8000)
    job = await kit.deployed(instances=2)
    pool = job.result["pool"]
    assert await kit.where(pool) == ["local", "other"]
    can_not(kit, crashes)
    [serves] = [i.id for i in (await kit.system.state()).instances if i.pool == pool and i.node == "local"]
    await kit.node.kill(serves)
    await until(lambda: avoids(kit), 60.0, "the first node is left")
    assert (await kit.deployment()).spread == {"other": 1}
    assert [await kit.told() for _ in range(20)] == [None] * 20
    third = await kit.second("third")
    third.capacity = Resources(0.5, 8000)
    await until(lambda: kit.is_on(pool, "other", "third"), 60.0, "as many as before")
    assert (await kit.deployment()).replicas == 2
