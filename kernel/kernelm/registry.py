"""Who is there: instances, their leases, their contracts.

Records live in KV `registry` under `instance.<id>`; a restarted kernel reads them and goes on. An instance is alive as
long as its lease is: a key with a TTL in KV `leases` that its runner renews. Expiry emits no event, so leases are polled.
"""

import time
from collections.abc import Awaitable, Callable

import msgspec

from kernelm.lifecycle import LIVE, step
from kernelm_authority.identity import LEASE_S, Grant
from kernelm_sdk.bus import Bucket, Bus
from kernelm_sdk.contract import CONTRACTS
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import ContractVersion, Hello, Instance, InstanceChanged

START_S = 600.0  # from "start" to "ready": an environment is made, an image loaded; the node tells before if it fails


class Lease(msgspec.Struct, frozen=True):
    """What a runner writes to `leases.<instance>`."""

    instance: str
    renewed: float  # Unix seconds


class Registry:
    """The instances, in memory and in KV; every change is a transition of the lifecycle and an event."""

    def __init__(self, bus: Bus, changed: Callable[[Instance], Awaitable[None]]) -> None:
        self._bus, self._changed = bus, changed
        self._records: Bucket[Instance] = bus.bucket("registry", Instance)
        self._leases: Bucket[Lease] = bus.bucket("leases", Lease)
        self.instances: dict[str, Instance] = {}
        self._recovered = 0.0

    async def recover(self) -> None:
        """Read the records of an earlier life; leases get one TTL to be renewed before they count as lost."""
        self.instances = {i.id: i for i, _ in (await self._records.all("instance")).values()}
        self._recovered = time.time()

    async def happens(self, id: str, happening: str, reason: str = "", **fields: object) -> Instance:
        """Move an instance along its lifecycle: record, event, and whoever has to know."""
        now = self.may(id, happening)
        state = step(now.state, happening)
        new = msgspec.structs.replace(now, state=state, since=time.time(), reason=reason, **fields)
        self.instances[id] = new
        await self._records.put(f"instance.{id}", new, -1, patience_s=10)
        if state != now.state:
            event = InstanceChanged(instance=id, plugin=new.plugin, pool=new.pool, state=state, was=now.state, reason=reason)
            await self._bus.publish(event)
        await self._changed(new)
        return new

    def may(self, id: str, happening: str) -> Instance:
        """The instance as it is; ClientFault where the lifecycle does not allow `happening` now."""
        now = self.instances.get(id) or Instance(id, "", "", "", "", "")
        step(now.state, happening)
        return now

    def grace(self) -> None:
        """Nobody could renew for a while (the broker was away): count the silence from now."""
        self._recovered = time.time()

    async def hello(self, hello: Hello, grant: Grant, node: str) -> Instance:
        """Negotiate contracts and note the newcomer."""
        agreed = negotiate(hello.contracts, hello.plugin)
        return await self.happens(hello.instance, "hello", plugin=hello.plugin, version=hello.version, contracts=agreed,
                                  pool=grant.pool or grant.name, node=node)  # fmt: skip

    async def check_leases(self) -> None:
        """Declare lost whoever is silent."""
        now = time.time()
        alive = {lease.instance for lease, _ in (await self._leases.all()).values()}
        for instance in list(self.instances.values()):
            if instance.state not in LIVE or instance.id in alive:
                continue
            node = self.instances.get(f"node-{instance.node}")
            beginning = instance.state in ("starting", "joined") and (node is None or node.state == "ready")
            patience = START_S if beginning else LEASE_S
            if now - max(instance.since, self._recovered) > patience:
                await self.happens(instance.id, "silence", f"no sign of life for {patience:g} s")

    async def forget(self, keep: int = 50) -> None:
        """Drop the records of the dead but for the last few, which `ps --all` shows."""
        dead = sorted((i for i in self.instances.values() if i.state not in LIVE), key=lambda i: i.since)
        for instance in dead[:-keep]:
            del self.instances[instance.id]
            await self._records.delete(f"instance.{instance.id}")


def negotiate(offered: tuple[ContractVersion, ...], plugin: str) -> tuple[str, ...]:
    """The contracts agreed on: of each name the highest major that both sides have. Within a major only optional fields are
    ever added (released schemas are compared in CI), so another schema of the same major is an older or newer one that fits.
    Of contracts that the kernel does not speak itself it only routes names, so what a plugin offers is taken."""
    agreed: dict[str, ContractVersion] = {}
    names = {contract.name for contract in CONTRACTS.values()}
    for contract in sorted(offered, key=lambda c: int(c.id.partition("/")[2] or 0)):
        if contract.id in CONTRACTS or contract.id.partition("/")[0] not in names:
            agreed[contract.id.partition("/")[0]] = contract
    if offered and not agreed:
        theirs = ", ".join(f"{c.id} ({c.schema_hash})" for c in offered)
        ours_ = ", ".join(f"{c.id()} ({c.schema_hash()})" for c in CONTRACTS.values())
        raise ClientFault("version_mismatch", f"{plugin} offers {theirs}; the kernel has {ours_}", "install matching versions")
    return tuple(c.id for c in agreed.values())
