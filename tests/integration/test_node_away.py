"""A node that does not answer for a while, as one that is being restarted: its pools wait for it, and are not given up."""

import asyncio
import time
from collections import Counter

from kernelm.testing.harness import System, until
from kernelm.testing.node import InlineNode
from kernelm_sdk.bus import encode
from kernelm_sdk.contract import CONTRACTS
from kernelm_sdk.plugin import Plugin
from kernelm_sdk.system import ContractVersion, ExitReport, Hello, Instance, Kernel, Manifest, PoolSpec, Ready

MANIFEST = Manifest("patient", "1", "for tests", ("patient/1",), "patient:Patient", default=False)
MANY = MANIFEST.restart.intensity + 2  # more instances than a pool may have failures


async def test_a_pool_is_not_quarantined_since_its_node_is_away() -> None:
    async with System(manifests={"patient": MANIFEST}) as system:
        bus = await system.connect("node-away")  # it says that it is ready, and serves nothing
        node = ContractVersion("node/1", CONTRACTS["node/1"].schema_hash())
        await bus.call(Kernel.hello, Hello("node-away", "node", "", (node,)))
        await bus.call(Kernel.ready, Ready("node-away", ()))
        await system.admin.call(Kernel.start_pool, PoolSpec("patient", "patient"))

        async def tried() -> bool:
            await bus.append("$KV.leases.node-away", encode({"instance": "node-away", "renewed": time.time()}), {"Nats-TTL": "5"})
            state = await system.state()
            assert "pool patient" not in state.health
            return sum(i.pool == "patient" and i.state == "exited" for i in state.instances) > MANIFEST.restart.intensity + 1

        await until(tried, 60, "more tries than a pool has failures")


class Patient(Plugin):
    """Does nothing, and waits."""


async def node(system: System, name: str) -> InlineNode:
    return await system.node({"patient": (MANIFEST, Patient)}, f"node-{name}")


async def live(system: System) -> list[Instance]:
    return [i for i in (await system.state()).instances if i.pool == "patient" and i.state in ("joined", "ready", "draining")]


async def ready_on(system: System, wanted: dict[str, int]) -> bool:
    return Counter(i.node for i in await live(system) if i.state == "ready") == wanted


async def test_a_node_that_is_lost_with_many_instances_of_a_pool_is_one_failure_and_they_are_started_when_it_is_back() -> None:
    async with System(manifests={"patient": MANIFEST}) as system:
        lost = await node(system, "far")
        await system.pool(PoolSpec("patient", "patient", MANY, node="far"))
        await until(lambda: ready_on(system, {"far": MANY}), 20, "all of them")
        names = list(lost.members)
        [entry] = [e for e in system._members if e[0].name == "node-far"]
        system._members.remove(entry)
        entry[1].cancel()
        await asyncio.wait([entry[1]])
        await lost.bus._client.close()
        for name in names:
            await lost.kill(name)

        async def gone() -> bool:
            return sum(i.pool == "patient" and i.state == "lost" for i in (await system.state()).instances) == MANY

        await until(gone, 30, "all are lost")
        assert "pool patient" not in (await system.state()).health
        back = await node(system, "far")
        for name in names:  # as a node does that finds what it ran before
            await back.bus.call(Kernel.exited, ExitReport(name, -1, "it ended while no node was watching"))
        await until(lambda: ready_on(system, {"far": MANY}), 30, "all of them again")
        assert "pool patient" not in (await system.state()).health


async def test_a_pool_that_moves_is_ready_there_before_its_instances_elsewhere_end() -> None:
    async with System(manifests={"patient": MANIFEST}) as system:
        await node(system, "old")
        new = await node(system, "new")
        await system.pool(PoolSpec("patient", "patient", 2, node="old"))
        await until(lambda: ready_on(system, {"old": 2}), 20, "two on the old node")
        begin, hold = new._begin, asyncio.Event()

        async def late(*arguments: object) -> None:
            await hold.wait()
            await begin(*arguments)  # type: ignore[arg-type]

        new._begin = late  # type: ignore[assignment]
        await system.admin.call(Kernel.start_pool, PoolSpec("patient", "patient", 2, node="new"))
        await until(lambda: len(new.started) == 2, 20, "two are being started on the new node")
        assert await ready_on(system, {"old": 2})
        hold.set()
        await until(lambda: ready_on(system, {"new": 2}), 20, "two on the new node")
        await until(lambda: alone_on(system, "new"), 20, "none on the old one")


async def alone_on(system: System, name: str) -> bool:
    return {i.node for i in await live(system)} == {name}
