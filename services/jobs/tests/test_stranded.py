"""A deployment whose node is gone, through a real broker, kernel and job service: it leaves the account, goes on elsewhere under
its own name, or waits and says for what. Nodes are tasks of this process; as processes: tests/integration/test_node_lost.py."""

import asyncio
import os
import subprocess
import sys
import time
from typing import Any

import msgspec
import psutil
import pytest

from kernelm.testing.harness import until
from kernelm.testing.node import InlineNode
from kernelm_cli.home import UpFile, write_up
from kernelm_contracts.jobs import Deployment, JobName, JobRecord, Jobs, JobSpec, Outlook, RunName
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Server
from kernelm_contracts.shadows import Shadow, ShadowRequest
from kernelm_contracts.usage import UsageQuery, UsageReport
from kernelm_sdk.errors import KernelFault
from kernelm_sdk.system import PoolSpec, Resources

Kit = Any  # of conftest.py, which can't be imported
NONE, ROOM = Resources(0.25, 8000), Resources(2.0, 8000)  # what the first node has for models: nothing, or enough


async def second(kit: Kit) -> InlineNode:
    """Another node, with the server plugin alone. Deployments go there while the first one has no room."""
    manifests, factories = kit.node.manifests, kit.node.factories
    node: InlineNode = await kit.system.node({"encoder": (manifests["encoder"], factories["encoder"])}, "node-other")
    return node


async def die(kit: Kit, node: InlineNode) -> None:
    """As a machine that loses its power: nothing of it says a word."""
    [entry] = [e for e in kit.system._members if e[0].name == node.bus.user]
    kit.system._members.remove(entry)
    entry[1].cancel()
    await asyncio.wait([entry[1]])
    await node.bus._client.close()
    for instance in list(node.members):
        await node.kill(instance)


async def deployed(kit: Kit, **more: Any) -> JobRecord:
    """A deployment on the other node, which then is the only one with room."""
    name = more.get("name", "news")
    view = await kit.end((await kit.submit(kit.deploy(**more), name=name)).id)
    assert view.run.state == "done", view.run.fault
    return view.jobs[0]  # type: ignore[no-any-return]


async def record_of(kit: Kit, name: str = "news") -> Deployment:
    found, _ = await kit.bus.bucket("deployments", Deployment).get(f"model.{name}")
    assert found is not None
    return found


async def ask(kit: Kit, model: str = "news", patience_s: float = 0.0) -> ClassifyReply:
    reply: ClassifyReply = await kit.bus.call(Server.classify, ClassifyRequest(("text",)), model=model, patience_s=patience_s)
    return reply


async def waiting(kit: Kit, job: str) -> JobRecord:
    return await kit.job(job, lambda j: j.why.startswith("waits: "), 60.0)  # type: ignore[no-any-return]


async def kernelm(kit: Kit, *arguments: str) -> str:
    """What the command prints, in one line."""
    me = psutil.Process()
    write_up(kit.system.home, UpFile(me.pid, me.create_time(), kit.system.broker.url, "", "", time.time()))
    command = (sys.executable, "-m", "kernelm_cli", *arguments, "--home", str(kit.system.home))
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, env=os.environ | {"COLUMNS": "300"})
    text, _ = await process.communicate()
    assert process.returncode == 0
    return " ".join(text.decode().split())


async def where(kit: Kit, pool: str) -> list[str]:
    """The nodes of the pool's instances that live."""
    return sorted(i.node for i in (await kit.system.state()).instances if i.pool == pool and i.state not in ("exited", "lost"))


async def start(kit: Kit) -> InlineNode:
    await kit.system.pool(PoolSpec("scheduler", "scheduler", node="local"))
    kit.node.capacity = NONE
    return await second(kit)


async def test_it_goes_on_elsewhere_with_its_shadow_and_the_node_that_comes_back_gets_nothing(kit: Kit) -> None:
    other = await start(kit)
    job = await deployed(kit, instances=2)
    await deployed(kit, model="dull", name="next")
    shadow: Shadow = await kit.bus.call(Jobs.shadow, ShadowRequest("news", "next", 50))
    pool, kit.node.capacity = job.result["pool"], ROOM
    assert (job.node, await where(kit, pool)) == ("other", ["other", "other"])
    await die(kit, other)

    def moved(job: JobRecord) -> bool:
        return job.node == "local" and job.why == "answers as news, generation 1"

    after = await kit.job(job.id, moved, 60.0)
    assert (after.state, after.epoch, after.result) == ("running", job.epoch, job.result)
    deployment = await record_of(kit)
    assert (deployment.node, deployment.replicas, deployment.generation, deployment.pool) == ("local", 2, 1, pool)
    assert deployment.why.startswith("node other is lost: no sign of life for 5 s; at least 2 replicas")
    reply = await ask(kit)
    assert (reply.generation, reply.artifact) == (1, kit.digest("m1"))
    assert (await ask(kit, "next", 20.0)).results[0][0].label == "dull"
    assert (await record_of(kit, "next")).node == "local"
    kept: Shadow = await kit.bus.call(Jobs.shadow, ShadowRequest("news", "next", 50))
    assert kept.since == shadow.since, "it is a shadow as before"

    back = await second(kit)
    await until(lambda: where_is(kit, pool, ["local", "local"]), 20.0, "two instances, on one node")
    assert not back.started
    spec = next(p for p in (await kit.system.state()).pools if p.pool == pool)
    assert (spec.node, spec.instances) == ("local", 2)


async def where_is(kit: Kit, pool: str, nodes: list[str]) -> bool:
    return await where(kit, pool) == nodes


async def test_it_waits_holds_nothing_and_says_for_what_until_there_is_room_or_its_node_is_back(kit: Kit) -> None:
    other = await start(kit)
    job = await deployed(kit)
    await die(kit, other)
    waits = await waiting(kit, job.id)
    assert waits.why == "waits: needs 0.5 cores, node local has 0.25 in all; node other is lost: no sign of life for 5 s"
    assert (waits.state, (await record_of(kit)).why) == ("running", waits.why)
    outlook: Outlook = await kit.bus.call(Jobs.why, JobName(job.id))
    assert (outlook.action, outlook.reason, outlook.remedy) == ("wait", waits.why, "a larger node, or a larger quota")

    async def told() -> KernelFault | None:
        with pytest.raises(KernelFault) as fault:
            await ask(kit)
        return fault.value if fault.value.code == "starting" else None

    fault: KernelFault = await until(told, 20.0, "callers are told")
    assert waits.why in fault.message
    assert (fault.retriable, fault.http_status) == (True, 503)
    await kit.restart_jobs()
    assert (await waiting(kit, job.id)).why == waits.why
    assert waits.why in await kernelm(kit, "model", "list")
    told = await kernelm(kit, "jobs", "why", job.id)
    assert "state running, without a place for what it serves why needs 0.5 cores, node local has 0.25 in all; node other" in told
    assert "what would start it a larger node, or a larger quota" in told

    await second(kit)  # its node is back: it goes on there
    assert (await ask(kit, patience_s=30.0)).generation == 1
    again = await kit.job(job.id, lambda j: j.why == "answers as news, generation 1")
    assert (again.node, (await record_of(kit)).why) == ("other", "node other is there again")


async def test_what_a_killed_service_had_not_said_yet_is_said_by_the_next_one(kit: Kit) -> None:
    await kit.pools("scheduler")
    job = await deployed(kit)
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
    assert (await record_of(kit)).why == "node local is there again"
    assert (await ask(kit)).generation == 1


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
    other = await start(kit)
    serves = await deployed(kit)  # all that the tenant may hold
    spec = JobSpec("training", "trainer/1.train", {"dataset": "d", "algorithm": "adamw"}, Resources(0.25, 16))
    job: JobRecord = await kit.bus.call(Jobs.submit, spec)
    queued = await kit.job(job.id, lambda j: j.why.startswith("waits: "))
    assert queued.why == "waits: needs 0.25 cores, the quota of tenant default has 0 left"
    await die(kit, other)
    await kit.job(job.id, lambda j: j.state == "running", 60.0)  # the deployment has no place, and holds nothing
    waits = await waiting(kit, serves.id)
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
    assert (await ask(kit)).generation == 1


async def test_one_that_sleeps_wakes_up_elsewhere(kit: Kit) -> None:
    quick = {"serving": {"down_after_s": 1.0, "idle_s": 1.5}}
    await kit.system.pool(PoolSpec("scheduler", "scheduler", node="local", settings=quick))
    kit.node.capacity = NONE
    other = await second(kit)
    job = await deployed(kit, minimum=0, maximum=2)
    pool, kit.node.capacity = job.result["pool"], ROOM
    await until(lambda: where_is(kit, pool, []), 30.0, "zero replicas")
    await die(kit, other)

    async def lost() -> bool:
        return any(i.id == "node-other" and i.state == "lost" for i in (await kit.system.state()).instances)

    await until(lost, 30.0, "the node is lost")
    assert not (await kit.job(job.id, lambda j: True)).why.startswith("waits: "), "it misses nothing"
    assert (await ask(kit, patience_s=30.0)).generation == 1
    assert await where(kit, pool) == ["local"]


async def test_the_old_version_moves_while_the_new_one_is_a_canary(kit: Kit) -> None:
    other = await start(kit)
    job = await deployed(kit)
    canary = kit.deploy("dull", canary=10, watch_s=300.0) | {"resources": {"cpu": 1.0}}
    kit.node.capacity = ROOM
    other.capacity = NONE  # so that the canary is on the first node
    run = await kit.submit(canary, name="canary")

    async def watched() -> bool:
        return any(s.phase == "watching" for s in (await kit.system.state()).swaps)

    await until(watched, 30.0, "a canary")
    await die(kit, other)
    await kit.job(job.id, lambda j: j.node == "local" and j.why.startswith("answers as"), 60.0)
    labels = {(await ask(kit, patience_s=5.0)).results[0][0].label for _ in range(60)}
    assert labels == {"bright", "dull"}, "both answer, as before"
    assert await watched()
    await kit.bus.call(Jobs.cancel_run, RunName(run.id))
    await until(lambda: settled_on(kit, job.result["pool"]), 30.0, "the old version has all calls again")


async def settled_on(kit: Kit, pool: str) -> bool:
    route = next(r for r in (await kit.system.state()).routes if r.name == "news")
    return [d.pool for d in route.to] == [pool]
