"""A node that does not answer for a while, as one that is being restarted: its pools wait for it, and are not given up."""

import time

from kernelm.testing.harness import System, until
from kernelm_sdk.bus import encode
from kernelm_sdk.contract import CONTRACTS
from kernelm_sdk.system import ContractVersion, Hello, Kernel, Manifest, PoolSpec, Ready

MANIFEST = Manifest("patient", "1", "for tests", ("patient/1",), "patient:Patient", default=False)


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
