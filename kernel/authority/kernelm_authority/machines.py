"""Further machines: their members come back by keys of their own, which they keep, until an administrator forgets the machine.

The first start of a member there spends a one-time token (`machine_token`), and binds a key that was made on that machine to
one right: to enroll, as that member and nobody else, as often as it starts. Each time it is a new enrollment under a new key,
so whoever held the member's name before is shut out, as ever. Who a key speaks for stands in its signed JWT, never in what it
says. Records of the kernel's, in KV `registry`: `member.machine-<member>`, `member.<member>` while it is there, and
`forgotten.<machine>` for as long as a token that was given to it before may be good.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from kernelm_authority.identity import Authority, Grant, read
from kernelm_sdk.bus import Bus
from kernelm_sdk.contract import TOKEN
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Empty, Enrolled, EnrollRequest, Instance, MachineName

FIRST = "local"  # the name of the machine that the others join
ROLES = ("machine", "service")  # of members that are named after their machine
KEPT_S = 3600  # longer than a token is good for
Enroll = Callable[[EnrollRequest, Any], Awaitable[Enrolled]]


class _Holder(msgspec.Struct, frozen=True):
    """What is needed here of a member's record."""

    grant: Grant


class _Forgotten(msgspec.Struct, frozen=True):
    """Of a machine: what was given to it up to `at` (Unix seconds) counts no more."""

    at: int


def machine_token(authority: Authority, member: str, ttl_s: int) -> str:
    """A one-time token, good for `ttl_s`, that binds a key of a further machine to its `member` ("node-two")."""
    return authority.token(member, Grant("machine", f"machine-{member}", pool=member), ttl_s)


class Machines:
    """Forgets machines. `shut_out(name)` ends a member's key at once; `note(call, what, on)` writes the audit trail."""

    def __init__(self, bus: Bus, authority: Authority, shut_out: Callable[[str], Awaitable[None]],
                 note: Callable[[Any, str, str], Awaitable[None]]) -> None:  # fmt: skip
        self._authority, self._shut_out, self._note = authority, shut_out, note
        self._members, self._instances = bus.bucket("registry", _Holder), bus.bucket("registry", Instance)
        self._forgotten = bus.bucket("registry", _Forgotten)

    def guard(self, enroll: Enroll) -> Enroll:
        """`enroll`, but for who comes with what was given to a machine, for a member or instance there, before it was forgotten."""

        async def guarded(request: EnrollRequest, call: Any) -> Enrolled:
            _, grant, _ = self._authority.verify(request.token, "join")
            instance, _ = await self._instances.get(f"instance.{grant.name}") if grant.role == "plugin" else (None, 0)
            if machine := _machine(grant, {grant.name: instance.node} if instance else {}):
                forgotten, _ = await self._forgotten.get(f"forgotten.{machine}")
                if forgotten is not None and read(request.token)["iat"] <= forgotten.at:
                    text = f"machine {machine!r} was forgotten since the token was made"
                    raise ClientFault("unauthorized", text, "make a new one")
            return await enroll(request, call)

        return guarded

    async def forget(self, request: MachineName, call: Any) -> Empty:
        """Shut out all of a machine: first the keys that its members come back by, then those members and the instances there.
        Said again after it was interrupted, it does the rest. ClientFault "not_found" if nothing of that name ever joined."""
        if not TOKEN.match(request.name) or request.name == FIRST:
            raise ClientFault("invalid", f"{request.name!r} is no further machine", "name one of `machines` in deploy.toml")
        if not await self._there(request.name):
            raise ClientFault("not_found", f"no machine {request.name!r} has joined, or it was forgotten already",
                              "`kernelm ps` lists the members of each")  # fmt: skip
        at = int(self._authority.clock())
        await self._forgotten.put(f"forgotten.{request.name}", _Forgotten(at), -1, KEPT_S)
        for name in await self._there(request.name):
            await self._shut_out(name)
        await self._note(call, "forget_machine", request.name)
        await asyncio.sleep(at + 1 - self._authority.clock())  # JWTs have whole seconds: what is made after this is dated later
        return Empty()

    async def _there(self, machine: str) -> list[str]:
        """Who has a key and is at home there; the keys that members come back by first."""
        nodes = {i.id: i.node for i, _ in (await self._instances.all("instance")).values()}
        holders = [holder.grant for holder, _ in (await self._members.all("member")).values()]
        found = [grant for grant in holders if _machine(grant, nodes) == machine]
        return [grant.name for grant in sorted(found, key=lambda grant: grant.role != "machine")]


def _machine(grant: Grant, nodes: dict[str, str]) -> str:
    """Where the holder of `grant` is at home: a service as its name says ("node-two"), an instance as `nodes` does."""
    return grant.pool.partition("-")[2] if grant.role in ROLES else nodes.get(grant.name, "")
