"""The placed jobs in the order in which they would be stopped for others, kept from round to round.

What is lost with a job (work since its last checkpoint, and the restart) grows by a second for each of its members in every second,
so that jobs of one size keep their order: they are sorted once, and a round merges what it needs of them.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heappop, heappush, merge
from typing import NamedTuple

from kernelm_contracts.scheduler import PlacedJob
from kernelm_scheduler.amounts import allocation_of, size
from kernelm_scheduler.settings import Preemption

Place = tuple[float, float, str]  # among jobs of one kind


class Kind(NamedTuple):
    """What decides on who may stop a job, and on how what is lost with it grows."""

    tenant: str
    priority: int
    preemptible: bool
    members: int

    @classmethod
    def of(cls, job: PlacedJob) -> "Kind":
        return cls(job.tenant, job.priority, job.preemptible, size(allocation_of(job)))


def movable(job: PlacedJob, now: float, rest_s: float) -> bool:
    return job.movable and not job.leaving and now - job.started >= rest_s


class Victims:
    """`add` and `drop` any placed job; only those that may be stopped at all are looked at, which young ones become with time."""

    def __init__(self, rules: Preemption) -> None:
        self._rules = rules
        self._kinds: dict[Kind, list[tuple[Place, PlacedJob]]] = {}
        self._young: list[tuple[float, str]] = []  # a heap: when a job has rested, job
        self._resting: dict[str, PlacedJob] = {}

    def add(self, job: PlacedJob) -> None:
        if job.movable and not job.leaving and job.preemptions < self._rules.most:
            self._resting[job.id] = job
            heappush(self._young, (job.started + self._rules.rest_s, job.id))

    def drop(self, job: PlacedJob) -> None:
        if self._resting.pop(job.id, None) is not None:
            return
        kind = Kind.of(job)
        entries = self._kinds.get(kind, [])
        at = bisect_left(entries, _place(job), key=lambda entry: entry[0])
        if at < len(entries) and entries[at][1] is job:
            del entries[at]
            if not entries:
                del self._kinds[kind]

    def _ripen(self, now: float) -> None:
        while self._young and self._young[0][0] <= now:
            since, id = heappop(self._young)
            job = self._resting.get(id)
            if job is not None and job.started + self._rules.rest_s == since:
                del self._resting[id]
                insort(self._kinds.setdefault(Kind.of(job), []), (_place(job), job), key=lambda entry: entry[0])

    def cheapest(self, now: float, may: Callable[[Kind], bool]) -> Iterator[PlacedJob]:
        """Those of the kinds that `may` be stopped: preemptible ones first, then by priority, then by what is lost."""
        self._ripen(now)
        levels: dict[tuple[bool, int], list[Kind]] = {}
        for kind in self._kinds:
            if may(kind):
                levels.setdefault((not kind.preemptible, kind.priority), []).append(kind)
        for _, kinds in sorted(levels.items()):
            for *_, job in merge(*(self._costs(kind, now) for kind in kinds), key=lambda entry: entry[0]):
                if movable(job, now, self._rules.rest_s):  # or the clock was put back
                    yield job

    def _costs(self, kind: Kind, now: float) -> Iterator[tuple[Place, PlacedJob]]:
        for (begun, started, id), job in self._kinds[kind]:
            yield ((now + begun) * kind.members, started, id), job


def _place(job: PlacedJob) -> Place:
    return job.restart_s - max(job.checkpointed, job.started), -job.started, job.id
