"""What a deployment has the kernel do: its pool run on the nodes that were decided, and its calls go there."""

from msgspec import structs

from kernelm_contracts.deployments import Deployment
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.deployment import route_to
from kernelm_jobs.holdings import given_up
from kernelm_jobs.routing import pool_in, route_in, shares, swap_in
from kernelm_jobs.table import Table
from kernelm_sdk.bus import Bus
from kernelm_sdk.system import Kernel, PoolName, PoolSpec, ScaleRequest, SystemState

PATIENCE_S = 30.0  # for a kernel that restarts


def on_its_nodes(spec: PoolSpec, deployment: Deployment) -> bool:
    """Whether the pool is on the nodes that were decided. One that is to have no instance now may be on any."""
    places = deployment.spread
    return not places or given_up(deployment) or not deployment.node or spec.spread.keys() == places.keys()


def fits(spec: PoolSpec, deployment: Deployment) -> bool:
    """Whether the pool, on its nodes, has as many instances on each as was decided: none where it was given up."""
    if given_up(deployment):
        return not spec.instances
    return spec.instances == deployment.replicas and (not deployment.places or spec.spread == deployment.spread)


class Pools:
    """The pools of deployments, and the calls that they get. Everything here can be repeated."""

    def __init__(self, bus: Bus, table: Table, cluster: Cluster) -> None:
        self._bus, self._table, self._cluster = bus, table, cluster

    async def move(self, deployment: Deployment, system: SystemState) -> bool:
        """Have the pool on the nodes that were decided; whether it was on others."""
        spec = pool_in(deployment, system)
        if spec is None or spec.parked or on_its_nodes(spec, deployment):
            return False
        await self._place(spec, deployment)
        return True

    async def fit(self, spec: PoolSpec, deployment: Deployment) -> None:
        """Have as many instances on each of its nodes as was decided."""
        if fits(spec, deployment):
            return
        if deployment.places:
            await self._place(spec, deployment)
        else:
            await self.resize(spec, deployment.replicas)

    async def _place(self, spec: PoolSpec, deployment: Deployment) -> None:
        placed = structs.replace(spec, node=deployment.node, instances=deployment.replicas, places=deployment.places)
        await self._bus.call(Kernel.start_pool, placed, timeout_s=10.0, patience_s=PATIENCE_S)
        now = self._table.deployments.get(deployment.name)
        if now is None or now.pool != spec.pool:  # what replaces it has ended it meanwhile
            await self._bus.call(Kernel.stop_pool, PoolName(spec.pool), timeout_s=10.0, patience_s=PATIENCE_S)

    async def resize(self, spec: PoolSpec, instances: int) -> None:
        """Have as many instances of a pool that is on one node, or none."""
        await self._bus.call(Kernel.scale, ScaleRequest(spec.pool, instances), timeout_s=10.0, patience_s=PATIENCE_S)

    async def share(self, deployment: Deployment, to: str, why: str) -> None:
        """Have what is the deployment's own of its calls go to `to`."""
        system = await self._cluster.system(PATIENCE_S)
        wanted = shares(deployment, swap_in(deployment.name, system), to)
        if wanted and route_in(deployment.name, system) != wanted:
            route = structs.replace(route_to(deployment, to, why), to=wanted)
            await self._bus.call(Kernel.set_route, route, timeout_s=10.0, patience_s=PATIENCE_S)
