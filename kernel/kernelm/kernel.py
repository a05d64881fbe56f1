"""The kernel: implements `kernel/1` over identity, registry, supervisor, router and journal. `python -m kernelm` runs it.

It may die at any time: routes stay in force in the broker, calls go on, and a new kernel rebuilds its state from KV.
"""

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import msgspec

from kernelm.catalog import Catalog, pool_of
from kernelm.journal import AuditTrail, audit, create_assets
from kernelm.keys import Keys, Members
from kernelm.registry import Lease, Registry
from kernelm.router import Router
from kernelm.supervisor import Supervisor
from kernelm.swaps import Swapper
from kernelm_authority.identity import LEASE_S, Authority
from kernelm_authority.machines import Machines
from kernelm_sdk import system as api
from kernelm_sdk import tracing
from kernelm_sdk.bus import Bus, handlers_of
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.system import Empty, Instance, PoolSpec, Route, Swap

log = logging.getLogger("kernelm")
AUDIT_EVERY_S = 600.0


class KernelService:
    """One kernel. `start` takes the leadership; a kernel that is deposed ends itself."""

    def __init__(self, home: Path, system: Bus, bus: Bus) -> None:
        self.authority, self.bus, self._system = Authority(home), bus, system
        self.catalog = Catalog(bus)
        self.health = {f"plugin {name}": why for name, why in self.catalog.broken.items()}
        self.registry = Registry(bus, self._changed)
        self.router = Router(self.authority, system, bus)
        self.supervisor = Supervisor(bus, self.authority, self.registry, self.catalog)
        self.swapper = Swapper(bus, self.catalog, self.registry, self.supervisor, self.router)
        self.trail = AuditTrail(bus)
        self.members = Members(bus, self.authority, self.router, self._note)
        machines = Machines(bus, self.authority, self.members.shut_out, self._note)
        self.enroll, self.renew, self.forget_machine = machines.guard(self.members.enroll), self.members.renew, machines.forget
        keys = Keys(bus, self.authority, self.router, self._note)
        self.create_key, self.list_keys, self.rotate_key, self.revoke_key = keys.create, keys.list, keys.rotate, keys.revoke
        self._lease = bus.bucket("leases", Lease)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.deposed = asyncio.Event()

    async def start(self, safe: bool = False) -> None:
        """Create the assets, read the records, take over, announce the kernel itself and the default pools."""
        await create_assets(self.bus)
        self.health["audit"] = await self.trail.recover()
        self.supervisor.safe = safe
        for part in (self.registry, self.catalog, self.supervisor):
            await part.recover()
        await self.router.lead()
        await self.swapper.recover()  # before anybody asks: a swap that is not known yet would be begun twice
        await self.bus.serve(handlers_of(self, "kernel/1"), pool="kernel", instance="kernel")
        await self.registry.happens("kernel", "hello", plugin="kernel", pool="kernel", contracts=("kernel/1",))
        await self.registry.happens("kernel", "ready")
        await self._route("kernel/1", "kernel")
        for manifest in self.catalog.installed.values():
            kept = self.supervisor.pools.get(manifest.name)
            spec = pool_of(manifest)
            if kept and not kept.source:
                runtime = kept.runtime if kept.runtime in manifest.runtimes else spec.runtime
                instances = 0 if manifest.each_node else max(kept.instances, 1)
                spec = msgspec.structs.replace(kept, instances=instances, each_node=manifest.each_node, runtime=runtime)
            routes = [r for r in self.router.table.values() if r.name in manifest.contracts]
            served = any(d.pool in self.supervisor.pools for r in routes for d in r.to)
            if manifest.default and kept != spec and (kept or not served):  # new, or its manifest has changed
                await self.supervisor.want(spec)
        self.bus.reconnected.append(self._reconnected)
        for work in (self.supervisor.run(), self._watch(), self._audit()):
            self._spawn(work)

    async def stop(self) -> None:
        """End the background work and the connections; the routes stay in force."""
        await self.swapper.stop()
        for task in list(self._tasks):
            task.cancel()
        await self.bus.close()
        await self._system.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reconnected(self) -> None:
        self.registry.grace()  # nobody could renew while the broker was away
        self.supervisor.changed()

    async def _watch(self) -> None:
        """Every second: leases, and whether the routes in force are ours."""
        while not self.deposed.is_set():
            await asyncio.sleep(1.0)
            try:
                await self._lease.put("kernel", Lease("kernel", time.time()), -1, ttl_s=LEASE_S)
                await self.registry.check_leases()
                await self.router.check()
            except KernelFault as fault:
                log.warning("%s", fault.message)
                if fault.code == "routes_not_in_force":
                    await self._push()
                if self.bus.closed:  # shut out by the kernel that came after
                    self.deposed.set()

    async def _push(self) -> None:
        try:
            await self.router.push()
        except Fault as fault:
            log.error("%s", fault.message)
            if fault.code == "not_leader":
                self.deposed.set()

    async def _audit(self) -> None:
        while True:
            try:
                self.health["journal"] = (await audit(self.bus)).text
                await self.registry.forget()
            except KernelFault as fault:
                self.health["journal"] = f"not audited: {fault.message}"
            await asyncio.sleep(AUDIT_EVERY_S)

    async def _changed(self, instance: Instance) -> None:
        if instance.state == "lost":
            log.warning("%s is lost: %s", instance.id, instance.reason)
            self._spawn(self._shut_out(instance))
            self.supervisor.ended(instance, 1)
        if instance.state == "exited" and instance.node:
            await self.members.leave(instance.id)
        self.supervisor.changed()
        await self.swapper.changed()

    async def _shut_out(self, instance: Instance) -> None:
        """A lost instance may be frozen and thaw: revoke its key, and have its node end it."""
        await self.members.shut_out(instance.id)
        if instance.node:
            await self.supervisor.stop(instance)

    async def _route(self, contract: str, pool: str) -> None:
        """Give a contract that nobody serves to `pool`; whoever serves one keeps it until a swap moves it."""
        route = self.router.table.get(contract)
        if route is None or not any(d.pool == pool or self.swapper.serves(d.pool) for d in route.to):
            await self._set([Route(contract, "svc", (api.Destination(pool, 100),), route.generation + 1 if route else 1)])

    async def _set(self, routes: list[Route]) -> None:
        took = await self.router.set_all(routes)
        for route in routes:
            await self.bus.publish(api.RouteChanged(route=route, took_ms=took))

    async def _by(self, call: Any) -> str:
        """Who asks: a service (the gateway) may speak for somebody else, and nobody else may."""
        behalf = str(call.headers.get("Kernelm-On-Behalf", ""))
        with contextlib.suppress(ClientFault):  # who is not enrolled, the administrator, is no service
            if behalf and (await self.members.of(call.caller)).grant.role == "service":
                return behalf
        return str(call.caller)

    async def _note(self, call: Any, what: str, on: str) -> None:
        await self.trail.append(time.time(), await self._by(call), what, on)

    # ---- kernel/1 ----

    async def hello(self, request: api.Hello, call: Any) -> api.Welcome:
        if request.instance != call.caller:
            raise ClientFault("permission_denied", f"{call.caller!r} can't say hello for {request.instance!r}")
        grant = (await self.members.of(call.caller)).grant
        known = self.registry.instances.get(request.instance)
        instance = await self.registry.hello(request, grant, known.node if known else "")
        spec = self.supervisor.pools.get(instance.pool)
        return api.Welcome(instance.pool, instance.contracts, LEASE_S, spec.settings if spec else {})

    async def ready(self, request: api.Ready, call: Any) -> Instance:
        if request.instance != call.caller:
            raise ClientFault("permission_denied", f"{call.caller!r} can't be ready for {request.instance!r}")
        instance = self.registry.may(call.caller, "ready")
        spec = self.supervisor.pools.get(instance.pool)
        if (spec is None or spec.contracts) and not self.swapper.starting(instance.pool):
            for contract in instance.contracts:
                if contract != "node/1":  # nodes are addressed one by one
                    await self._route(contract, instance.pool)
        return await self.registry.happens(call.caller, "ready", models=request.models)  # whoever reads it may call at once

    async def exited(self, request: api.ExitReport, call: Any) -> Empty:
        instance = self.registry.instances.get(request.instance)
        if instance is not None and call.caller != f"node-{instance.node}":
            raise ClientFault("permission_denied", f"{call.caller!r} does not run {request.instance!r}")
        if instance is not None and instance.state != "exited":
            now = await self.registry.happens(request.instance, "exit", request.reason, fault=request.fault)
            if instance.state != "lost":  # which has been counted
                self.supervisor.ended(now, request.code)
        return Empty()

    async def state(self, request: Empty, call: Any) -> api.SystemState:
        health = {**self.health, "routes": self.router.health}
        health |= {f"pool {pool}": f"quarantined: {why}" for pool, why in self.supervisor.quarantined.items()}
        if self.supervisor.safe:
            strangers = [p.pool for p in self.supervisor.pools.values() if not self.catalog.first_party(p)]
            health |= {f"pool {pool}": "not started: safe mode" for pool in strangers}
        return api.SystemState(tuple(self.registry.instances.values()), tuple(self.supervisor.pools.values()),
                           self.router.in_force, self.router.epoch, health, self.catalog.all(), self.swapper.swaps)

    async def start_pool(self, request: PoolSpec, call: Any) -> PoolSpec:
        self.catalog.need(request.plugin)
        await self.supervisor.want(request)
        await self._note(call, "start_pool", request.pool)
        return request

    async def stop_pool(self, request: api.PoolName, call: Any) -> Empty:
        await self.supervisor.unwant(request.pool)
        await self._note(call, "stop_pool", request.pool)
        return Empty()

    async def set_route(self, request: Route, call: Any) -> Route:
        await self._set([request])
        await self._note(call, "set_route", f"{request.name} -> {', '.join(d.pool for d in request.to)}")
        return request

    async def load(self, request: api.LoadRequest, call: Any) -> Swap:
        return await self._noted(call, "load", await self.swapper.load(request, await self._by(call)))

    async def swap(self, request: api.SwapRequest, call: Any) -> Swap:
        if not request.to.source:
            self.catalog.need(request.to.plugin)
        return await self._noted(call, "swap", await self.swapper.begin(request, await self._by(call)))

    async def rollback(self, request: api.RollbackRequest, call: Any) -> Swap:
        return await self._noted(call, "rollback", await self.swapper.rollback(request, await self._by(call)))

    async def _noted(self, call: Any, what: str, swap: Swap) -> Swap:
        await self._note(call, what, f"{swap.id}: {swap.before or 'nothing'} -> {swap.pool}: {swap.why}")
        return swap

    async def unload(self, request: api.UnloadRequest, call: Any) -> Empty:
        spec = self.swapper.resolve(request.pool)
        routes = [r.name for r in self.router.table.values() if any(d.pool == spec.pool for d in r.to)]
        if self.swapper.starting(spec.pool):
            raise ClientFault("conflict", f"pool {spec.pool} is being swapped", "roll that back, or wait", retriable=True)
        if routes and not request.force:
            raise ClientFault("conflict", f"pool {spec.pool} serves {', '.join(routes)}, and nobody else would",
                              "replace it, roll it back, or insist (force)")  # fmt: skip
        await self.router.set_all((), routes)
        manifest = self.catalog.of(spec)
        if manifest and manifest.default and not spec.source and spec.pool == manifest.name:
            await self.supervisor.want(msgspec.structs.replace(spec, parked=True))  # or the next kernel would start it again
        else:
            await self.supervisor.unwant(spec.pool)
        await self._note(call, "unload", f"{spec.pool}: {request.why}")
        return Empty()

    async def scale(self, request: api.ScaleRequest, call: Any) -> PoolSpec:
        spec = self.swapper.resolve(request.pool)
        if spec.each_node or request.instances < spec.contracts:  # a model's pool may have none: its route is its owner's care
            what = "has one instance a node" if spec.each_node else f"can't have {request.instances} instances"
            raise ClientFault("invalid", f"pool {spec.pool} {what}", "give a number from 1 on, or unload it")
        spec = msgspec.structs.replace(spec, instances=request.instances, places={})
        await self.supervisor.want(spec)
        await self._note(call, "scale", f"{spec.pool} to {spec.instances}")
        return spec


async def open_kernel(home: Path, url: str) -> KernelService:
    """Connect a kernel: as the system account for pushing claims, and as the almighty user of the kernelm account,
    which is created with its first claims where the broker does not have it yet."""
    authority = Authority(home)
    system = await Bus.connect(url, authority.credentials("kernel", "system"))
    if not (await system.request(authority.lookup, b"", 5.0)).data:
        await system.request("$SYS.REQ.CLAIMS.UPDATE", authority.account_jwt().encode(), 5.0)
    bus = await tracing.join_as_member(url, authority.credentials("kernel"))
    return KernelService(home, system, bus)
