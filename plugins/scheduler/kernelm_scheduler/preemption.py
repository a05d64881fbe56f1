"""Who makes room for a waiting job: first surplus members of elastic jobs, then whole jobs, at their checkpoints.

A job is stopped only for what has a right to its room: anything for a preemptible one (burst), a higher priority, the owner of a
nominal quota for a tenant of its cohort that borrows (Kueue's reclaiming), or, if so set, a much shorter job. Nobody is stopped
more than `most` times: that a job gets on has a bound.
"""

from collections.abc import Callable, Container, Iterable
from typing import NamedTuple

from kernelm_contracts.scheduler import PendingJob, PlacedJob, Share
from kernelm_scheduler.amounts import allocation_of, amount_of, end_of, left_s, size, speed_of
from kernelm_scheduler.index import Index
from kernelm_scheduler.queue import Ask
from kernelm_scheduler.quotas import Ledger
from kernelm_scheduler.room import Found, Room
from kernelm_scheduler.victims import Kind, movable


class Piece(NamedTuple):
    """What may be taken from a placed job."""

    job: PlacedJob
    shares: tuple[Share, ...]
    whole: bool
    why: str


class Freed(NamedTuple):
    """What is taken from placed jobs so that another one fits."""

    pieces: tuple[Piece, ...]
    found: Found


class Right:
    """By what right a waiting job may stop placed ones."""

    def __init__(self, job: PendingJob, ask: Ask, index: Index, ledger: Ledger) -> None:
        self.job, self.now, self.ledger = job, index.now, ledger
        self._owner = not ledger.borrows(job.tenant, ask.whole)
        self._shorter = index.settings.preemption.shorter
        self._mine = left_s(job) if self._shorter else 0.0
        self._kinds: dict[Kind, str] = {}

    def may(self, kind: Kind) -> bool:
        """Whether any job of the kind may be stopped."""
        if kind not in self._kinds:
            self._kinds[kind] = self._by_kind(kind)
        return bool(self._kinds[kind]) or (self._mine > 0 and kind.tenant == self.job.tenant)

    def why(self, victim: PlacedJob) -> str:
        """In words; "" for no right."""
        kind = Kind.of(victim)
        if self.may(kind) and not self._kinds[kind] and self._mine < self._shorter * (end_of(victim, self.now) - self.now):
            return "it is much longer"
        return self._kinds[kind]

    def _by_kind(self, kind: Kind) -> str:
        job, ledger = self.job, self.ledger
        if kind.preemptible and not job.preemptible:
            return "it is preemptible"
        if kind.priority < job.priority:
            return f"its priority is {kind.priority}, not {job.priority}"
        cohort = ledger.cohort(job.tenant)
        neighbour = cohort and kind.tenant != job.tenant and ledger.cohort(kind.tenant) == cohort
        if neighbour and self._owner and ledger.borrows(kind.tenant):
            return f"tenant {job.tenant} takes back what tenant {kind.tenant} has borrowed"
        return ""


class Offers:
    """What could be taken from placed jobs in one round, the cheapest first."""

    def __init__(self, index: Index) -> None:
        self.index, self.rules = index, index.settings.preemption
        self._surplus: list[Piece] = []
        if "resize" in index.actions:
            elastic = [j for id in index.elastic if movable(j := index.placed[id], index.now, index.settings.elastic.rest_s)]
            found = [piece for job in elastic for piece in _surplus(job)]
            self._surplus = [piece for _, piece in sorted(found, key=lambda f: (f[0], f[1].job.id))]

    def to(self, right: Right, changed: Container[str]) -> list[Piece]:
        """What a job with such a right may have, without jobs that were changed already."""
        found = [piece for piece in self._surplus if piece.job.id not in changed][: self.rules.victims]
        if "preempt" not in self.index.actions or len(found) >= self.rules.victims:
            return found
        for job in self.index.victims.cheapest(self.index.now, right.may):
            if job.id not in changed and (why := right.why(job)):
                found.append(Piece(job, allocation_of(job), True, why))
                if len(found) >= self.rules.victims:
                    break
        return found


class Leaving:
    """The placed jobs that were told to stop: what they hold will be free soon, and nobody else need be stopped for it."""

    def __init__(self, index: Index, room: Room, ledger: Ledger) -> None:
        self._jobs = [index.placed[id] for id in sorted(index.leaving)]
        self._room, self._ledger = room, ledger

    def enough_for(self, job: PendingJob, ask: Ask) -> bool:
        """Whether `job` has room when they have gone."""
        if not self._jobs or self._ledger.shortage(job.tenant, ask.whole):
            return False
        self._let_go(1)
        enough = self._room.find(ask, job.artifacts) is not None
        self._let_go(-1)
        return enough

    def replicas(self, probe: PendingJob, ask: Ask, count: int) -> int:
        """How many of so many further replicas find room only when they have gone; what is free of it now is kept for them."""
        if not self._jobs or count <= 0:
            return 0
        room, ledger, here = self._room, self._ledger, 0
        taken: list[tuple[Share, ...]] = []
        for leaving in (False, True):
            if leaving:
                self._let_go(1)
            while len(taken) < count and not ledger.shortage(probe.tenant, ask.whole):
                found = room.find(ask, probe.artifacts)
                if found is None:
                    break
                taken.append(room.take(ask, found))
                ledger.take(probe.tenant, ask.whole)
            here = here if leaving else len(taken)
        for shares in taken:
            room.give(ask.request, shares, ask.plugins[0])
            ledger.give(probe.tenant, ask.whole)
        self._let_go(-1)
        for shares in taken[here:]:
            room.keep(ask.request, shares)
        return len(taken) - here

    def _let_go(self, sign: int) -> None:
        """Put what they hold back into the room; take it again, with sign -1."""
        for victim in self._jobs:
            self._room.release(victim, float(sign))
            self._ledger.take(victim.tenant, amount_of(victim.request, -sign * size(allocation_of(victim))))


def _surplus(job: PlacedJob) -> list[tuple[float, Piece]]:
    """The members beyond the guaranteed ones, one by one, each with the speed that it adds."""
    shares = allocation_of(job)
    members, found = size(shares), []
    for share in reversed(shares):
        for _ in range(share.members):
            if members <= job.members:
                return found
            gain = speed_of(job, members, share.type) - speed_of(job, members - 1, share.type)
            one = (Share(share.node, 1, share.type),)
            found.append((gain, Piece(job, one, False, "surplus beyond its guaranteed size")))
            members -= 1
    return found


def free_for(job: PendingJob, ask: Ask, offers: Offers, room: Room, ledger: Ledger, changed: Container[str]) -> Freed | None:
    """The fewest pieces, from the cheapest, that let `job` in, already taken from `room` and `ledger`; None, and nothing
    changed, if none do."""
    offered = offers.to(Right(job, ask, offers.index, ledger), changed)

    def fits() -> Found | None:
        return None if ledger.shortage(job.tenant, ask.whole) else room.find(ask, job.artifacts)

    taken: list[Piece] = []
    found = None
    while found is None and len(taken) < len(offered):
        for piece in offered[len(taken) : max(2 * len(taken), 1)]:
            _move(piece, room, ledger, 1)
            taken.append(piece)
        found = fits()
    if found is None:
        for piece in taken:
            _move(piece, room, ledger, -1)
        return None
    return _pruned(taken, found, fits, room, ledger)


def _pruned(taken: list[Piece], found: Found, fits: Callable[[], Found | None], room: Room, ledger: Ledger) -> Freed:
    """Put back what turned out not to be needed, the most costly first: at once what lies elsewhere, then one by one."""
    rows = {room.index.names[row] for row, _ in found.rows}
    elsewhere = [p for p in taken if all(s.node not in rows for s in p.shares)]
    for group in ([elsewhere] if elsewhere else []) + [[p] for p in reversed(taken)]:
        group = [p for p in group if p in taken]
        for piece in group:
            _move(piece, room, ledger, -1)
        if group and (again := fits()):
            found = again
            taken = [p for p in taken if p not in group]
        else:
            for piece in group:
                _move(piece, room, ledger, 1)
    return Freed(tuple(taken), fits() or found)


def _move(piece: Piece, room: Room, ledger: Ledger, sign: int) -> None:
    plugin = piece.job.plugins[0] if piece.job.plugins else ""
    room.give(piece.job.request, piece.shares, plugin, float(sign))
    ledger.take(piece.job.tenant, amount_of(piece.job.request, -sign * size(piece.shares)))


def without(shares: tuple[Share, ...], gone: Iterable[Share]) -> tuple[Share, ...]:
    """An allocation without some of its members."""
    left = {(share.node, share.type): share.members for share in shares}
    for share in gone:
        left[share.node, share.type] -= share.members
    return tuple(Share(node, members, type) for (node, type), members in left.items() if members > 0)
