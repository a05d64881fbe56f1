"""The routing table, pushed to the broker as mappings in the account's claims.

The kernel never sees a call: it signs the whole table, the broker applies it at wire speed. Rules that were measured
(see the design's "Routing and permission in the broker"): claims signed by the wrong key are acknowledged and not
applied; older claims are accepted; claims without a revocation revive the key. So only the holder of the leader epoch
pushes, always everything, `iat` strictly rising, and reads back what is in force.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import msgspec

from kernelm_authority.identity import LIFETIME_S, Authority, read
from kernelm_sdk.bus import Bucket, Bus
from kernelm_sdk.enrollment import public_key
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import Route


class Leader(msgspec.Struct, frozen=True):
    """Which kernel may push: the one that last raised the epoch."""

    epoch: int
    boot: str
    iat: int  # of the last push
    key: str = ""  # its nkey: the next one shuts it out, or calls would go to the deposed kernel too


class Revoked(msgspec.Struct, frozen=True):
    """A user whose JWTs issued up to `at` (0: all of them, at once) are refused."""

    key: str
    at: int
    until: int  # when the last of them ends, 0 for never; kept for a life more: the broker's clock, which ends it, may be put back
    owner: str = ""


class Router:
    """Holds the table in KV `routes` and keeps the broker's mappings equal to it."""

    def __init__(self, authority: Authority, system: Bus, account: Bus) -> None:
        self._authority, self._system, self._boot = authority, system, account.boot
        self._key = public_key(account.credentials.seed)
        self._routes: Bucket[Route] = account.bucket("routes", Route)
        self._leader: Bucket[Leader] = account.bucket("routes", Leader)
        self._revoked: Bucket[Revoked] = account.bucket("routes", Revoked)
        self._lock = asyncio.Lock()
        self.table: dict[str, Route] = {}
        self.in_force: tuple[Route, ...] = ()  # of the table, what the broker has applied
        self.revoked: dict[str, Revoked] = {}
        self.epoch = 0
        self.health = "not pushed yet"

    async def lead(self) -> None:
        """Take the leadership: raise the epoch, read the table, push it."""
        await self._authority.clock.ask(self._system)
        leader, revision = await self._leader.get("leader")
        self.epoch = (leader.epoch if leader else 0) + 1
        await self._leader.put("leader", Leader(self.epoch, self._boot, leader.iat if leader else 0, self._key), revision)
        self.table = {r.name: r for r, _ in (await self._routes.all("route")).values()}
        self.revoked = {r.key: r for r, _ in (await self._revoked.all("revoked")).values()}
        if leader and leader.key:
            await self.revoke(leader.key, int(self._authority.clock()) + LIFETIME_S)  # later it has noticed: it must not push
        else:
            await self.push()

    async def set_all(self, routes: Iterable[Route], gone: Iterable[str] = (), back: bool = False) -> float:
        """Make `routes` durable, drop those named in `gone`, and put it all in force by one push; the milliseconds that the
        broker's part took. A generation only goes down where a swap goes `back`."""
        new, old = {r.name: r for r in routes}, {name: self.table[name] for name in gone if name in self.table}
        for route in new.values():
            total = sum(d.weight for d in route.to)
            if total != 100 or any(d.weight < 1 for d in route.to):
                raise ClientFault("invalid", f"route {route.name!r}: weights sum to {total}", "each at least 1 %, 100 % in all")
            kept = self.table.get(route.name)
            if kept and kept.generation > route.generation and not back:
                raise ClientFault("stale_generation", f"{route.name!r} is at generation {kept.generation}, not {route.generation}")
            await self._routes.put(_key(route), route, -1, patience_s=10)
        for route in old.values():
            await self._routes.delete(_key(route))
        self.table = {n: r for n, r in self.table.items() if n not in old} | new  # at once: who pushes meanwhile pushes no half
        return await self.push()

    async def revoke(self, key: str, until: int, at: int = 0, owner: str = "") -> None:
        """Refuse the user's JWTs issued up to now, or up to `at` and only from then on; the broker cuts its connections."""
        if at and key in self.revoked:
            return  # never later than was said before
        record = Revoked(key, at, until, owner)
        await self._revoked.put(f"revoked.{key}", record, -1, patience_s=10)
        self.revoked[key] = record
        if key in self._due():
            await self.push()

    async def hasten(self, owner: str) -> None:
        """What was to be refused of `owner` later is refused now."""
        for later in [r for r in self.revoked.values() if r.owner == owner and r.at > self._authority.clock()]:
            await self.revoke(later.key, later.until)

    def _due(self) -> dict[str, int]:  # at once: up to a JWT's own end, which no clock that signed it has put before its beginning
        return {r.key: r.at or r.until or 1 << 40 for r in self.revoked.values() if r.at <= self._authority.clock()}

    def mappings(self) -> dict[str, Any]:
        """One wildcard mapping a name: every message scans them all."""
        result: dict[str, Any] = {}
        for route in self.table.values():
            if route.kind == "model":
                source, tail = f"model.{route.name}.*.*", f"model.{route.name}"
            else:
                name, _, major = route.name.partition("/")
                source, tail = f"svc.{name}.v{major}.*.*", f"{name}.v{major}"
            result[source] = [{"subject": f"impl.{d.pool}.{tail}.{{{{wildcard(1)}}}}.{{{{wildcard(2)}}}}", "weight": d.weight}
                              for d in route.to]  # fmt: skip
        return result

    async def push(self) -> float:
        """Sign the whole table, push it, read it back; KernelFault "routes_not_in_force" if the broker has another one."""
        async with self._lock:
            leader, revision = await self._leader.get("leader")
            if leader is None or leader.epoch != self.epoch or leader.boot != self._boot:
                self.health = f"deposed by epoch {leader.epoch if leader else 0}"
                raise KernelFault("not_leader", f"this kernel held epoch {self.epoch} and was deposed", "it has to stop")
            iat = max(int(self._authority.clock()), leader.iat + 1)
            await self._leader.put("leader", Leader(self.epoch, self._boot, iat, self._key), revision)
            for key in [k for k, r in self.revoked.items() if 0 < r.until < self._authority.clock() - LIFETIME_S]:
                await self._revoked.delete(f"revoked.{self.revoked.pop(key).key}")
            jwt, pushed = self._authority.account_jwt(mappings=self.mappings(), iat=iat, revocations=self._due()), self.table
            begun = time.perf_counter()
            await self._system.request("$SYS.REQ.CLAIMS.UPDATE", jwt.encode(), 5.0)
            took = (time.perf_counter() - begun) * 1e3
            await self._compare(jwt)
            self.in_force = tuple(pushed.values())
            return took

    async def check(self) -> None:
        """Compare what is in force with the table, while nobody pushes. And see what time it is there."""
        async with self._lock:
            await self._compare()

    async def _compare(self, jwt: str = "") -> None:
        wanted = self.mappings(), self._due(), self._authority.signing.public()
        await self._authority.clock.ask(self._system)
        in_force = (await self._system.request(self._authority.lookup, b"", 5.0)).data.decode()
        claims = read(in_force, self._authority.operator)["nats"] if in_force else {}
        there = claims.get("mappings", {}), claims.get("revocations", {}), claims.get("signing_keys", [])
        same = in_force == jwt if jwt else there == wanted
        self.health = "in force" if same else "the broker holds another table"
        if not same:
            raise KernelFault("routes_not_in_force", self.health, "it is pushed again", retriable=True)


def _key(route: Route) -> str:
    return f"route.{route.kind}.{route.name.replace('/', '.')}"
