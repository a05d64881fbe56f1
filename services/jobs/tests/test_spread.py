"""A deployment whose replicas lie on several nodes, through a real broker, kernel and job service: each node is lost by itself."""

from typing import Any

from kernelm.testing.harness import until
from kernelm_contracts.jobs import JobRecord
from kernelm_sdk.system import Resources

Kit = Any  # of conftest.py, which can't be imported
ONE, TWO = Resources(0.5, 8000), Resources(1.0, 8000)  # what a node has: room for one replica, or for two


async def spread(kit: Kit) -> tuple[Any, JobRecord]:
    """The other node, and the job of a deployment with a replica on each."""
    other = await kit.start()
    kit.node.capacity = other.capacity = ONE
    job: JobRecord = await kit.deployed(instances=2)
    return other, job


async def all_answered(kit: Kit) -> None:
    assert [fault for _ in range(40) if (fault := await kit.told())] == []


async def test_replicas_go_where_there_is_room_and_those_that_are_left_serve_until_the_lost_ones_are_back(kit: Kit) -> None:
    other, job = await spread(kit)
    pool, deployment = job.result["pool"], await kit.deployment()
    assert await kit.is_on(pool, "local", "other")
    assert (deployment.spread, deployment.replicas) == ({"local": 1, "other": 1}, 2)
    await all_answered(kit)

    await kit.die(other)
    await until(lambda: kit.is_on(pool, "local"), 30.0, "the other node is lost")
    await all_answered(kit)
    assert (await kit.deployment()).spread == deployment.spread, "nobody has room for another one"
    assert (await kit.job(job.id, lambda j: True)).why == "answers as news, generation 1"
    await kit.restart_jobs()
    await all_answered(kit)

    back = await kit.second()
    back.capacity = ONE
    await until(lambda: kit.is_on(pool, "local", "other"), 30.0, "it is as large as before")
    await all_answered(kit)


async def test_what_was_lost_goes_to_another_node_and_the_rest_stays_where_it_is(kit: Kit) -> None:
    other, job = await spread(kit)
    [kept] = [i.id for i in (await kit.system.state()).instances if i.pool == job.result["pool"] and i.node == "local"]
    third = await kit.second("third")
    third.capacity = ONE
    await kit.die(other)
    await until(lambda: kit.is_on(job.result["pool"], "local", "third"), 60.0, "one on each again")
    deployment = await kit.deployment()
    assert deployment.spread == {"local": 1, "third": 1}
    assert deployment.why.startswith("node other is lost: no sign of life for 5 s; at least 2 replicas")
    assert kept in [i.id for i in (await kit.system.state()).instances if i.state == "ready"]
    after = await kit.job(job.id, lambda j: j.why == "answers as news, generation 1")
    assert (after.epoch, after.result) == (job.epoch, job.result)
    await all_answered(kit)

    await kit.second()  # it comes back, and serves nothing any more
    await kit.die(third)
    await until(lambda: kit.is_on(job.result["pool"], "local", "other"), 60.0, "and back")
    await all_answered(kit)


async def test_it_moves_as_a_whole_when_all_of_its_nodes_are_lost(kit: Kit) -> None:
    other = await kit.start()
    third = await kit.second("third")
    other.capacity = third.capacity = ONE
    job = await kit.deployed(instances=2)
    assert await kit.is_on(job.result["pool"], "other", "third")
    kit.node.capacity = TWO
    await kit.die(other)
    await kit.die(third)
    await until(lambda: kit.is_on(job.result["pool"], "local", "local"), 60.0, "both on the first node")
    deployment = await kit.deployment()
    assert (deployment.node, deployment.spread, deployment.places) == ("local", {"local": 2}, {})
    await kit.job(job.id, lambda j: j.node == "local" and j.why == "answers as news, generation 1")
    await all_answered(kit)


async def test_the_next_version_takes_over_from_replicas_on_several_nodes_and_so_does_the_one_before(kit: Kit) -> None:
    other, job = await spread(kit)
    kit.node.capacity = other.capacity = TWO
    later = await kit.deployed(model="dull", instances=2)
    assert {(await kit.ask()).results[0][0].label for _ in range(20)} == {"dull"}
    assert (await kit.deployment()).replicas == 2
    await until(lambda: kit.is_on(job.result["pool"]), 30.0, "the old ones have ended")
    assert len(await kit.where(later.result["pool"])) == 2
    await kit.deployed(model="m1", instances=1)
    assert {(await kit.ask()).results[0][0].label for _ in range(20)} == {"bright"}
