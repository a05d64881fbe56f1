"""Who holds which key: the members' nkeys, which change with every renewal, and the API keys of clients.

A record is written before anything follows from it, and every step may be repeated: an answer can be lost, and the kernel
can die between any two lines.
"""

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from kernelm.router import Router
from kernelm_authority.identity import LIFETIME_S, Authority, Grant
from kernelm_sdk import system as api
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Empty, Enrolled, Key, KeyCreated

LONGEST_OVERLAP_S = 3600  # a key that was given up is not accepted for longer than this


class Member(msgspec.Struct, frozen=True):
    """Who holds which key, with what rights: what `renew` and revocation need."""

    grant: Grant
    key: str
    expires: int
    previous: str = ""  # the key before the last renewal, revoked at
    previous_until: int = 0  # Unix seconds
    previous_expires: int = 0  # of its last JWT


class Members:
    """Enrolls, renews and shuts out the members of the system: records `member.<name>` in KV `registry`."""

    def __init__(self, bus: Bus, authority: Authority, router: Router, note: Callable[[Any, str, str], Awaitable[None]]) -> None:
        self._records, self._authority, self._router, self._note = bus.bucket("registry", Member), authority, router, note

    async def of(self, name: str) -> Member:
        return (await self._get(name))[0]

    async def _get(self, name: str) -> tuple[Member, int]:
        member, revision = await self._records.get(f"member.{name}")
        if member is None:
            raise ClientFault("unauthorized", f"{name!r} is not enrolled", "enroll with a join token")
        return member, revision

    async def _claim(self, key: str, name: str) -> None:
        holder, revision = await self._records.get(f"holder.{key}")
        if holder is None:
            holder, ttl_s = Member(Grant("", name), key, 0), LIFETIME_S + LONGEST_OVERLAP_S
            await self._records.put(f"holder.{key}", holder, revision, ttl_s)
        elif holder.grant.name != name:  # or giving it up would shut that one out
            raise ClientFault("unauthorized", "this key is somebody else's", "make one of your own")

    async def leave(self, name: str) -> None:
        """An instance has ended: its name renews nothing any more."""
        await self._records.delete(f"member.{name}")

    async def enroll(self, request: api.EnrollRequest, call: Any) -> Enrolled:
        name, grant, left_s = self._authority.verify(request.token, "join")
        if name != call.caller:
            raise ClientFault("unauthorized", "the token belongs to another connection", "connect with the token itself")
        used, revision = await self._records.get(f"token.{name}")
        if not left_s:  # what a further machine's member comes back by, until it is forgotten
            await self.of(name)
        elif used is None:
            await self._records.put(f"token.{name}", Member(grant, request.public_key, 0), revision, left_s + 3600)
        elif used.key != request.public_key:  # the same key again: the first answer was lost
            raise ClientFault("unauthorized", "the join token was used already", "issue a new one")
        await self._claim(request.public_key, grant.name)
        before, _ = await self._records.get(f"member.{grant.name}")
        if before and before.key != request.public_key:
            await self.shut_out(grant.name)  # one name, one holder: the one before may be frozen, and thaw
        jwt, expires = self._authority.issue(grant, request.public_key, LIFETIME_S)
        await self._records.put(f"member.{grant.name}", Member(grant, request.public_key, expires), -1)
        if grant.role == "machine" or name.startswith("machine-"):
            await self._note(call, "enroll", grant.name)
        return Enrolled(grant.name, jwt, expires)

    async def renew(self, request: api.RenewRequest, call: Any) -> Enrolled:
        """A JWT for the caller's next key; its present one is revoked after `overlap_s`. Said twice, it is done once."""
        member, revision = await self._get(call.caller)
        await self._claim(request.public_key, call.caller)
        jwt, expires = self._authority.issue(member.grant, request.public_key, LIFETIME_S)
        if request.public_key == member.key:
            member = msgspec.structs.replace(member, expires=expires)
        else:
            at = int(self._authority.clock()) + min(max(request.overlap_s, 0), LONGEST_OVERLAP_S)
            member = Member(member.grant, request.public_key, expires, member.key, at, member.expires)
        await self._records.put(f"member.{call.caller}", member, revision)
        if member.previous_until < member.previous_expires:  # else it ends by itself before
            await self._router.revoke(member.previous, member.previous_expires, member.previous_until, call.caller)
        return Enrolled(call.caller, jwt, expires)

    async def shut_out(self, name: str) -> None:
        """Cut a member's connections, if it is one, and let it in no more."""
        member, revision = await self._records.get(f"member.{name}")
        while member:
            try:
                await self._records.delete(f"member.{name}", revision)
                break
            except ClientFault:  # it was renewed at this moment
                member, revision = await self._records.get(f"member.{name}")
        if member:
            await self._router.hasten(name)
            await self._router.revoke(member.key, member.expires)


class Keys:
    """API keys, records in KV `keys`. `note(call, what, on)` writes the audit trail."""

    def __init__(self, bus: Bus, authority: Authority, router: Router, note: Callable[[Any, str, str], Awaitable[None]]) -> None:
        self._bus, self._authority, self._router, self._note = bus, authority, router, note
        self._records = bus.bucket("keys", Key)

    async def create(self, request: api.KeyRequest, call: Any) -> KeyCreated:
        now = int(self._authority.clock())
        expires = now + request.expires_s if request.expires_s else 0
        key = Key(secrets.token_hex(6), request.name, "", request.models, request.methods, request.tenant, now, expires,
                  public_key=request.public_key, admin=request.admin)  # fmt: skip
        return await self._keep(key, 0, "created", call)

    async def list(self, request: Empty, call: Any) -> api.KeyList:
        return api.KeyList(tuple(key for key, _ in (await self._records.all()).values()))

    async def rotate(self, request: api.RotateKey, call: Any) -> KeyCreated:
        """A new secret, and a new nkey where the request has one. The old ones are accepted for `overlap_s` more."""
        key, revision = await self._get(request.id)
        if key.revoked or 0 < key.expires < self._authority.clock():
            raise ClientFault("conflict", f"key {key.id} ({key.name}) was revoked or has expired", "create another")
        until, old = int(self._authority.clock()) + min(max(request.overlap_s, 0), LONGEST_OVERLAP_S), key.public_key
        new = msgspec.structs.replace(key, previous_hash=key.hash if request.overlap_s else "", previous_until=until,
                                      public_key=request.public_key or old)  # fmt: skip
        if old and old != new.public_key:
            await self._router.revoke(old, key.expires, until, f"key-{key.id}")
        return await self._keep(new, revision, "rotated", call, bool(request.public_key))

    async def revoke(self, request: api.KeyName, call: Any) -> Key:
        key, revision = await self._get(request.id)
        if key.public_key:
            await self._router.hasten(f"key-{key.id}")
            await self._router.revoke(key.public_key, key.expires)
        key = msgspec.structs.replace(key, revoked=True, previous_hash="")
        await self._records.put(request.id, key, revision)
        await self._tell(key, "revoked", call)
        return key

    async def _get(self, identifier: str) -> tuple[Key, int]:
        key, revision = await self._records.get(identifier)
        if key is None:
            raise ClientFault("not_found", f"there is no key {identifier!r}", "see `kernelm key list`")
        return key, revision

    async def _keep(self, key: Key, revision: int, change: Any, call: Any, issue: bool = True) -> KeyCreated:
        """Give the key a secret of 256 random bits, and a JWT for its nkey."""
        secret, jwt = secrets.token_urlsafe(32), ""
        key = msgspec.structs.replace(key, hash=hashlib.sha256(secret.encode()).hexdigest())
        if key.public_key and issue:
            grant = Grant("client", f"key-{key.id}", models=key.models, methods=key.methods)
            lifetime = max(key.expires - int(self._authority.clock()), 1) if key.expires else 0
            jwt, _ = self._authority.issue(grant, key.public_key, lifetime)
        await self._records.put(key.id, key, revision)
        await self._tell(key, change, call)
        return KeyCreated(key, f"km_{key.id}_{secret}", jwt)

    async def _tell(self, key: Key, change: Any, call: Any) -> None:
        await self._bus.publish(api.KeyChanged(id=key.id, name=key.name, change=change, by=call.caller))
        await self._note(call, f"{change.removesuffix('d')}_key", key.id)
