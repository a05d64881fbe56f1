"""Desired state: which pools run, how often, where; and what happens when an instance ends.

Restart type, intensity and backoff are the plugin's (its manifest); after more than `intensity` failures within
`period_s` the pool is quarantined, and its neighbours don't notice. Pools live in KV `registry` under `pool.<pool>`, so a
restarted kernel adopts what still runs and starts what is missing.
"""

import asyncio
import logging
import secrets
import time
from collections import defaultdict, deque
from contextlib import suppress

from kernelm.catalog import Catalog
from kernelm.lifecycle import LIVE
from kernelm.registry import Registry
from kernelm_authority.identity import LEASE_S, Authority, Grant
from kernelm_sdk.bus import Bucket, Bus
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import DrainRequest, Instance, InstanceName, Lifecycle, Manifest, Node, PoolSpec, Restart, StartInstance

log = logging.getLogger("kernelm.supervisor")


class Supervisor:
    """Makes what runs equal to what is wanted."""

    def __init__(self, bus: Bus, authority: Authority, registry: Registry, catalog: Catalog) -> None:
        self._bus, self._authority, self._registry, self._catalog = bus, authority, registry, catalog
        self._records: Bucket[PoolSpec] = bus.bucket("registry", PoolSpec)
        self.pools: dict[str, PoolSpec] = {}
        self.quarantined: dict[str, str] = {}  # pool -> reason
        self._failures: dict[str, deque[float]] = defaultdict(deque)
        self._not_before: dict[str, float] = {}
        self._stopping: dict[str, asyncio.Future[None]] = {}
        self._starting: dict[str, asyncio.Future[None] | None] = {}  # instances whose start this kernel has asked for
        self.safe = False  # start kernelm's own plugins only
        self._wake = asyncio.Event()

    async def recover(self) -> None:
        self.pools = {p.pool: p for p, _ in (await self._records.all("pool")).values()}

    async def want(self, spec: PoolSpec) -> None:
        """From now on `spec` is wanted; a quarantine of the pool is lifted."""
        await self._records.put(f"pool.{spec.pool}", spec, -1, patience_s=10)
        self.pools[spec.pool] = spec
        self.quarantined.pop(spec.pool, None)
        self._failures.pop(spec.pool, None)
        self._wake.set()

    async def unwant(self, pool: str) -> None:
        """Stop the pool: each instance is drained, then stopped."""
        if self.pools.pop(pool, None) is not None:
            await self._records.delete(f"pool.{pool}")
        self._wake.set()

    def nodes(self) -> list[str]:
        """The nodes that are ready."""
        found = self._registry.instances.values()
        return sorted(i.id.removeprefix("node-") for i in found if "node/1" in i.contracts and i.state == "ready")

    def ended(self, instance: Instance, code: int) -> None:
        """Note how an instance ended: a failure counts towards the quarantine and delays the next start."""
        pool = instance.pool
        if pool not in self.pools or self.pools[pool].parked:
            return
        manifest = self._catalog.of(self.pools[pool])
        rule = manifest.restart if manifest else Restart()
        if rule.type == "temporary" or (rule.type == "transient" and code == 0):
            self.quarantined[pool] = f"ended with code {code}; restart is {rule.type!r}"
        elif code != 0:
            now, failures = time.monotonic(), self._failures[pool]
            if instance.state != "lost" or not failures or now - failures[-1] > LEASE_S:  # a node takes all along that it runs
                failures.append(now)
            while failures and now - failures[0] > rule.period_s:
                failures.popleft()
            if len(failures) > rule.intensity:
                self.quarantined[pool] = f"{len(failures)} failures within {rule.period_s:g} s; the last: {instance.reason}"
                log.error("pool %s is quarantined: %s", pool, self.quarantined[pool])
            self._not_before[pool] = now + min(rule.backoff_s * 2 ** (len(failures) - 1), rule.backoff_max_s)
        self._wake.set()

    def changed(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Reconcile for ever: on every change, and once a second."""
        while True:
            self._wake.clear()
            try:
                await self.reconcile()
            except Fault as fault:
                log.warning("reconcile: %s", fault)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), 1.0)

    async def reconcile(self) -> None:
        """One comparison of wanted and present, and the starts and stops that follow from it."""
        live = [i for i in self._registry.instances.values() if i.state in LIVE]
        nodes = self.nodes()
        self._starting = {i.id: self._starting[i.id] for i in live if i.id in self._starting and i.state == "starting"}
        for spec in [p for p in self.pools.values() if not p.parked]:
            mine = [i for i in live if i.pool == spec.pool and i.id not in self._stopping]
            if (manifest := self._catalog.of(spec)) is None:
                self.quarantined[spec.pool] = f"plugin {spec.plugin!r} is not installed"
            waits = spec.pool in self.quarantined or time.monotonic() < self._not_before.get(spec.pool, 0.0)
            if waits or manifest is None or (self.safe and not self._catalog.first_party(spec)):
                continue
            here, surplus, targets = _placed(spec, mine, nodes)
            whole = sum(i.state == "ready" for i in here) >= spec.instances  # else those elsewhere answer meanwhile
            for each in surplus + [i for i in mine if whole and i not in here]:
                self._stop_soon(each, manifest)
            for begun in mine:  # by a kernel that may have died before it asked the node: to ask twice is harmless
                if begun.state == "starting" and begun.id not in self._starting and begun.node in nodes:
                    self._ask_to_start(begun.id, spec, manifest, begun.node)
            for node in (target for target in targets if target in nodes):
                name = f"{spec.plugin}-{secrets.token_hex(4)}"
                self._starting[name] = None
                await self._registry.happens(name, "start", plugin=spec.plugin, version=manifest.version, pool=spec.pool, node=node)
                self._ask_to_start(name, spec, manifest, node)
        wanted = {p.pool for p in self.pools.values() if not p.parked}
        for instance in live:  # of those that this kernel, or one before it, had started
            if instance.node and instance.pool not in wanted and instance.id not in self._stopping:
                spec_ = self.pools.get(instance.pool)
                self._stop_soon(instance, self._catalog.of(spec_) if spec_ else None)

    def _stop_soon(self, instance: Instance, manifest: Manifest | None) -> None:
        task = asyncio.ensure_future(self.stop(instance, manifest.drain_s if manifest else 30.0))
        self._stopping[instance.id] = task
        task.add_done_callback(lambda _: self._stopping.pop(instance.id, None))

    def _ask_to_start(self, name: str, spec: PoolSpec, manifest: Manifest, node: str) -> None:
        """Issue a one-time token and have the node start the instance; a slow node keeps no other pool waiting."""
        token = self._authority.token(name, Grant("plugin", name, spec.pool, spec.plugin, manifest.calls, events=manifest.events))
        runtime, needs = spec.runtime or manifest.runtimes[0], spec.needs or manifest.needs
        request = StartInstance(name, spec.plugin, spec.pool, runtime, token, needs, spec.source, manifest.limits,
                                manifest.isolated, manifest.network, spec.image, spec.artifacts)  # fmt: skip
        self._starting[name] = asyncio.ensure_future(self._start_on(node, request))

    async def _start_on(self, node: str, request: StartInstance) -> None:
        try:
            await self._bus.call(Node.start, request, instance=f"node-{node}", timeout_s=30.0)
        except Fault as fault:
            now = self._registry.instances.get(request.instance)
            if now is None or now.state != "starting":  # the answer was lost: it has said hello already, or is reported dead
                return
            instance = await self._registry.happens(request.instance, "exit", f"node {node} could not start it: {fault}")
            if fault.code == "no_responders":  # the node is away: no fault of the pool's
                self._not_before[request.pool] = time.monotonic() + 1.0
            else:
                self.ended(instance, 1)
            if isinstance(fault, ClientFault):  # not a matter of time
                self.quarantined[request.pool] = instance.reason

    async def stop(self, instance: Instance, drain_s: float = 30.0) -> None:
        """Drain (the broker sends it nothing more, it answers and finishes what it has), then stop."""
        if instance.state == "ready":
            await self._registry.happens(instance.id, "drain")
            try:
                await self._bus.call(Lifecycle.drain, DrainRequest(drain_s), instance=instance.id, timeout_s=drain_s + 5.0)
            except Fault as fault:
                log.warning("drain of %s: %s", instance.id, fault.message)
        try:
            await self._bus.call(Node.stop, InstanceName(instance.id), instance=f"node-{instance.node}", timeout_s=30.0)
        except Fault as fault:
            log.warning("stop of %s: %s", instance.id, fault.message)


def _placed(spec: PoolSpec, mine: list[Instance], nodes: list[str]) -> tuple[list[Instance], list[Instance], list[str]]:
    """(those of `mine` that are where they shall be, those of them that are too many there, the nodes that lack one each)."""
    if spec.each_node:
        return mine, [], [n for n in nodes if all(i.node != n for i in mine)]
    here, surplus, targets = list[Instance](), list[Instance](), list[str]()
    for node, count in spec.spread.items():
        there = [i for i in mine if node in ("", i.node) or not i.node]  # others: from before the pool moved
        here, surplus, candidates = here + there, surplus + there[count:], [node] if node else nodes
        targets += [candidates[k % len(candidates)] for k in range(count - len(there)) if candidates]
    return here, surplus, targets
