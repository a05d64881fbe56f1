"""Shadows on record: which deployment answers copies of another one's calls, and what came of the copies. Gateways make and compare
them."""

import time

from msgspec.structs import replace

from kernelm_contracts.shadows import Compared, Copies, ModelShadowed, Shadow, ShadowRequest
from kernelm_jobs.records import Records
from kernelm_jobs.table import Table
from kernelm_jobs.usage import DOOR
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault


class Shadows:
    """Of all deployments; each has one shadow at most."""

    def __init__(self, bus: Bus, table: Table) -> None:
        self._table = table
        self._records: Records[Shadow] = Records(bus.bucket("deployments", Shadow), "shadow")

    async def load(self) -> None:
        """Read what is on record."""
        await self._records.load()

    async def set(self, request: ShadowRequest, by: str) -> Shadow:
        """Begin, change or end a shadow; ClientFault "invalid", "unknown_model", "not_found"."""
        before = self._records.get(request.name)
        to = request.to or (before.to if before else "")
        self._check(request, to)
        began = Shadow(request.name, to, request.percent, time.time(), by, request.why)
        if before is None:
            await self._records.create(request.name, began)
        _, stored = await self._records.update(request.name, lambda now: changed(now, began))
        self._table.publish(ModelShadowed(model=stored.name, to=stored.to, percent=stored.percent, by=by, why=request.why))
        return stored

    def require_none(self, name: str) -> None:
        """ClientFault "conflict" while copies of its calls are made, or while it answers copies."""
        for shadow in self._records.values():
            if shadow.percent and name in (shadow.name, shadow.to):
                raise ClientFault("conflict", f"{shadow.to} answers copies of the calls of {shadow.name}",
                                  f"end that first: kernelm model shadow {shadow.name} --end")  # fmt: skip

    def _check(self, request: ShadowRequest, to: str) -> None:
        if not 0 <= request.percent <= 100:
            raise ClientFault("invalid", f"`percent` is {request.percent}", "it must be 1 to 100, or 0 to end it", param="percent")
        if not to:
            raise ClientFault("not_found", f"{request.name!r} has no shadow", "name the deployment that shall be one", param="to")
        if to == request.name:
            raise ClientFault("invalid", f"`to` is {to!r} itself", "name another deployment", param="to")
        for name in (request.name, to) if request.percent else ():
            self._table.deployment(name)

    async def add(self, told: Compared, by: str) -> None:
        """Count what a gateway tells; what it tells of a shadow that another one has replaced is dropped."""
        if by.partition("-")[0] != DOOR:
            raise ClientFault("permission_denied", f"{by} makes no copies of calls", "only a gateway says what came of them")
        if self._records.get(told.name) is not None:
            await self._records.update(told.name, lambda now: counted(now, told))


def changed(now: Shadow, new: Shadow) -> Shadow:
    """`new` in the place of `now`; where the deployments are the same and it was not over, it goes on with what came of it."""
    goes_on = now.to == new.to and (now.percent > 0 or new.percent == 0)
    return replace(new, since=now.since, copies=now.copies) if goes_on else new


def counted(now: Shadow, told: Compared) -> Shadow:
    """`now` with what was told of it."""
    if (now.to, now.since) != (told.to, told.since):
        return now
    sums = {name: getattr(now.copies, name) + getattr(told.copies, name) for name in Copies.__struct_fields__}
    return replace(now, copies=Copies(**sums))
