"""Who makes room for a waiting job: first surplus members of elastic jobs, then whole jobs, at their checkpoints.

A job is stopped only for what has a right to its room: anything for a preemptible one (burst), a higher priority, the owner of a
nominal quota for a tenant of its cohort that borrows (Kueue's reclaiming), or, if so set, a much shorter job. Nobody is stopped
more than `most` times: that a job gets on has a bound.
"""

from collections.abc import Callable, Container, Iterable
from typing import NamedTuple

from kernelm_contracts.scheduler import PendingJob, PlacedJob, Share
from kernelm_scheduler.amounts import allocation_of, amount_of, end_of, left_s, size, speed_of
from kernelm_scheduler.index import Ask, Index
from kernelm_scheduler.quotas import Ledger
from kernelm_scheduler.room import Found, Room

Right = Callable[[PlacedJob], str]


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


def movable(index: Index, job: PlacedJob, rest_s: float) -> bool:
    return job.movable and not job.leaving and index.now - job.started >= rest_s


def right_of(job: PendingJob, ask: Ask, index: Index, ledger: Ledger) -> Right:
    """By what right, in words, `job` may stop a placed one; "" for none."""
    owner = not ledger.borrows(job.tenant, ask.whole)
    cohort, shorter = ledger.cohort(job.tenant), index.settings.preemption.shorter
    mine = left_s(job) if shorter else 0.0
    kinds: dict[tuple[str, int, bool], str] = {}

    def right(victim: PlacedJob) -> str:
        kind = (victim.tenant, victim.priority, victim.preemptible)
        if kind not in kinds:
            kinds[kind] = by_kind(victim)
        related = not kinds[kind] and mine > 0 and victim.tenant == job.tenant
        if related and mine < shorter * (end_of(victim, index.now) - index.now):
            return "it is much longer"
        return kinds[kind]

    def by_kind(victim: PlacedJob) -> str:
        if victim.preemptible and not job.preemptible:
            return "it is preemptible"
        if victim.priority < job.priority:
            return f"its priority is {victim.priority}, not {job.priority}"
        neighbour = cohort and victim.tenant != job.tenant and ledger.cohort(victim.tenant) == cohort
        if neighbour and owner and ledger.borrows(victim.tenant):
            return f"tenant {job.tenant} takes back what tenant {victim.tenant} has borrowed"
        return ""

    return right


class Offers:
    """All that could be taken from placed jobs in one round, the cheapest first."""

    def __init__(self, index: Index) -> None:
        self.index, rules = index, index.settings.preemption
        placed = index.placed.values()
        self._surplus: list[Piece] = []
        if "resize" in index.actions:
            elastic = [j for j in placed if j.most > j.members and movable(index, j, index.settings.elastic.rest_s)]
            found = [piece for job in elastic for piece in _surplus(job)]
            self._surplus = [piece for _, piece in sorted(found, key=lambda f: (f[0], f[1].job.id))]
        self._jobs: list[PlacedJob] = []
        if "preempt" in index.actions:
            able = [p for p in placed if p.preemptions < rules.most and movable(index, p, rules.rest_s)]
            self._jobs = sorted(able, key=self._cost)

    def _cost(self, job: PlacedJob) -> tuple[bool, int, float, float, str]:
        lost = self.index.now - max(job.checkpointed, job.started) + job.restart_s
        return (not job.preemptible, job.priority, lost * size(allocation_of(job)), -job.started, job.id)

    def to(self, right: Right, changed: Container[str]) -> list[Piece]:
        """What a job with such a right may have, without jobs that were changed already."""
        most = self.index.settings.preemption.victims
        found = [piece for piece in self._surplus if piece.job.id not in changed][:most]
        for job in self._jobs if len(found) < most else ():
            if (why := right(job)) and job.id not in changed:
                found.append(Piece(job, allocation_of(job), True, why))
                if len(found) >= most:
                    break
        return found


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
    offered = offers.to(right_of(job, ask, offers.index, ledger), changed)

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
