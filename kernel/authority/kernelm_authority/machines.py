"""Further machines: their members come back by keys of their own, which they keep, until an administrator forgets the machine.

The first start of a member there spends a one-time token (`machine_token`), and binds a key that was made on that machine to
one right: to enroll, as that member and nobody else, as often as it starts. Each time it is a new enrollment under a new key,
so whoever held the member's name before is shut out, as ever. Who a key speaks for stands in its signed JWT, never in what it
says. Records of the kernel's, in KV `registry`: `member.machine-<member>`, and `member.<member>` while it is there.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from kernelm_authority.identity import Authority, Grant
from kernelm_sdk.bus import Bus
from kernelm_sdk.contract import TOKEN
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Empty, Instance, MachineName

FIRST = "local"  # the name of the machine that the others join
ROLES = ("machine", "service")  # of members that are named after their machine


class _Holder(msgspec.Struct, frozen=True):
    """What is needed here of a member's record."""

    grant: Grant


def machine_token(authority: Authority, member: str, ttl_s: int) -> str:
    """A one-time token, good for `ttl_s`, that binds a key of a further machine to its `member` ("node-two")."""
    return authority.token(member, Grant("machine", f"machine-{member}", pool=member), ttl_s)


class Machines:
    """Forgets machines. `shut_out(name)` ends a member's key at once; `note(call, what, on)` writes the audit trail."""

    def __init__(self, bus: Bus, shut_out: Callable[[str], Awaitable[None]],
                 note: Callable[[Any, str, str], Awaitable[None]]) -> None:  # fmt: skip
        self._shut_out, self._note = shut_out, note
        self._members, self._instances = bus.bucket("registry", _Holder), bus.bucket("registry", Instance)

    async def forget(self, request: MachineName, call: Any) -> Empty:
        """Shut out all of a machine: first the keys that its members come back by, then those members and the instances there.
        Said again after it was interrupted, it does the rest. ClientFault "not_found" if nothing of that name ever joined."""
        if not TOKEN.match(request.name) or request.name == FIRST:
            raise ClientFault("invalid", f"{request.name!r} is no further machine", "name one of `machines` in deploy.toml")
        nodes = {i.id: i.node for i, _ in (await self._instances.all("instance")).values()}
        holders = [holder.grant for holder, _ in (await self._members.all("member")).values()]
        gone = [grant for grant in holders if _machine(grant, nodes) == request.name]
        if not gone:
            raise ClientFault("not_found", f"no machine {request.name!r} has joined, or it was forgotten already",
                              "`kernelm ps` lists the members of each")  # fmt: skip
        for grant in sorted(gone, key=lambda grant: grant.role != "machine"):
            await self._shut_out(grant.name)
        await self._note(call, "forget_machine", request.name)
        return Empty()


def _machine(grant: Grant, nodes: dict[str, str]) -> str:
    """Where the holder of `grant` is at home: a service as its name says ("node-two"), an instance as `nodes` does."""
    return grant.pool.partition("-")[2] if grant.role in ROLES else nodes.get(grant.name, "")
