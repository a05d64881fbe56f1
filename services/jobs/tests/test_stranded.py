"""A deployment whose node is gone, through a real broker, kernel and job service: it leaves the account, goes on elsewhere under
its own name, or waits and says for what. Nodes are tasks of this process; as processes: tests/integration/test_node_lost.py."""

import asyncio
from typing import Any

import msgspec

from kernelm.testing.harness import until
from kernelm_contracts.deployments import Deployment
from kernelm_contracts.jobs import JobName, JobRecord, Jobs, JobSpec, Outlook, RunName
from kernelm_contracts.shadows import Shadow, ShadowRequest
from kernelm_contracts.usage import UsageQuery, UsageReport
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import PoolSpec, Resources

Kit = Any  # of conftest.py, which can't be imported
NONE, ROOM = Resources(0.25, 8000), Resources(2.0, 8000)  # what the first node has for models: nothing, or enough


async def test_it_goes_on_elsewhere_with_its_shadow_and_the_node_that_comes_back_gets_nothing(kit: Kit) -> None:
    other = await kit.start()
    job = await kit.deployed(instances=2)
    await kit.deployed(model="dull", name="next")
    shadow: Shadow = await kit.bus.call(Jobs.shadow, ShadowRequest("news", "next", 50))
    pool, kit.node.capacity = job.result["pool"], ROOM
    assert (job.node, await kit.where(pool)) == ("other", ["other", "other"])
    await kit.die(other)

    def moved(job: JobRecord) -> bool:
        return job.node == "local" and job.why == "answers as news, generation 1"

    after = await kit.job(job.id, moved, 60.0)
    assert (after.state, after.epoch, after.result) == ("running", job.epoch, job.result)
    deployment = await kit.deployment()
    assert (deployment.node, deployment.replicas, deployment.generation, deployment.pool) == ("local", 2, 1, pool)
    assert deployment.why.startswith("node other is lost: no sign of life for 5 s; at least 2 replicas")
    reply = await kit.ask()
    assert (reply.generation, reply.artifact) == (1, kit.digest("m1"))
    assert (await kit.ask("next", 20.0)).results[0][0].label == "dull"
    assert (await kit.deployment("next")).node == "local"
    kept: Shadow = await kit.bus.call(Jobs.shadow, ShadowRequest("news", "next", 50))
    assert kept.since == shadow.since, "it is a shadow as before"

    back = await kit.second()
    await until(lambda: kit.is_on(pool, "local", "local"), 20.0, "two instances, on one node")
    assert not back.started
    spec = next(p for p in (await kit.system.state()).pools if p.pool == pool)
    assert (spec.node, spec.instances) == ("local", 2)


async def starting(kit: Kit) -> Fault | None:
    fault: Fault | None = await kit.told()
    return fault if fault is not None and fault.code == "starting" else None


async def test_it_waits_holds_nothing_and_says_for_what_until_there_is_room_or_its_node_is_back(kit: Kit) -> None:
    other = await kit.start()
    job = await kit.deployed()
    await kit.die(other)
    waits = await kit.waiting(job.id)
    assert waits.why == "waits: needs 0.5 cores, node local has 0.25 in all; node other is lost: no sign of life for 5 s"
    assert (waits.state, (await kit.deployment()).why) == ("running", waits.why)
    outlook: Outlook = await kit.bus.call(Jobs.why, JobName(job.id))
    assert (outlook.action, outlook.reason, outlook.remedy) == ("wait", waits.why, "a larger node, or a larger quota")

    fault = await until(lambda: starting(kit), 20.0, "callers are told")
    assert waits.why in fault.message
    assert (fault.retriable, fault.http_status) == (True, 503)
    await kit.restart_jobs()
    assert (await kit.waiting(job.id)).why == waits.why
    assert waits.why in await kit.kernelm("model", "list")
    told = await kit.kernelm("jobs", "why", job.id)
    assert "state running, without a place for what it serves why needs 0.5 cores, node local has 0.25 in all; node other" in told
    assert "what would start it a larger node, or a larger quota" in told

    await kit.second()  # its node is back: it goes on there
    assert (await kit.ask(patience_s=30.0)).generation == 1
    again = await kit.job(job.id, lambda j: j.why == "answers as news, generation 1")
    assert (again.node, (await kit.deployment()).why) == ("other", "node other is there again")


async def test_what_a_killed_service_had_not_said_yet_is_said_by_the_next_one(kit: Kit) -> None:
    await kit.pools("scheduler")
    job = await kit.deployed()
    kit.system.processes["jobs"].kill()
    await asyncio.to_thread(kit.system.processes["jobs"].wait)
    bus = await kit.system.connect("jobs")  # whose records these are
    for bucket, key, record, why in (("deployments", "model.news", Deployment, "waits: no node; node local is lost"),
                                     ("jobs", f"job.{job.id}", JobRecord, "moves to node local")):  # fmt: skip
        records = bus.bucket(bucket, record)
        now, revision = await records.get(key)
        await records.put(key, msgspec.structs.replace(now, why=why), revision)
    await kit.system.service("jobs")
    await kit.job(job.id, lambda j: j.why == "answers as news, generation 1")
    assert (await kit.deployment()).why == "node local is there again"
    assert (await kit.ask()).generation == 1


async def held(kit: Kit, kind: str) -> float:
    """Core seconds on the account of the tenant."""
    report: UsageReport = await kit.bus.call(Jobs.usage, UsageQuery())
    return sum(day.usage.held[kind].cpu_s for day in report.days if kind in day.usage.held)


async def test_what_it_held_is_free_for_others_and_is_not_counted_until_it_has_a_place_again(kit: Kit) -> None:
    with (kit.system.home / "jobs.toml").open("a") as file:
        file.write("usage_every_s = 0.3\n[quotas]\ndefault = { cpu = 0.5, memory_mb = 8000, gpus = 0 }\n")
    await kit.restart_jobs()

    async def for_ever(request: Any, job: Any) -> Any:
        await asyncio.Event().wait()

    kit.acts["training"] = for_ever
    await kit.pools("trainer")
    other = await kit.start()
    serves = await kit.deployed()  # all that the tenant may hold
    spec = JobSpec("training", "trainer/1.train", {"dataset": "d", "algorithm": "adamw"}, Resources(0.25, 16))
    job: JobRecord = await kit.bus.call(Jobs.submit, spec)
    queued = await kit.job(job.id, lambda j: j.why.startswith("waits: "))
    assert queued.why == "waits: needs 0.25 cores, the quota of tenant default has 0 left"
    await kit.die(other)
    await kit.job(job.id, lambda j: j.state == "running", 60.0)  # the deployment has no place, and holds nothing
    waits = await kit.waiting(serves.id)
    before, trained = await held(kit, "serving"), await held(kit, "jobs")
    assert before > 0.0

    async def counted() -> bool:
        return await held(kit, "jobs") > trained + 0.1

    await until(counted, 20.0, "the account goes on")
    assert (await held(kit, "serving"), waits.state) == (before, "running")

    kit.node.capacity = ROOM
    quota = "waits: needs 0.5 cores, the quota of tenant default has 0.25 left"
    await kit.job(serves.id, lambda j: j.why.startswith(quota), 30.0)
    await kit.bus.call(Jobs.cancel, JobName(job.id))
    await kit.job(serves.id, lambda j: j.node == "local" and j.why.startswith("answers as"), 30.0)
    assert (await kit.ask()).generation == 1


async def test_one_that_sleeps_wakes_up_elsewhere(kit: Kit) -> None:
    quick = {"serving": {"down_after_s": 1.0, "idle_s": 1.5}}
    await kit.system.pool(PoolSpec("scheduler", "scheduler", node="local", settings=quick))
    kit.node.capacity = NONE
    other = await kit.second()
    job = await kit.deployed(minimum=0, maximum=2)
    pool, kit.node.capacity = job.result["pool"], ROOM
    await until(lambda: kit.is_on(pool), 30.0, "zero replicas")
    await kit.die(other)

    async def lost() -> bool:
        return any(i.id == "node-other" and i.state == "lost" for i in (await kit.system.state()).instances)

    await until(lost, 30.0, "the node is lost")
    assert not (await kit.job(job.id, lambda j: True)).why.startswith("waits: "), "it misses nothing"
    assert (await kit.ask(patience_s=30.0)).generation == 1
    assert await kit.where(pool) == ["local"]


async def canary(kit: Kit, other: Any, room: Resources) -> tuple[JobRecord, str]:
    """The old version on the other node, a tenth of its calls answered by a canary on the first one; and the canary's run."""
    job: JobRecord = await kit.deployed()
    kit.node.capacity, other.capacity = room, NONE
    run = await kit.submit(kit.deploy("dull", canary=10, watch_s=300.0) | {"resources": {"cpu": 1.0}}, name="canary")
    await until(lambda: watched(kit), 30.0, "a canary")
    return job, run.id


async def watched(kit: Kit) -> bool:
    return any(s.phase == "watching" for s in (await kit.system.state()).swaps)


async def route(kit: Kit) -> list[tuple[str, int]]:
    """The pools, or services, to which the calls go, and how many percent."""
    found = next(r for r in (await kit.system.state()).routes if r.name == "news")
    return [(d.pool, d.weight) for d in found.to]


async def settled_on(kit: Kit, pool: str) -> bool:
    return await route(kit) == [(pool, 100)]


async def test_the_old_version_moves_while_the_new_one_is_a_canary(kit: Kit) -> None:
    other = await kit.start()
    job, run = await canary(kit, other, ROOM)
    shares = await route(kit)
    assert [share for _, share in shares] == [90, 10]
    await kit.die(other)
    await kit.job(job.id, lambda j: j.node == "local" and j.why.startswith("answers as"), 60.0)
    assert await route(kit) == shares
    labels = {(await kit.ask(patience_s=5.0)).results[0][0].label for _ in range(60)}
    assert labels == {"bright", "dull"}, "both answer, as before"
    assert await watched(kit)
    await kit.bus.call(Jobs.cancel_run, RunName(run))
    await until(lambda: settled_on(kit, job.result["pool"]), 30.0, "the old version has all calls again")


async def test_callers_of_an_old_version_without_a_place_are_told_so_and_its_canary_gets_no_more_than_its_share(kit: Kit) -> None:
    other = await kit.start()
    job, run = await canary(kit, other, Resources(1.25, 8000))  # for the canary, and not for the old version beside it
    (old, _), (new, _) = await route(kit)
    await kit.die(other)
    waits = await kit.waiting(job.id)
    fault = await until(lambda: starting(kit), 20.0, "callers are told")
    assert waits.why in fault.message
    assert "10 % of the calls go to its canary" in fault.message
    assert "`kernelm model promote news`" in fault.remedy
    assert (fault.retriable, fault.http_status) == (True, 503)
    assert fault.details["retry_after_s"] > 0
    await until(lambda: answers(kit, "jobs", new), 20.0, "the kernel says so")  # a caller may hear it first, from the broker
    told = [await kit.told() for _ in range(60)]
    assert {fault.code if fault else "" for fault in told} == {"", "starting"}
    assert (await kit.ask(patience_s=30.0)).results[0][0].label == "dull"

    await kit.restart_jobs()
    kit.node.capacity = ROOM  # it gets its place, and its calls back, and the watch goes on
    await until(lambda: answers(kit, old, new), 60.0, "both answer")
    assert await watched(kit)
    assert {(await kit.ask()).results[0][0].label for _ in range(60)} == {"bright", "dull"}
    await kit.bus.call(Jobs.cancel_run, RunName(run))
    await until(lambda: settled_on(kit, old), 30.0, "the old version has all calls again")
    assert (await kit.ask()).results[0][0].label == "bright"


async def answers(kit: Kit, old: str, new: str) -> bool:
    return await route(kit) == [(old, 90), (new, 10)]


async def test_callers_are_told_while_the_new_version_still_starts_and_it_has_them_all_when_it_is_promoted(kit: Kit) -> None:
    settings = kit.system.home / "jobs.toml"
    settings.write_text(settings.read_text().replace("deploy_s = 10.0", "deploy_s = 60.0"))
    await kit.restart_jobs()
    other = await kit.start()
    job = await kit.deployed()
    kit.node.capacity, other.capacity = Resources(1.25, 8000), NONE
    change = kit.deploy("held", canary=10, watch_s=300.0) | {"resources": {"cpu": 1.0}}
    run = await kit.submit(change, name="canary")
    loads = await kit.job(f"{run.id}-deploy", lambda j: "is joined" in j.progress.message)
    await kit.die(other)
    await kit.waiting(job.id)
    await until(lambda: starting(kit), 20.0, "callers are told")
    await until(lambda: settled_on(kit, "jobs"), 20.0, "the kernel says so")
    kit.loaded.set()
    await until(lambda: watched(kit), 30.0, "a canary")
    await until(lambda: starting(kit), 20.0, "callers are told")
    assert {fault.code if (fault := await kit.told()) else "" for _ in range(60)} == {"", "starting"}
    assert "all calls of news go to" in await kit.kernelm("model", "promote", "news")
    await kit.end(run.id, 30.0)
    assert (await kit.bus.call(Jobs.get, JobName(loads.id))).result["generation"] == 2
    assert {await kit.told() for _ in range(30)} == {None}
