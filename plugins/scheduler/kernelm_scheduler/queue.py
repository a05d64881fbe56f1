"""The waiting jobs by class: a round walks over the few classes, not the many jobs, and leaves out the rest of a blocked one."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernelm_contracts.scheduler import PendingJob, PlacedJob
from kernelm_scheduler.amounts import Amount, amount_of, left_s, speed_at
from kernelm_scheduler.ordering import effective, rank, urgent
from kernelm_scheduler.settings import Settings
from kernelm_sdk.system import Resources

Entry = tuple[float, float, str, PendingJob, "Ask", float]  # rank, job, its class, run time
Key = tuple[Any, ...]
SHAPE = 7  # parts of a key, the first ones, that say which nodes hold a member
Blocked = tuple[str, str]  # why, and what would help
Answer = tuple[Blocked, bool]  # to a waiting job, and whether its start is known


def _key(request: Resources, plugins: tuple[str, ...], types: tuple[str, ...], device_mb: int, avoid: tuple[str, ...],
         members: int, tenant: str, within: str) -> Key:  # fmt: skip
    return request.cpu, request.memory_mb, request.gpus, plugins, types, device_mb, avoid, members, tenant, within


class Ask:
    """What jobs of one class ask for: if one of them finds no place, none of them does. `types`: of devices, the fastest first."""

    def __init__(self, request: Resources, plugins: tuple[str, ...], tenant: str, members: int = 1, types: tuple[str, ...] = (),
                 device_mb: int = 0, within: str = "", avoid: tuple[str, ...] = ()) -> None:  # fmt: skip
        self.request, self.plugins, self.members, self.types = request, plugins, members, types
        self.tenant, self.device_mb, self.within, self.avoid = tenant, device_mb, within, avoid
        self.whole: Amount = amount_of(self.request, members)
        self.key = _key(request, plugins, types, device_mb, avoid, members, tenant, within)
        self.shape = self.key[:SHAPE]  # which nodes hold a member, whoever asks
        self.queue: list[Entry] = []  # the waiting jobs of the class, in order
        self.never: tuple[Any, str] | None = None  # cached: for which nodes and quotas, why not
        self.summary: tuple[int, Blocked] | None = None  # cached: generation, why such a job waits
        self.able: dict[str, tuple[int, NDArray[np.bool_]]] = {}  # cached by type: generation, nodes

    @staticmethod
    def plain(job: PendingJob) -> Key:
        """The key of what a job without curves asks for, without making that: in a long queue nearly all ask for the same."""
        return _key(job.request, job.plugins, (), job.device_mb, job.avoid, job.members, job.tenant, job.within)

    @classmethod
    def of(cls, job: PendingJob | PlacedJob) -> "Ask":
        ranked = sorted(job.speeds, key=lambda s: (-speed_at(s, job.members), s.type))
        types = tuple(s.type for s in ranked)
        return cls(job.request, job.plugins, job.tenant, job.members, types, job.device_mb, job.within, job.avoid)


class Line:
    """The jobs of one class from some place on, without those that are taken apart from it; `next` goes on to the next one."""

    def __init__(self, entries: list[Entry], without: Iterable[str] = ()) -> None:
        self._entries, self._without, self._at = entries, without, -1

    def next(self, wanted: Callable[[Entry], bool] | None = None) -> Entry | None:
        """The next job (that is `wanted`, where that is given); None at the end."""
        for at in range(self._at + 1, len(self._entries)):
            entry = self._entries[at]
            if entry[2] not in self._without and (wanted is None or wanted(entry)):
                self._at = at
                return entry
        self._at = len(self._entries)
        return None


class Queue:
    """All waiting jobs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.jobs: dict[str, PendingJob] = {}
        self.asks: dict[str, Ask] = {}  # job -> its class
        self.classes: dict[Any, Ask] = {}  # by key
        self.deadlines: set[str] = set()  # jobs that have one
        self.arrived: set[str] = set()  # jobs that are new or have changed since the last answer

    def drop(self, ids: Iterable[str]) -> None:
        """Forget those of `ids` that wait."""
        gone: dict[Ask, list[PendingJob]] = {}
        for id in ids:
            if job := self.jobs.pop(id, None):
                gone.setdefault(self.asks.pop(id), []).append(job)
        for ask, jobs in gone.items():
            self.deadlines.difference_update(job.id for job in jobs)
            if len(jobs) * 16 > len(ask.queue):
                left = {job.id for job in jobs}
                ask.queue = [entry for entry in ask.queue if entry[2] not in left]
            else:
                for job in jobs:
                    del ask.queue[bisect_left(ask.queue, rank(job, self.settings))]  # type: ignore[type-var]
            if not ask.queue:
                del self.classes[ask.key]

    def add(self, jobs: Iterable[PendingJob]) -> None:
        """Jobs that do not wait yet."""
        new: dict[Ask, list[Entry]] = {}
        for job in jobs:
            ask = self._class(job)
            self.jobs[job.id], self.asks[job.id] = job, ask
            self.arrived.add(job.id)
            if job.deadline > 0:
                self.deadlines.add(job.id)
            new.setdefault(ask, []).append((*rank(job, self.settings), job, ask, left_s(job)))
        for ask, entries in new.items():
            if len(entries) * 16 > len(ask.queue):
                ask.queue = sorted([*ask.queue, *entries])
            else:
                for entry in entries:
                    insort(ask.queue, entry)

    def _class(self, job: PendingJob) -> Ask:
        if not job.speeds and (known := self.classes.get(Ask.plain(job))):
            return known
        ask = Ask.of(job)
        return self.classes.setdefault(ask.key, ask)

    def lines(self, now: float) -> list[Line]:
        """One line for each class, and one for each job that is urgent, which goes earlier than its class."""
        late = {id for id in self.deadlines if urgent(self.jobs[id], now, self.settings)}
        apart: list[Line] = []
        for id in late:
            job, ask = self.jobs[id], self.asks[id]
            apart.append(Line([(*effective(job, now, self.settings), job, ask, left_s(job))]))
        return [*apart, *(Line(ask.queue, late) for ask in self.classes.values())]


class Answers:
    """What those who wait were told last: by class, and beside that some jobs by themselves."""

    def __init__(self) -> None:
        self.jobs: dict[str, Answer] = {}
        self.classes: dict[Ask, Blocked] = {}

    def changed(self, queue: Queue, jobs: dict[str, Answer], classes: dict[Ask, Blocked], decided: set[str]) -> list[str]:
        """The jobs to which another answer is due than last time, in their order: `jobs` by themselves, others as their class;
        `decided` do not wait any more."""
        again = [ask.queue for ask, blocked in classes.items() if self.classes.get(ask) != blocked]
        looked_at = {*jobs, *self.jobs, *queue.arrived, *(entry[2] for entries in again for entry in entries)}
        found = []
        for id in (looked_at & queue.asks.keys()) - decided:
            ask = queue.asks[id]
            was = self.jobs.get(id) or ((self.classes[ask], False) if ask in self.classes else None)
            if id in queue.arrived or was != (jobs.get(id) or (classes[ask], False)):
                found.append(id)
        self.jobs, self.classes = jobs, classes
        queue.arrived = decided  # whoever still waits next time was not placed after all
        return sorted(found, key=lambda id: rank(queue.jobs[id], queue.settings))
