"""Records in memory over compare-and-set writes to KV, which is the truth.

The cache is read from KV at the start, and a record again whenever a write finds that another writer was first.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Generic, TypeVar, cast

import msgspec

from kernelm_contracts.jobs import JobRecord
from kernelm_sdk.bus import Bucket
from kernelm_sdk.errors import ClientFault, Fault

log = logging.getLogger("kernelm.jobs")
T = TypeVar("T", bound=msgspec.Struct)
R = TypeVar("R")
BATCH = 1000  # records that are written at once; the broker takes no more
IN_FLIGHT = 4  # batches: the next one is made while the broker syncs
PATIENCE_S = 30.0  # for a broker that restarts
encode = msgspec.json.Encoder().encode


async def every(work: Iterable[Awaitable[R]]) -> list[R]:
    """The results of all, at once; when all are over, the first fault."""
    done = await asyncio.gather(*work, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return cast(list[R], done)


class Records(Generic[T]):
    """Records of one kind under `<prefix>.<id>` in a bucket."""

    def __init__(self, bucket: Bucket[T], prefix: str) -> None:
        self._bucket, self._prefix = bucket, prefix
        self._cache: dict[str, tuple[T, int]] = {}  # id -> record, revision
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def load(self) -> None:
        """Forget the cache and read everything."""
        stored = await self._bucket.all(self._prefix)
        for id in list(self._cache):
            self._forget(id)
        for key, (record, revision) in stored.items():
            self._keep(key.removeprefix(f"{self._prefix}."), record, revision)

    def _keep(self, id: str, record: T, revision: int) -> None:
        self._cache[id] = record, revision

    def _forget(self, id: str) -> None:
        del self._cache[id]

    def get(self, id: str) -> T | None:
        entry = self._cache.get(id)
        return entry[0] if entry else None

    def need(self, id: str) -> T:
        """The record; ClientFault "not_found" if there is none."""
        if (record := self.get(id)) is None:
            raise ClientFault("not_found", f"there is no {self._prefix} {id!r}", "see `kernelm jobs`")
        return record

    def items(self) -> dict[str, T]:
        return {id: record for id, (record, _) in self._cache.items()}

    def values(self) -> Iterable[T]:
        return [record for record, _ in self._cache.values()]

    async def create(self, id: str, record: T) -> bool:
        """Write a record where there is none; False if there is one by now, which is then in the cache."""
        async with self._locks[id]:
            if id in self._cache:
                return False
            key, stored, revision = f"{self._prefix}.{id}", None, 0
            while stored is None:
                try:
                    self._keep(id, record, await self._bucket.put(key, record, revision, patience_s=PATIENCE_S))
                    return True
                except ClientFault as fault:
                    if fault.code != "conflict":
                        raise
                stored, revision = await self._bucket.get(key)  # none, and a revision: there was one, which was deleted
            self._keep(id, stored, revision)
            return encode(stored) == encode(record)  # our own write, whose answer was lost

    async def update(self, id: str, change: Callable[[T], T]) -> tuple[T, T]:
        """Write `change(record)`, again and again on the newest record until no other writer was first; (before, after).
        What `change` returns unchanged is not written; what it raises leaves everything as it was."""
        async with self._locks[id]:
            while True:
                before = self.need(id)
                after = change(before)
                if after is before:
                    return before, before
                key = f"{self._prefix}.{id}"
                try:
                    revision = await self._bucket.put(key, after, self._cache[id][1], patience_s=PATIENCE_S)
                    self._keep(id, after, revision)
                    return before, after
                except ClientFault as fault:
                    if fault.code != "conflict":
                        raise
                stored, revision = await self._bucket.get(key)
                if stored is None:
                    self._forget(id)
                    continue
                self._keep(id, stored, revision)
                if encode(stored) == encode(after):  # our own write, whose answer was lost
                    return before, stored

    async def delete(self, id: str) -> None:
        """Delete a record, as it is in the cache; ClientFault "conflict" if another writer has changed it."""
        async with self._locks[id]:
            self.need(id)
            await self._bucket.delete(f"{self._prefix}.{id}", self._cache[id][1])
            self._forget(id)

    async def update_all(self, changes: Mapping[str, Callable[[T], T]]) -> dict[str, tuple[T, T]]:
        """As `update` for many, in atomic batches; (before, after) of each. Where another writer was first on any of them, or
        it is not known whether a batch was stored, its records are written one by one."""
        ids = sorted(changes)
        batches = [{id: changes[id] for id in ids[at : at + BATCH]} for at in range(0, len(ids), BATCH)]
        turn = asyncio.Semaphore(IN_FLIGHT)
        stored = await every(self._stored(batch, turn) for batch in batches)
        return {id: pair for pairs in stored for id, pair in pairs.items()}

    async def _stored(self, changes: Mapping[str, Callable[[T], T]], turn: asyncio.Semaphore) -> dict[str, tuple[T, T]]:
        async with turn:
            try:
                return await self._store(changes)
            except Fault as fault:
                if not fault.retriable:
                    raise
                log.warning("a batch of %d records is written one by one: %s", len(changes), fault.message)
                return dict(zip(changes, await every(self.update(id, change) for id, change in changes.items()), strict=True))

    async def _store(self, changes: Mapping[str, Callable[[T], T]]) -> dict[str, tuple[T, T]]:
        held: list[asyncio.Lock] = []
        try:
            for id in sorted(changes):
                await self._locks[id].acquire()
                held.append(self._locks[id])
            pairs = {id: (before := self.need(id), change(before)) for id, change in changes.items()}
            new = [(id, after) for id, (before, after) in pairs.items() if after is not before]
            records = [(f"{self._prefix}.{id}", after, self._cache[id][1]) for id, after in new]
            for (id, after), revision in zip(new, await self._bucket.put_all(records), strict=True):
                self._keep(id, after, revision)
            return pairs
        finally:
            for lock in held:
                lock.release()

    def remember(self, id: str, record: T) -> None:
        """Change the cache only: for news that is worth showing but not a write to disk."""
        if id in self._cache:
            self._keep(id, record, self._cache[id][1])


class JobRecords(Records[JobRecord]):
    """The jobs, and which are in a state, do the same work, or were submitted by another one: rounds and submissions look at
    those only, however many are over."""

    def __init__(self, bucket: Bucket[JobRecord], prefix: str) -> None:
        super().__init__(bucket, prefix)
        self._states: defaultdict[str, dict[str, JobRecord]] = defaultdict(dict)
        self._keys: defaultdict[str, dict[str, JobRecord]] = defaultdict(dict)
        self._parents: defaultdict[str, dict[str, JobRecord]] = defaultdict(dict)

    def _groups(self, job: JobRecord) -> list[dict[str, JobRecord]]:
        return [self._states[job.state], self._keys[job.key], *([self._parents[job.spec.parent]] if job.spec.parent else [])]

    def _keep(self, id: str, record: JobRecord, revision: int) -> None:
        before = self.get(id)
        if before is not None and (before.state, before.key) != (record.state, record.key):
            self._leave(before)
        super()._keep(id, record, revision)
        for group in self._groups(record):
            group[id] = record

    def _forget(self, id: str) -> None:
        self._leave(self.need(id))
        super()._forget(id)

    def _leave(self, job: JobRecord) -> None:
        for group in self._groups(job):
            del group[job.id]
        if not self._keys[job.key]:
            del self._keys[job.key]

    def in_states(self, *states: str) -> list[JobRecord]:
        return [job for state in states for job in self._states.get(state, {}).values()]

    def with_key(self, key: str) -> list[JobRecord]:
        """Those that do the same work."""
        return list(self._keys[key].values()) if key in self._keys else []

    def children(self, id: str) -> list[JobRecord]:
        return list(self._parents[id].values()) if id in self._parents else []
