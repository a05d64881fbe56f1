"""Elastic jobs: what is left over goes where a further member adds most, by the measured curves; goodput counts, not utilization.

The value of a step is the speed that it adds, relative to the job's speed, over the time that the job still needs: what shortens
short jobs comes first, which lowers the average completion time. A running job changes only if it saves `gain` times what the
restart costs, and a moment after its last change at the earliest.
"""

from heapq import heapify, heappop, heappush
from typing import NamedTuple

from kernelm_contracts.scheduler import PendingJob, PlacedJob, Share
from kernelm_scheduler.amounts import allocation_of, amount_of, size, speed_of
from kernelm_scheduler.index import Index
from kernelm_scheduler.queue import Ask
from kernelm_scheduler.quotas import Ledger
from kernelm_scheduler.room import Room
from kernelm_scheduler.victims import movable

MOVES = 64  # so many jobs are looked at for another place in one round


class Grown(NamedTuple):
    """A job's new allocation."""

    shares: tuple[Share, ...]
    saved_s: float


class Growing:
    """Hands out what is left in one round."""

    def __init__(self, index: Index, room: Room, ledger: Ledger) -> None:
        self.index, self.room, self.ledger, self.rules = index, room, ledger, index.settings.elastic
        self.shares: dict[str, tuple[Share, ...]] = {}
        self.plugins: dict[str, str] = {}
        self.asks: dict[str, Ask] = {}

    def grow(self, jobs: list[tuple[PendingJob | PlacedJob, tuple[Share, ...], str]]) -> dict[str, Grown]:
        """`jobs` with their allocations and plugins -> the allocations that have changed. Running ones may get theirs back."""
        known = {job.id: job for job, _, _ in jobs if job.most > job.members and job.remaining > 0 and job.speeds}
        heap: list[tuple[float, str]] = []
        for job, shares, plugin in jobs:
            if job.id in known:
                self.shares[job.id], self.plugins[job.id] = shares, plugin
                self.asks[job.id] = Ask(job.request, job.plugins, job.tenant, 1, (shares[0].type,) if shares[0].type else (),
                                        job.device_mb, "", job.avoid)  # fmt: skip
                heap.append((-self._value(job, shares), job.id))
        before = dict(self.shares)
        heapify(heap)
        while heap:
            value, id = heappop(heap)
            if value < 0.0 and (more := self._one_more(known[id])):
                self.shares[id] = more
                heappush(heap, (-self._value(known[id], more), id))
        grown = {}
        for id, shares in sorted(self.shares.items()):
            if shares != before[id]:
                saved = self._saved(known[id], before[id], shares)
                if isinstance(known[id], PlacedJob) and saved < self.rules.gain * known[id].restart_s:
                    self._undo(known[id], before[id], shares)
                else:
                    grown[id] = Grown(shares, saved)
        return grown

    def _value(self, job: PendingJob | PlacedJob, shares: tuple[Share, ...]) -> float:
        members, type = size(shares), shares[0].type
        now = speed_of(job, members, type)
        if members >= job.most or now <= 0:
            return 0.0
        gain = speed_of(job, members + 1, type) - now
        if gain < self.rules.efficiency * speed_of(job, job.members, type) / max(job.members, 1):
            return 0.0
        return gain / now / max(job.remaining / now, 1.0)

    def _one_more(self, job: PendingJob | PlacedJob) -> tuple[Share, ...] | None:
        ask, shares, plugin = self.asks[job.id], self.shares[job.id], self.plugins[job.id]
        amount = amount_of(job.request)
        if self.ledger.shortage(job.tenant, amount) or plugin not in self.room.slots:
            return None
        counts = self.room.fitting(ask, shares[0].type, plugin, self.room.long)
        mine = [i for share in shares if (i := self.index.row.get(share.node)) is not None]
        near = next((i for i in mine if counts[i] > 0), None)
        if near is None:
            if job.within == "node":
                return None
            rows = [i for group in self.index.links.values() if set(mine) <= set(group) for i in group if counts[i] > 0]
            if not rows and job.within != "link":
                rows = [int(counts.argmax())] if counts.any() else []
            if not rows:
                return None
            near = max(rows, key=lambda i: (int(counts[i]), -i))
        one = (Share(self.index.names[near], 1, shares[0].type),)
        self.room.give(job.request, one, plugin, -1.0)
        self.ledger.take(job.tenant, amount)
        return _plus(shares, one[0])

    def _undo(self, job: PendingJob | PlacedJob, before: tuple[Share, ...], after: tuple[Share, ...]) -> None:
        plugin = self.plugins[job.id]
        self.room.give(job.request, after, plugin)
        self.room.give(job.request, before, plugin, -1.0)
        self.ledger.give(job.tenant, amount_of(job.request, size(after) - size(before)))

    def _saved(self, job: PendingJob | PlacedJob, before: tuple[Share, ...], after: tuple[Share, ...]) -> float:
        old, new = speed_of(job, size(before), before[0].type), speed_of(job, size(after), after[0].type)
        if new <= 0:
            return 0.0
        return job.remaining / old - job.remaining / new if old > 0 else float("inf")

    # ---- moving ----

    def move(self, jobs: list[PlacedJob]) -> dict[str, Grown]:
        """Running jobs -> a place on faster devices that is free, where that pays."""
        moved: dict[str, Grown] = {}
        able = [j for j in jobs if len(j.speeds) > 1 and j.remaining > 0 and movable(j, self.index.now, self.rules.rest_s)]
        for job in sorted(able, key=lambda j: (-j.remaining / max(_speed(j), 1e-9), j.id))[:MOVES]:
            shares, plugin = allocation_of(job), job.plugins[0] if job.plugins else ""
            if plugin not in self.room.slots:
                continue
            members, now = size(shares), _speed(job)
            ask = Ask.of(job)
            for type in self.index.options(ask):
                rate = speed_of(job, members, type)
                saved = job.remaining / now - job.remaining / rate if now > 0 and rate > now else 0.0
                if type == shares[0].type or saved <= self.rules.gain * job.restart_s:
                    continue
                if found := self.room.gang(ask, members, type, plugin, self.room.long):
                    new = self.room.take(ask, found)
                    self.room.release(job)
                    moved[job.id] = Grown(new, saved)
                    break
        return moved


def _speed(job: PlacedJob) -> float:
    shares = allocation_of(job)
    return speed_of(job, size(shares), shares[0].type)


def _plus(shares: tuple[Share, ...], one: Share) -> tuple[Share, ...]:
    if any((s.node, s.type) == (one.node, one.type) for s in shares):
        return tuple(Share(s.node, s.members + 1, s.type) if (s.node, s.type) == (one.node, one.type) else s for s in shares)
    return (*shares, one)
