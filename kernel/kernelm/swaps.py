"""Replacing one pool by another while calls go on, and going back.

    starting -> watching -> retiring -> done        the new pool is ready and proven, takes its share, takes all, the old one is
        |          |                                drained and parked
     failed    rolled_back                          the old pool never stopped serving

Each phase is a record in KV `registry` under `swap.<id>` before it is acted on, and every step can be repeated: a kernel that
is killed in the middle goes on where it was. Calls are moved by the broker (router.py), so none waits for any of this.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from kernelm.catalog import Catalog, pool_of
from kernelm.lifecycle import LIVE
from kernelm.registry import Registry
from kernelm.router import Router
from kernelm.supervisor import Supervisor
from kernelm_sdk import system as api
from kernelm_sdk.bus import Bucket, Bus
from kernelm_sdk.counters import Counters, too_bad
from kernelm_sdk.errors import ClientFault, Fault, PluginFault
from kernelm_sdk.pools import find_pool
from kernelm_sdk.system import Destination, Empty, Instance, Manifest, PoolSpec, Route, Swap, SwapRequest

T = TypeVar("T")
log = logging.getLogger("kernelm.swaps")
KEPT = 50  # swaps that are over and still on record
LOOK_S = 0.5  # between two looks at the counters


class Record(msgspec.Struct, frozen=True):
    """What is kept of a swap: enough to go on, and to go back."""

    swap: Swap
    spec: PoolSpec
    prior: tuple[Route, ...]  # as they were before


class Swapper:
    """Carries out swaps, several at a time as long as they touch different pools and routes."""

    def __init__(self, bus: Bus, catalog: Catalog, registry: Registry, supervisor: Supervisor, router: Router) -> None:
        self._bus, self._catalog, self._registry, self._supervisor, self._router = bus, catalog, registry, supervisor, router
        self._bucket: Bucket[Record] = bus.bucket("registry", Record)
        self._records: dict[str, Record] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._reverted: dict[str, str] = {}  # swap -> why it shall go back; "" to have its watch end at once
        self._changes = asyncio.Condition()

    @property
    def swaps(self) -> tuple[Swap, ...]:
        return tuple(r.swap for r in self._records.values())

    def starting(self, pool: str) -> bool:
        """Whether a swap decides when `pool` gets its routes."""
        return any(s.pool == pool and not s.over for s in self.swaps)

    async def recover(self) -> None:
        """Go on with what an earlier kernel left under way."""
        found = (await self._bucket.all("swap")).values()
        self._records = {r.swap.id: r for r, _ in sorted(found, key=lambda f: f[0].swap.begun)}
        for record in self._records.values():
            if not record.swap.over:
                self._drive(record.swap.id)

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def changed(self) -> None:
        """Something happened to an instance: whoever waits looks again."""
        async with self._changes:
            self._changes.notify_all()

    # ---- what is asked for ----

    async def load(self, request: api.LoadRequest, by: str) -> Swap:
        """Work out the new pool, the one that it replaces, and the routes that move; then begin."""
        manifest = await self._catalog.add(request.manifest, request.source) if request.manifest else None
        before = self.resolve(request.replaces) if request.replaces else None
        if manifest is None:
            name = request.plugin or (before.plugin if before else "")
            same = before if before and before.source and before.plugin == name else None
            if not same and (name not in self._catalog.installed or (before and before.plugin == name)):
                self._catalog.refresh()  # it came, or was upgraded, since this kernel began
            manifest = self._catalog.of(same) if same else self._catalog.need(name)
            request = msgspec.structs.replace(request, source=same.source if same else "")
        assert manifest is not None
        runtime = request.runtime or manifest.runtimes[0]
        if runtime not in manifest.runtimes:
            raise ClientFault("unsupported_runtime", f"plugin {manifest.name!r} does not run as {runtime!r}",
                              f"its manifest says runtimes = {', '.join(manifest.runtimes)}")  # fmt: skip
        settings = request.settings
        if settings is None:
            settings = before.settings if before and before.plugin == manifest.name else {}
        routes = self._routes_for(manifest, before)
        generation = self._next_generation(routes)
        instances = request.instances or (before.instances if before else 0) or 1
        fields: dict[str, Any] = {} if manifest.each_node else {"instances": instances}
        spec = pool_of(manifest, pool=self._free_name(manifest.name, generation), runtime=runtime, settings=settings,
                       source=request.source, image=request.image, artifacts=request.artifacts, **fields)  # fmt: skip
        swap = SwapRequest(spec, routes, before.pool if before else "", generation, "", request.canary, request.bounds, request.why)
        return await self.begin(swap, by)

    def _routes_for(self, manifest: Manifest, before: PoolSpec | None) -> tuple[str, ...]:
        """The contracts that the new pool shall serve; ClientFault when that would leave one unserved, or steal one."""
        served = {r.name: [d.pool for d in r.to] for r in self._router.table.values() if r.kind == "svc"}
        if before is None:
            taken = {c: served[c][0] for c in manifest.contracts if any(map(self.serves, served.get(c, ())))}
            if taken:
                what = ", ".join(f"{c} is served by pool {pool}" for c, pool in taken.items())
                raise ClientFault("conflict", what, f"`kernelm plugin replace {next(iter(taken))} PLUGIN|PATH`, or unload it first")
            return manifest.contracts
        if not before.contracts:
            raise ClientFault("conflict", f"pool {before.pool} serves a model", "deploy another model under its name")
        moving = tuple(c for c, pools in served.items() if before.pool in pools)
        if missing := [c for c in moving if c not in manifest.contracts]:
            raise ClientFault("version_mismatch", f"plugin {manifest.name!r} implements {', '.join(manifest.contracts)}; pool "
                              f"{before.pool} serves {', '.join(moving)}", f"implement {', '.join(missing)} as well")  # fmt: skip
        return moving or manifest.contracts

    def serves(self, pool: str) -> bool:
        """Whether the pool is there to be routed to."""
        spec = self._supervisor.pools.get(pool)
        return spec is not None and not spec.parked

    def _next_generation(self, routes: tuple[str, ...]) -> int:
        return 1 + max((self._router.table[r].generation for r in routes if r in self._router.table), default=0)

    def _free_name(self, plugin: str, generation: int) -> str:
        ending = {i.pool for i in self._registry.instances.values() if i.state in LIVE}  # of a pool that was given up just now
        name = plugin
        while name in self._supervisor.pools or name in ending:
            name, generation = f"{plugin}-g{generation}", generation + 1
        return name

    def resolve(self, name: str) -> PoolSpec:
        """The pool that `name` means; ClientFault "not_found" that names what there is."""
        pools = self._supervisor.pools
        if spec := find_pool(name, pools, self._router.table.values()):
            return spec
        raise ClientFault("not_found", f"there is no pool, plugin or contract {name!r}", f"pools are {', '.join(sorted(pools))}")

    async def begin(self, request: SwapRequest, by: str) -> Swap:
        """Note the swap and start it; it goes on in the background."""
        bounds = request.bounds
        if not 0 <= request.canary < 100 or bounds.watch_s < 0 or (request.canary and not bounds.watch_s):
            raise ClientFault("invalid", f"canary {request.canary} %, watched for {bounds.watch_s:g} s",
                              "a canary is 1 to 99 percent, for longer than 0 s")  # fmt: skip
        if request.before and not self.serves(request.before):
            raise ClientFault("not_found", f"pool {request.before!r} does not run", "see `kernelm plugin list`")
        if request.canary and not request.before:
            raise ClientFault("invalid", "a canary needs a pool to share with", "name the pool that it `replaces`")
        for other in self.swaps:
            mine = {request.to.pool, request.before, *request.routes} - {""}
            if other.pool == request.to.pool and other.phase == "watching" and not bounds.watch_s:  # enough was seen of it
                self._reverted[other.id] = ""
                return other
            if not other.over and mine & {other.pool, other.before, *other.routes}:
                raise ClientFault("conflict", f"swap {other.id} of {', '.join(other.routes)} to {other.pool} is {other.phase}",
                                  "wait for it, or roll it back", retriable=True)  # fmt: skip
        generation = request.generation or self._next_generation(request.routes)
        swap = Swap(secrets.token_hex(6), request.to.pool, request.before, request.routes, "starting", by, request.why, time.time(),
                    request.canary, bounds, generation, request.artifact, time.time())  # fmt: skip
        prior = tuple(r for r in map(self._router.table.get, request.routes) if r)
        await self._note(Record(swap, msgspec.structs.replace(request.to, parked=False), prior), "")
        self._drive(swap.id)
        return swap

    async def rollback(self, request: api.RollbackRequest, by: str) -> Swap:
        """Turn a swap that is under way, or swap back to the pool that the last one parked."""
        spec = self.resolve(request.pool)
        for swap in reversed(self.swaps):
            if spec.pool in (swap.pool, swap.before) and swap.phase in ("starting", "watching"):
                self._reverted[swap.id] = f"rolled back by {by}" + (f": {request.why}" if request.why else "")
                await self.changed()
                return swap
            if spec.pool == swap.pool and swap.phase == "done" and swap.before:
                old = self._supervisor.pools.get(swap.before)
                if old is None or not old.parked or not old.contracts:
                    break
                why = request.why or f"rollback of {swap.id}"
                return await self.begin(SwapRequest(old, swap.routes, spec.pool, bounds=api.Bounds(watch_s=0.0), why=why), by)
        raise ClientFault("not_found", f"there is nothing before pool {spec.pool!r} to go back to",
                          "a deployed model goes back by `kernelm models rollback`")  # fmt: skip

    # ---- carrying it out ----

    def _drive(self, id: str) -> None:
        task = self._tasks[id] = asyncio.create_task(self._run(id), name=f"swap-{id}")
        task.add_done_callback(lambda _: self._tasks.pop(id, None))

    async def _run(self, id: str) -> None:
        steps = {"starting": self._start, "watching": self._watch, "retiring": self._retire}
        while not (record := self._records[id]).swap.over:
            try:
                await steps[record.swap.phase](record)
            except Fault as fault:
                if fault.retriable and not isinstance(fault, PluginFault):  # the broker is away
                    log.warning("swap %s: %s", id, fault.message)
                    await asyncio.sleep(1.0)
                    continue
                await self._go_back(record, fault.message)
            except Exception as error:  # a bug here must not leave a pool half moved
                log.exception("swap %s", id)
                await self._go_back(record, f"{type(error).__name__}: {error}")

    async def _start(self, record: Record) -> None:
        """The new pool comes up and proves itself; then it gets its share of the calls."""
        swap, spec = record.swap, record.spec
        if self._supervisor.pools.get(spec.pool) != spec:
            await self._supervisor.want(spec)
        ready = await self._until_ready(swap, spec)
        manifest = self._catalog.of(spec)
        for instance in ready:
            await self._prove(instance, spec, manifest, swap)
        took = await self._router.set_all([_canary(r, swap) for r in record.prior] if swap.canary else self._final(record))
        await self._note(record, "watching" if swap.bounds.watch_s and swap.before else "retiring", took_ms=round(took, 3))
        for name in swap.routes:
            await self._bus.publish(api.RouteChanged(route=self._router.table[name], took_ms=took))

    async def _until_ready(self, swap: Swap, spec: PoolSpec) -> list[Instance]:
        async def look() -> list[Instance]:
            self._raise_if_reverted(swap)
            own = (i for i in self._registry.instances.values() if i.pool == spec.pool)
            mine = [i for i in own if i.since >= swap.begun or i.state == "ready"]  # it may have been started to be looked at
            dead = [i for i in mine if i.state not in LIVE]
            if dead or spec.pool in self._supervisor.quarantined:
                why = dead[0].reason if dead else self._supervisor.quarantined[spec.pool]
                raise PluginFault("not_ready", f"pool {spec.pool} did not start: {why}", "see the log of its instance")
            wanted = len(self._supervisor.nodes()) if spec.each_node else max(spec.instances, 1)
            return ready if len(ready := [i for i in mine if i.state == "ready"]) >= wanted > 0 else []

        return await self._wait_for(look, swap.begun + swap.bounds.ready_s - time.time(), f"pool {spec.pool} was not ready")

    async def _wait_for(self, look: Callable[[], Awaitable[T]], patience_s: float, what: str) -> T:
        until = time.monotonic() + patience_s
        async with self._changes:
            while not (found := await look()):
                if time.monotonic() > until:
                    raise PluginFault("not_ready", f"{what} within {patience_s:.0f} s", "see the log of its instance")
                with suppress(TimeoutError):  # a node may come without an event of ours
                    await asyncio.wait_for(self._changes.wait(), 1.0)
        return found

    async def _prove(self, instance: Instance, spec: PoolSpec, manifest: Manifest | None, swap: Swap) -> None:
        """Contracts agreed on, verbs answered, and the manifest's own probe."""
        lacking = [r for r in swap.routes if "/" in r and r not in instance.contracts]
        if lacking:
            raise PluginFault("version_mismatch", f"{instance.id} agreed on {', '.join(instance.contracts) or 'no contract'}, "
                              f"and not on {', '.join(lacking)}", "install matching versions")  # fmt: skip
        await self._bus.call(api.Lifecycle.probe, Empty(), instance=instance.id, timeout_s=10.0)
        if manifest is not None and manifest.probe is not None:
            contract, _, method = manifest.probe.call.partition(".")
            plain = f"{contract.replace('/', '.v')}.{method}"
            tails = [f"model.{m}.{method}" for m in spec.models] if manifest.probe.of_model else [plain]
            for tail in tails:
                try:
                    body = msgspec.json.encode(manifest.probe.request)
                    await self._bus.request(f"inst.{instance.id}.{tail}.{self._bus.user}", body, 30.0)
                except Fault as fault:
                    raise PluginFault("not_ready", f"{instance.id} failed its probe {manifest.probe.call}: {fault.message}",
                                      "see the log of the instance") from fault  # fmt: skip

    async def _watch(self, record: Record) -> None:
        """Compare the two until the window is over; too bad, and it goes back."""
        swap = record.swap
        old0, new0 = await self._counters(swap.before), await self._counters(swap.pool)
        while True:
            self._raise_if_reverted(swap)
            mine = [i for i in self._registry.instances.values() if i.pool == swap.pool and i.since >= swap.since]
            if dead := [i for i in mine if i.state not in LIVE]:
                raise PluginFault("not_ready", f"{dead[0].id} is {dead[0].state}: {dead[0].reason}")
            old, new = await self._counters(swap.before), await self._counters(swap.pool)
            recent = old.since(old0)
            reference = recent if recent.calls >= swap.bounds.min_calls else old
            if verdict := too_bad(new.since(new0), reference, swap.bounds):
                raise PluginFault("worse", verdict)
            if self._reverted.get(swap.id) == "" or (left := swap.since + swap.bounds.watch_s - time.time()) <= 0:
                break
            async with self._changes:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changes.wait(), min(LOOK_S, left))
        took = await self._router.set_all(self._final(record)) if swap.canary else swap.took_ms
        await self._note(record, "retiring", took_ms=round(took, 3), outcome=new.since(new0).text)

    async def _counters(self, pool: str) -> Counters:
        """The calls of a pool so far; an instance that does not answer counts for nothing here, its lease tells."""
        total = Counters()
        for instance in self._registry.instances.values():
            if instance.pool == pool and instance.state == "ready":
                try:
                    probe = await self._bus.call(api.Lifecycle.probe, Empty(), instance=instance.id, timeout_s=2.0)
                    total = total.plus(Counters.of(probe))
                except Fault as fault:
                    log.warning("%s is not counted: %s", instance.id, fault.message)
        return total

    async def _retire(self, record: Record) -> None:
        """Nothing is routed to the old pool any more: drain it, and keep it to go back to."""
        swap = record.swap
        if old := self._supervisor.pools.get(swap.before):
            await self._supervisor.want(msgspec.structs.replace(old, parked=True))

            async def gone() -> bool:
                return not any(i.pool == swap.before and i.state in LIVE for i in self._registry.instances.values())

            try:
                await self._wait_for(gone, 600.0, f"pool {swap.before} did not end")
            except PluginFault as fault:  # it gets no calls: nothing to go back for
                log.error("swap %s: %s", swap.id, fault.message)
        for earlier in self.swaps:  # one step back is kept, not the whole past
            spec = self._supervisor.pools.get(earlier.before)
            if earlier.pool == swap.before and spec and spec.parked and spec.pool != swap.pool:
                await self._supervisor.unwant(spec.pool)
        await self._note(record, "done")
        await self._catalog.forget(self._supervisor.pools)

    async def _go_back(self, record: Record, why: str) -> None:
        """The routes as they were, and the new pool away."""
        swap = record.swap
        if swap.phase != "starting":
            gone = [n for n in swap.routes if all(r.name != n for r in record.prior)]
            await self._router.set_all(record.prior, gone, back=True)
        await self._supervisor.unwant(swap.pool)
        wished = self._reverted.pop(swap.id, None)
        await self._note(record, "failed" if swap.phase == "starting" and not wished else "rolled_back", outcome=why)

    def _final(self, record: Record) -> list[Route]:
        swap, kind = record.swap, "svc" if record.spec.contracts else "model"
        return [Route(name, kind, (Destination(swap.pool, 100),), swap.generation, swap.artifact, swap.why)  # type: ignore[arg-type]
                for name in swap.routes]  # fmt: skip

    def _raise_if_reverted(self, swap: Swap) -> None:
        if why := self._reverted.get(swap.id):
            raise PluginFault("reverted", why)

    async def _note(self, record: Record, phase: str, **fields: Any) -> None:
        """Make a phase durable, and an event."""
        was, swap = record.swap.phase if phase else "", record.swap
        if phase:
            swap = msgspec.structs.replace(swap, phase=phase, since=time.time(), **fields)
            record = msgspec.structs.replace(record, swap=swap)
        await self._bucket.put(f"swap.{swap.id}", record, -1, patience_s=30)
        self._records[swap.id] = record
        await self._bus.publish(api.SwapChanged(swap=swap, was=was))
        log.info("swap %s to %s is %s%s", swap.id, swap.pool, swap.phase, f": {swap.outcome}" if swap.outcome else "")
        for old in [s.id for s in self.swaps if s.over][:-KEPT]:
            del self._records[old]
            await self._bucket.delete(f"swap.{old}")


def _canary(route: Route, swap: Swap) -> Route:
    to = (Destination(swap.before, 100 - swap.canary), Destination(swap.pool, swap.canary))
    return msgspec.structs.replace(route, to=to, why=swap.why or "canary")
