"""Reservations: what the first waiting jobs will need, at the time at which they can start by the estimates that there are.

Conservative backfill (Mu'alem and Feitelson 2001): others go ahead only if they end before the first reservation, or take what no
reserved job will need. Where the ends are not known, what a reserved job asks for is withheld from everybody.
"""

import numpy as np

from kernelm_contracts.scheduler import PendingJob, Share
from kernelm_scheduler.amounts import allocation_of, end_of, left_s
from kernelm_scheduler.ends import Frees
from kernelm_scheduler.index import Index, Matrix
from kernelm_scheduler.queue import Ask
from kernelm_scheduler.room import Found, Room
from kernelm_sdk.system import Resources

SOON_S = 1.0  # a job that was told to stop is away by then, for all that is known


class Reservations:
    """What is withheld from those behind, in one round."""

    def __init__(self, index: Index, room: Room, stopped: dict[str, tuple[Share, ...]]) -> None:
        self.index, self.room = index, room
        self.count = self._tried = 0
        self.stopped: dict[str, tuple[Share, ...]] = stopped  # placed jobs that were changed in this round
        self.until = float("inf")  # the first reservation's time; who ends before it is in nobody's way
        self._reserved: Matrix = np.zeros_like(room.free)
        self._started: list[tuple[float, Resources, tuple[Share, ...]]] = []  # in this round: end, what it holds
        self._frees: Frees | None = None

    def started(self, job: PendingJob, shares: tuple[Share, ...]) -> None:
        if (left := left_s(job)) > 0:
            self._started.append((self.index.now + left, job.request, shares))
            self._frees = None

    def changed(self) -> None:
        """Placed jobs were stopped or shrunk, and end otherwise than was thought."""
        self._frees = None

    def reserve(self, job: PendingJob, ask: Ask) -> float:
        """Withhold what `job` will need; when it will start (Unix seconds), 0 for not known."""
        self._tried += 1
        if not self._served(ask):
            return 0.0
        best: tuple[float, Found, Matrix] | None = None
        for type in self.index.options(ask):
            found = self._earliest(ask, type, best[0] if best else float("inf"))
            if found and (best is None or found[0] < best[0]):
                best = found
        if best is not None:
            at, place, freed = best
            self.until = min(self.until, at)
        else:
            at, freed = 0.0, np.zeros_like(self.room.free)
            place_or_none = self._soonest(ask)
            if place_or_none is None:
                return 0.0
            place, self.until = place_or_none, self.index.now
        self.count += 1
        self._withhold(ask, place, freed)
        return at if at > self.index.now else 0.0  # there is room now, but no instance: when one is free is not known

    @property
    def full(self) -> bool:
        return self._tried >= self.index.settings.reservations

    def _served(self, ask: Ask) -> bool:
        """Whether any node that could hold it has a plugin for it, for each member of a gang: room kept for a job without would be
        wasted."""
        if ask.members > 1:
            return self.room.crew(ask) >= ask.members
        return any((self.room.slots[plugin][self.index.candidates(ask, type)] >= 0).any()
                   for plugin in ask.plugins if plugin in self.room.slots for type in self.index.options(ask))  # fmt: skip

    def _withhold(self, ask: Ask, place: Found, freed: Matrix) -> None:
        room = self.room
        if room.long is room.free:
            room.long = room.free.copy()
        for row, members in place.rows:
            self._reserved[row] += self.index.need(ask, place.type) * members
            lacking = np.maximum(self._reserved[row] - freed[row], 0.0)
            room.long[row] = np.minimum(room.long[row], room.free[row] - lacking)
        room.touch()

    def _timeline(self) -> Frees:
        if self._frees is None:
            index, now = self.index, self.index.now
            gone = {row for id in self.stopped for row in index.ends.rows(id)}
            parts = {row: index.ends.on(row, self.stopped) for row in gone}
            reckoned = [(now + SOON_S if job.leaving else end_of(job, now), job.request, allocation_of(job))
                        for id in index.estimated if id not in self.stopped for job in (index.placed[id],)]  # fmt: skip
            for end, request, shares in [*self._started, *(known for known in reckoned if known[0] > 0)]:
                for row, amount, _ in index.amounts(request, shares):
                    parts.setdefault(row, index.ends.on(row, self.stopped)).append((end, amount))
            timeline = index.ends.timeline()
            self._frees = Frees(timeline.replaced(parts) if parts else timeline, index.now, len(index.names))
        return self._frees

    def _earliest(self, ask: Ask, type: str, before: float) -> tuple[float, Found, Matrix] | None:
        """When and where it fits first, before a time, and what will have been freed by then."""
        able = self.index.candidates(ask, type)
        if not able.any():
            return None
        frees, free = self._timeline(), self.room.free - self._reserved
        if (found := self.room.gang(ask, ask.members, type, "", free, slots=False)) is not None:
            return self.index.now, found, np.zeros_like(free)
        end = frees.enough(free, self.index.need(ask, type), able, ask.members, ask.within, self.index.links.values())
        if end is None or frees.time(end) >= before:
            return None
        freed = frees.freed(end)
        found = self.room.gang(ask, ask.members, type, "", free + freed, slots=False)
        return None if found is None else (frees.time(end), found, freed)

    def _soonest(self, ask: Ask) -> Found | None:
        """Where the ends are not known: the node that lacks the least, as a share of its capacity; for a gang any that will do."""
        for type in self.index.options(ask):
            left = self.index.capacity - self._reserved
            if ask.members > 1:
                found = self.room.gang(ask, ask.members, type, "", left, slots=False)
                if found:
                    return found
                continue
            able = np.flatnonzero(self.room.fitting(ask, type, "", left, slots=False))
            if not len(able):
                continue
            need, capacity = self.index.need(ask, type), self.index.capacity[able]
            short = np.maximum(need + self._reserved[able] - self.room.free[able], 0.0)
            lack = np.divide(short, capacity, out=np.zeros_like(short), where=capacity > 0).sum(axis=1)
            return Found(((int(able[np.argmin(lack)]), 1),), type, "", 0.0)
        return None
