"""The kernel: implements `kernel/1` over identity, registry, supervisor, router and journal. `python -m kernelm` runs it.

It may die at any time: routes stay in force in the broker, calls go on, and a new kernel rebuilds its state from KV.
"""

import asyncio
import hashlib
import logging
import secrets
import time
from pathlib import Path
from typing import Any

import msgspec

from kernelm.identity import LIFETIME_S, Authority, Grant
from kernelm.journal import AuditTrail, audit, create_assets
from kernelm.registry import LEASE_TTL_S, Lease, Registry
from kernelm.router import Router
from kernelm.supervisor import Supervisor
from kernelm_sdk.bus import Bus, handlers_of
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import (
    Destination,
    Empty,
    Enrolled,
    EnrollRequest,
    ExitReport,
    Hello,
    Instance,
    Key,
    KeyChanged,
    KeyCreated,
    KeyList,
    KeyName,
    KeyRequest,
    PoolName,
    PoolSpec,
    Ready,
    RenewRequest,
    Route,
    RouteChanged,
    SystemState,
    Welcome,
)

log = logging.getLogger("kernelm")
AUDIT_EVERY_S = 600.0


class Member(msgspec.Struct, frozen=True):
    """Who holds which key, with what rights: what `renew` and revocation need."""

    grant: Grant
    key: str
    expires: int


class KernelService:
    """One kernel. `start` takes the leadership; a kernel that is deposed ends itself."""

    def __init__(self, home: Path, system: Bus, bus: Bus) -> None:
        self.authority, self.bus, self._system = Authority(home), bus, system
        manifests, broken = find_manifests()
        self.manifests, self.health = manifests, {f"plugin {name}": why for name, why in broken.items()}
        self.registry = Registry(bus, self._changed)
        self.router = Router(self.authority, system, bus)
        self.supervisor = Supervisor(bus, self.authority, self.registry, manifests)
        self.trail = AuditTrail(bus)
        self._members, self._keys = bus.bucket("registry", Member), bus.bucket("keys", Key)
        self._lease = bus.bucket("leases", Lease)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.deposed = asyncio.Event()

    async def start(self, safe: bool = False) -> None:
        """Create the assets, read the records, take over, announce the kernel itself and the default pools."""
        await create_assets(self.bus)
        self.health["audit"] = await self.trail.recover()
        await self.registry.recover()
        await self.supervisor.recover()
        await self.router.lead()
        await self.bus.serve(handlers_of(self, "kernel/1"), pool="kernel", instance="kernel")
        await self.registry.happens("kernel", "hello", plugin="kernel", pool="kernel", contracts=("kernel/1",))
        await self.registry.happens("kernel", "ready")
        await self._route("kernel/1", "kernel")
        for manifest in self.manifests.values():
            first_party = manifest.entry.startswith("kernelm_")
            kept = self.supervisor.pools.get(manifest.name)
            spec = PoolSpec(manifest.name, manifest.name, 0 if manifest.each_node else max(1, kept.instances if kept else 1),
                            manifest.each_node, runtime=manifest.runtimes[0], settings=kept.settings if kept else {})  # fmt: skip
            if manifest.default and (first_party or not safe) and kept != spec:  # new, or its manifest has changed
                await self.supervisor.want(spec)
        self.bus.reconnected.append(self._reconnected)
        for work in (self.supervisor.run(), self._watch(), self._audit()):
            self._spawn(work)

    async def stop(self) -> None:
        """End the background work and the connections; the routes stay in force."""
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
                await self._lease.put("kernel", Lease("kernel", time.time()), -1, ttl_s=LEASE_TTL_S)
                await self.registry.check_leases()
                await self.router.check()
            except KernelFault as fault:
                log.warning("%s", fault.message)
                if fault.code == "routes_not_in_force":
                    await self._push()

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
        self.supervisor.changed()

    async def _shut_out(self, instance: Instance) -> None:
        """A lost instance may be frozen and thaw: revoke its key, and have its node end it."""
        member, _ = await self._members.get(f"member.{instance.id}")
        if member:
            await self.router.revoke(member.key, member.expires)
        if instance.plugin in self.manifests:
            await self.supervisor.stop(instance)

    async def _route(self, contract: str, pool: str) -> None:
        route = Route(contract, "svc", (Destination(pool, 100),))
        if self.router.table.get(contract) != route:
            took = await self.router.set(route)
            await self.bus.publish(RouteChanged(route=route, took_ms=took))

    async def _note(self, call: Any, what: str, on: str) -> None:
        await self.trail.append(time.time(), call.caller, what, on)

    # ---- kernel/1 ----

    async def enroll(self, request: EnrollRequest, call: Any) -> Enrolled:
        name, grant = self.authority.verify(request.token, "join")
        if name != call.caller:
            raise ClientFault("unauthorized", "the token belongs to another connection", "connect with the token itself")
        used, revision = await self._members.get(f"token.{name}")
        if used is None:
            await self._members.put(f"token.{name}", Member(grant, request.public_key, 0), revision, ttl_s=3600)
        elif used.key != request.public_key:  # the same key again: the first answer was lost
            raise ClientFault("unauthorized", "the join token was used already", "issue a new one")
        return await self._issue(grant, request.public_key)

    async def _issue(self, grant: Grant, key: str) -> Enrolled:
        jwt, expires = self.authority.issue(grant, key, LIFETIME_S)
        await self._members.put(f"member.{grant.name}", Member(grant, key, expires), -1)
        return Enrolled(grant.name, jwt, expires)

    async def renew(self, request: RenewRequest, call: Any) -> Enrolled:
        member = await self._member(call.caller)
        if member.key != request.public_key:
            raise ClientFault("unauthorized", "the key is not the one that was enrolled", "enroll again")
        return await self._issue(member.grant, member.key)

    async def _member(self, name: str) -> Member:
        member, _ = await self._members.get(f"member.{name}")
        if member is None:
            raise ClientFault("unauthorized", f"{name!r} is not enrolled", "enroll with a join token")
        return member

    async def hello(self, request: Hello, call: Any) -> Welcome:
        if request.instance != call.caller:
            raise ClientFault("permission_denied", f"{call.caller!r} can't say hello for {request.instance!r}")
        grant = (await self._member(call.caller)).grant
        known = self.registry.instances.get(request.instance)
        instance = await self.registry.hello(request, grant, known.node if known else "")
        spec = self.supervisor.pools.get(instance.pool)
        return Welcome(instance.pool, instance.contracts, LEASE_TTL_S, spec.settings if spec else {})

    async def ready(self, request: Ready, call: Any) -> Instance:
        if request.instance != call.caller:
            raise ClientFault("permission_denied", f"{call.caller!r} can't be ready for {request.instance!r}")
        instance = await self.registry.happens(call.caller, "ready", models=request.models)
        spec = self.supervisor.pools.get(instance.pool)
        if spec is None or spec.contracts:
            for contract in instance.contracts:
                if contract != "node/1":  # nodes are addressed one by one
                    await self._route(contract, instance.pool)
        return instance

    async def exited(self, request: ExitReport, call: Any) -> Empty:
        instance = self.registry.instances.get(request.instance)
        if instance is not None and instance.state != "exited":
            instance = await self.registry.happens(request.instance, "exit", request.diagnosis or f"exit code {request.code}")
            self.supervisor.ended(instance, request.code)
        return Empty()

    async def state(self, request: Empty, call: Any) -> SystemState:
        health = {**self.health, "routes": self.router.health}
        health |= {f"pool {pool}": f"quarantined: {why}" for pool, why in self.supervisor.quarantined.items()}
        return SystemState(tuple(self.registry.instances.values()), tuple(self.supervisor.pools.values()),
                           tuple(self.router.table.values()), self.router.epoch, health)  # fmt: skip

    async def start_pool(self, request: PoolSpec, call: Any) -> PoolSpec:
        if request.plugin not in self.manifests:
            raise ClientFault("unknown_plugin", f"plugin {request.plugin!r} is not installed",
                              f"installed are {', '.join(sorted(self.manifests)) or 'none'}")  # fmt: skip
        await self.supervisor.want(request)
        await self._note(call, "start_pool", request.pool)
        return request

    async def stop_pool(self, request: PoolName, call: Any) -> Empty:
        await self.supervisor.unwant(request.pool)
        await self._note(call, "stop_pool", request.pool)
        return Empty()

    async def set_route(self, request: Route, call: Any) -> Route:
        took = await self.router.set(request)
        await self.bus.publish(RouteChanged(route=request, took_ms=took))
        await self._note(call, "set_route", f"{request.name} -> {', '.join(d.pool for d in request.to)}")
        return request

    async def create_key(self, request: KeyRequest, call: Any) -> KeyCreated:
        identifier, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        now = int(time.time())
        expires = now + request.expires_s if request.expires_s else 0
        key = Key(identifier, request.name, hashlib.sha256(secret.encode()).hexdigest(), request.models, request.methods,
                  request.tenant, now, expires, public_key=request.public_key)  # fmt: skip
        jwt = ""
        if request.public_key:
            grant = Grant("client", f"key-{identifier}", models=request.models, methods=request.methods)
            jwt, _ = self.authority.issue(grant, request.public_key, request.expires_s)
        await self._keys.put(identifier, key, 0)
        await self.bus.publish(KeyChanged(id=identifier, name=key.name, change="created", by=call.caller))
        await self._note(call, "create_key", identifier)
        return KeyCreated(key, f"km_{identifier}_{secret}", jwt)

    async def list_keys(self, request: Empty, call: Any) -> KeyList:
        return KeyList(tuple(key for key, _ in (await self._keys.all()).values()))

    async def revoke_key(self, request: KeyName, call: Any) -> Key:
        key, revision = await self._keys.get(request.id)
        if key is None:
            raise ClientFault("not_found", f"there is no key {request.id!r}", "see `kernelm key list`")
        key = msgspec.structs.replace(key, revoked=True)
        await self._keys.put(request.id, key, revision)
        if key.public_key:
            await self.router.revoke(key.public_key, key.expires)
        await self.bus.publish(KeyChanged(id=key.id, name=key.name, change="revoked", by=call.caller))
        await self._note(call, "revoke_key", key.id)
        return key


async def open_kernel(home: Path, url: str) -> KernelService:
    """Connect a kernel: as the system account for pushing claims, and as the almighty user of the kernelm account,
    which is created with its first claims where the broker does not have it yet."""
    authority = Authority(home)
    system = await Bus.connect(url, authority.credentials("kernel", "system"))
    lookup = f"$SYS.REQ.ACCOUNT.{authority.account}.CLAIMS.LOOKUP"
    if not (await system.request(lookup, b"", 5.0)).data:
        await system.request("$SYS.REQ.CLAIMS.UPDATE", authority.account_jwt().encode(), 5.0)
    bus = await Bus.connect(url, authority.credentials("kernel"))
    return KernelService(home, system, bus)
