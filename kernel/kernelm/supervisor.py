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

from kernelm.identity import Authority, Grant
from kernelm.lifecycle import LIVE
from kernelm.registry import Registry
from kernelm_sdk.bus import Bucket, Bus
from kernelm_sdk.errors import Fault
from kernelm_sdk.plugin import Manifest, Restart
from kernelm_sdk.system import DrainRequest, Instance, InstanceName, Lifecycle, Node, PoolSpec, StartInstance

log = logging.getLogger("kernelm.supervisor")


class Supervisor:
    """Makes what runs equal to what is wanted."""

    def __init__(self, bus: Bus, authority: Authority, registry: Registry, manifests: dict[str, Manifest]) -> None:
        self._bus, self._authority, self._registry, self._manifests = bus, authority, registry, manifests
        self._records: Bucket[PoolSpec] = bus.bucket("registry", PoolSpec)
        self.pools: dict[str, PoolSpec] = {}
        self.quarantined: dict[str, str] = {}  # pool -> reason
        self._failures: dict[str, deque[float]] = defaultdict(deque)
        self._not_before: dict[str, float] = {}
        self._stopping: dict[str, asyncio.Future[None]] = {}
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

    def restart_of(self, plugin: str) -> Restart:
        return self._manifests[plugin].restart if plugin in self._manifests else Restart()

    def ended(self, instance: Instance, code: int) -> None:
        """Note how an instance ended: a failure counts towards the quarantine and delays the next start."""
        pool, rule = instance.pool, self.restart_of(instance.plugin)
        if pool not in self.pools:
            return
        if rule.type == "temporary" or (rule.type == "transient" and code == 0):
            self.quarantined[pool] = f"ended with code {code}; restart is {rule.type!r}"
        elif code != 0:
            now, failures = time.monotonic(), self._failures[pool]
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
            try:
                await asyncio.wait_for(self._wake.wait(), 1.0)
            except TimeoutError:
                continue

    async def reconcile(self) -> None:
        """One comparison of wanted and present, and the starts and stops that follow from it."""
        live = [i for i in self._registry.instances.values() if i.state in LIVE]
        nodes = sorted(i.id.removeprefix("node-") for i in live if "node/1" in i.contracts and i.state == "ready")
        for spec in list(self.pools.values()):
            mine = [i for i in live if i.pool == spec.pool and i.id not in self._stopping]
            if spec.pool in self.quarantined or time.monotonic() < self._not_before.get(spec.pool, 0.0):
                continue
            if spec.each_node:
                targets = [n for n in nodes if all(i.node != n for i in mine)]
            else:
                candidates = [spec.node] if spec.node else nodes
                missing = max(spec.instances - len(mine), 0)
                targets = [candidates[k % len(candidates)] for k in range(missing)] if candidates else []
                for surplus in mine[spec.instances :]:
                    self._stop_soon(surplus)
            for node in targets:
                if node in nodes:
                    await self.start(spec, node)
        managed = {p for p in (i.pool for i in live) if p in self.pools}
        for instance in live:
            if instance.plugin in self._manifests and instance.pool not in managed and instance.id not in self._stopping:
                self._stop_soon(instance)

    def _stop_soon(self, instance: Instance) -> None:
        task = asyncio.ensure_future(self.stop(instance))
        self._stopping[instance.id] = task
        task.add_done_callback(lambda _: self._stopping.pop(instance.id, None))

    async def start(self, spec: PoolSpec, node: str) -> None:
        """Issue a one-time token for a new instance and have the node start it."""
        manifest = self._manifests.get(spec.plugin)
        if manifest is None:
            self.quarantined[spec.pool] = f"plugin {spec.plugin!r} is not installed"
            return
        identifier = f"{spec.plugin}-{secrets.token_hex(4)}"
        grant = Grant("plugin", identifier, spec.pool, spec.plugin, calls=manifest.calls)
        runtime = spec.runtime or manifest.runtimes[0]
        await self._registry.happens(identifier, "start", plugin=spec.plugin, version=manifest.version, pool=spec.pool, node=node)
        token = self._authority.token(identifier, grant)
        request = StartInstance(identifier, spec.plugin, spec.pool, runtime, token, manifest.needs)
        try:
            await self._bus.call(Node.start, request, instance=f"node-{node}", timeout_s=30.0)
        except Fault as fault:
            instance = await self._registry.happens(identifier, "exit", f"node {node} could not start it: {fault.message}")
            self.ended(instance, 1)

    async def stop(self, instance: Instance) -> None:
        """Drain (the broker sends it nothing more, it answers what it has), then stop."""
        if instance.state == "ready":
            await self._registry.happens(instance.id, "drain")
            try:
                await self._bus.call(Lifecycle.drain, DrainRequest(30.0), instance=instance.id, timeout_s=35.0)
            except Fault as fault:
                log.warning("drain of %s: %s", instance.id, fault.message)
        try:
            await self._bus.call(Node.stop, InstanceName(instance.id), instance=f"node-{instance.node}", timeout_s=30.0)
        except Fault as fault:
            log.warning("stop of %s: %s", instance.id, fault.message)
