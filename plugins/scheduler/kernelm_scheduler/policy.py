"""The scheduling policy: a pure function from a `ClusterState` and `Settings` to decisions.

One round: served models get the replicas that their load needs; waiting jobs are taken in their order, those within their
tenant's nominal quota before those that borrow, and placed where they score best; the first ones that find no room are helped by
what may be taken from others, and else get a reservation; what is left over makes elastic jobs faster.
Filter and score after the Kubernetes scheduling framework, age after Slurm's multifactor priority, quotas after Kueue.
"""

from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace

from kernelm_contracts.deployments import WAITS
from kernelm_contracts.scheduler import Action, ClusterState, Decision, Decisions, ModelState, PendingJob, PlacedJob, Share
from kernelm_scheduler.amounts import allocation_of, amount_of, cores, duration, named, plannable, size
from kernelm_scheduler.backfill import Reservations
from kernelm_scheduler.elastic import Growing
from kernelm_scheduler.explain import impossible, lacks, misses, waits
from kernelm_scheduler.goodput import Holding, Planning
from kernelm_scheduler.index import Index
from kernelm_scheduler.ordering import effective, too_late
from kernelm_scheduler.preemption import Leaving, Offers, Piece, free_for, without
from kernelm_scheduler.queue import Ask, Blocked, Entry, Line
from kernelm_scheduler.quotas import Ledger
from kernelm_scheduler.room import Found, Room
from kernelm_scheduler.serving import wanted
from kernelm_scheduler.settings import Settings
from kernelm_scheduler.victims import movable

Taken = tuple[Entry, Line]  # the next job of a class, and those behind it
COMING: Blocked = (f"{WAITS}others make room for it", "they stop, at their next checkpoints")


def decide(state: ClusterState, settings: Settings) -> Decisions:
    """One decision for every pending job, and those on placed jobs and models, in the order in which they are carried out."""
    return decided(Index.of(state, settings))


def decided(index: Index) -> Decisions:
    """As `decide`, on a state that is kept."""
    round = Round(index)
    round.run()
    decided = round.decided()
    waiting = [entry for ask in index.queue.classes.values() for entry in ask.queue if entry[2] not in decided]
    return round.answer(round.waits.get(entry[2]) or (entry[3], round.rest[entry[4]]) for entry in sorted(waiting))


def news(index: Index) -> Decisions:
    """As `decided`, without the waits that are as in the last answer."""
    round = Round(index)
    round.run()
    own = {id: (blocked, id in round.reserved) for id, (_, blocked) in round.waits.items()}
    fresh = index.answers.changed(index.queue, own, round.rest, round.decided())
    jobs = index.queue
    return round.answer(round.waits.get(id) or (jobs.jobs[id], round.rest[jobs.asks[id]]) for id in fresh)


def order(state: ClusterState, settings: Settings) -> list[PendingJob]:
    """The pending jobs in the order in which they are taken."""
    return sorted(state.pending, key=lambda job: effective(job, state.now, settings))


class Round:
    """One round; `run` from top to bottom."""

    def __init__(self, index: Index) -> None:
        self.index, self.settings, self.now = index, index.settings, index.now
        self.room = Room(index)
        self.ledger = Ledger(index.quotas, index.tenants, index.held)
        self.first: list[Decision] = []  # what frees room
        self.made: list[Decision] = []  # on waiting jobs, in the order in which they were taken
        self.last: list[Decision] = []  # what takes what is left over
        self.changed: dict[str, tuple[Share, ...]] = {}  # placed job -> its new allocation; () for stopped
        self.placed: list[tuple[int, PendingJob, tuple[Share, ...], str]] = []  # index in `made`, job, where, plugin
        self.waits: dict[str, tuple[PendingJob, Blocked]] = {}  # jobs that were taken by themselves
        self.rest: dict[Ask, Blocked] = {}  # what the other jobs of a class are told
        self.reservations = Reservations(index, self.room, self.changed)
        self.helped = 0
        self._offers: Offers | None = None
        self._over = False  # no more help, no more reservations in this round
        self._dead: dict[Ask, Blocked] = {}  # class -> what is in the way of all of it
        self._dead_short: dict[Ask, Blocked] = {}  # the same for jobs that end before the first reservation
        self._full: dict[Ask, Blocked] = {}  # class -> what its quota is short of
        self._leaving = Leaving(index, self.room, self.ledger)
        self._coming: set[str] = set()  # jobs for which others are being stopped already
        self._done: set[str] = set()  # jobs that were helped to a place
        self._hoping: list[PendingJob] = []  # elastic jobs that found no room: the plan may make some
        self._plans = self._may_plan()
        self.reserved: dict[str, float] = {}  # waiting job with a reservation -> when it starts, 0 for not known

    def run(self) -> None:
        for _, model in sorted(self.index.models.items(), key=lambda entry: (-entry[1].priority, entry[0])):
            if "scale" in self.index.actions:
                self._scale(model)
        self._borrowing(self._within_nominal())
        if self._plans:
            self._plan()
        elif "resize" in self.index.actions:
            self._grow()
        if "migrate" in self.index.actions:
            self._move()

    def decided(self) -> set[str]:
        """The jobs that do not wait any more."""
        return {d.job for decisions in (self.made, self.last) for d in decisions}

    def answer(self, waits: Iterable[tuple[PendingJob, Blocked]]) -> Decisions:
        waiting = [self._waiting(job, blocked) for job, blocked in waits]
        return Decisions(self.index.version, (*self.first, *self.made, *waiting, *self.last))

    # ---- in order ----

    def _within_nominal(self) -> dict[str, list[Taken]]:
        """Take the jobs whose tenant stays within its nominal quota; the others, by tenant."""
        others: dict[str, list[Taken]] = {}
        heap = [(entry, line) for line in self.index.queue.lines(self.now) if (entry := line.next())]
        heapify(heap)
        while heap:
            entry, ask = heap[0][0], heap[0][0][4]
            if self._borrows(ask):
                others.setdefault(ask.tenant, []).append(heappop(heap))
            else:
                self._take(entry)
                self._go_on(heap)
        return others

    def _borrows(self, ask: Ask) -> bool:
        if ask.tenant not in self.ledger.tenants or not self.ledger.borrows(ask.tenant, ask.whole):
            return False
        return not impossible(ask, self.index, self.ledger)

    def _borrowing(self, others: dict[str, list[Taken]]) -> None:
        """Take jobs that borrow: always the next of the tenant with the smallest share over its weight."""
        for lines in others.values():
            heapify(lines)
        heap = [(self.ledger.share(tenant), tenant) for tenant in others]
        heapify(heap)
        while heap:
            share, tenant = heap[0]
            if (now := self.ledger.share(tenant)) != share:  # it has taken something since, or something was taken from it
                heapreplace(heap, (now, tenant))
                continue
            lines, placed = others[tenant], False
            while lines and not placed:
                placed = self._take(lines[0][0])
                self._go_on(lines)
            if not lines:
                heappop(heap)

    def _go_on(self, heap: list[Taken]) -> None:
        """From the first job of the heap to the next one of its class that something can be done for; those between wait."""
        entry, line = heap[0]
        ask = entry[4]
        full = self._full.get(ask)
        if self._over and not full and ask in self._dead and ask not in self._dead_short and not self.room.find(ask, (), True):
            self._dead_short[ask] = self._dead[ask]
        long, short = full or self._dead.get(ask), full or self._dead_short.get(ask)
        blocked = self.rest.get(ask) or long or short
        following: Entry | None
        if blocked is None or self._may_help or (long or blocked) != blocked or (short or blocked) != blocked:
            following = line.next()  # something may be done for each, or each has its own words
        else:
            self.rest[ask] = blocked
            reserving = not full and not self._over
            following = None if long and short and not reserving else line.next(
                lambda e: (short if self._short(e) else long) is None or (reserving and self._due(e[3])))  # fmt: skip
        if following is None:
            heappop(heap)
        else:
            heapreplace(heap, (following, line))

    def _short(self, entry: Entry) -> bool:
        """Whether the job ends before the first reservation."""
        return 0 < entry[5] <= self.reservations.until - self.now

    def _due(self, job: PendingJob) -> bool:
        """Whether room may be kept, or be made by the plan, for a job that found none."""
        if self._plans and plannable(job):
            return True
        first = self.reservations.count == 0
        return not self.reservations.full and (first or self.now - job.submitted >= self.settings.reserve_after_s)

    def _take(self, entry: Entry) -> bool:
        """Place, reject, or make wait; whether it is placed."""
        job, ask, short = entry[3], entry[4], self._short(entry)
        blocked = self._full.get(ask) or (self._dead_short if short else self._dead).get(ask)
        if blocked is not None:
            if self._over or not self._late(job, ask):  # nothing can be done for it: the way of nearly all, in a long queue
                self._wait(job, blocked)
                return False
        elif never := impossible(ask, self.index, self.ledger):
            self.made.append(Decision(job.id, "reject", reason=never))
            return False
        elif lacking := lacks(ask, self.index, self.ledger):
            blocked = self._full[ask] = lacking
            if not self._help(job, ask) and self.now - job.submitted >= self.settings.reserve_after_s:
                self.ledger.withhold(job.tenant, ask.whole)
        elif found := self.room.find(ask, job.artifacts, short):
            self._place(job, ask, found, short)
            return True
        else:
            blocked = (self._dead_short if short else self._dead)[ask] = waits(job, ask, self.index, self.room)
            self._late(job, ask)
        if job.id in self._done:
            return True
        self._wait(job, blocked)
        return False

    def _late(self, job: PendingJob, ask: Ask) -> bool:
        """Help one of the first jobs that find no room, or reserve for it; whether that was tried."""
        if ask in self._full:
            return False
        if self._plans and plannable(job):
            self._hoping.append(job)
            return False
        if self._help(job, ask):
            return True
        if not self._due(job):
            self._over = self.reservations.full and not self._may_help
            return False
        self.reserved[job.id] = self.reservations.reserve(job, ask)
        return True

    @property
    def _may_help(self) -> bool:
        return self.helped < self.settings.preemption.heads and bool(self.index.actions & {"preempt", "resize"})

    def _wait(self, job: PendingJob, blocked: Blocked) -> None:
        self.waits[job.id] = job, COMING if job.id in self._coming else blocked

    def _place(self, job: PendingJob, ask: Ask, found: Found, short: bool = False, why: str = "") -> None:
        row = found.rows[0][0]
        score = self.room.score(ask, found, job.artifacts)
        node = self.index.names[row]
        if ask.members == 1:
            cpu, memory_mb = self.room.free[row, :2].tolist()
            reason = (f"{named(found.plugin)} on {node}, which has {cores(cpu)} and {memory_mb:.0f} MiB free; "
                      f"packing {score.packing:.2f}, locality {score.locality:.2f}, spread {score.spread:.2f}")  # fmt: skip
        else:
            reason = f"{named(found.plugin)}, {ask.members} members on {len(found.rows)} nodes"
        shares = self.room.take(ask, found, short)
        self.ledger.take(job.tenant, ask.whole)
        self.reservations.started(job, shares)
        plain = ask.members == 1 and not shares[0].type
        self.placed.append((len(self.made), job, shares, found.plugin))
        allocation = () if plain else shares
        self.made.append(Decision(job.id, "place", node, found.plugin, reason + why, round(found.score, 4), allocation))

    def _waiting(self, job: PendingJob, blocked: Blocked) -> Decision:
        reason = blocked[0] + too_late(job, self.now)
        return Decision(job.id, "wait", reason=reason, starts=self.reserved.get(job.id, 0.0), remedy=blocked[1])

    # ---- taking from others ----

    def _help(self, job: PendingJob, ask: Ask) -> bool:
        """Make room for one of the first that find none; whether it is placed."""
        if not self._may_help:
            return False
        self.helped += 1
        if self._leaving.enough_for(job, ask):
            self._coming.add(job.id)
            return False
        freed = free_for(job, ask, self._offered, self.room, self.ledger, self.changed)
        if freed is None:
            return False
        self._record(freed.pieces, f"for {job.name or job.id}")
        for known in (self._dead, self._dead_short, self._full):  # there may be room beside it
            known.clear()
        self.reservations.changed()
        self._place(job, ask, freed.found, why=f"; room from {len({p.job.id for p in freed.pieces})} others")
        self._done.add(job.id)
        return True

    @property
    def _offered(self) -> Offers:
        if self._offers is None:
            self._offers = Offers(self.index)
        return self._offers

    def _record(self, pieces: tuple[Piece, ...], whom: str) -> None:
        """Decisions for what was taken: stop, or shrink."""
        for id in dict.fromkeys(piece.job.id for piece in pieces):
            mine = [piece for piece in pieces if piece.job.id == id]
            job, plugin = mine[0].job, mine[0].job.plugins[0] if mine[0].job.plugins else ""
            if any(piece.whole for piece in mine):
                self.changed[id] = ()
                why = next(piece.why for piece in mine if piece.whole)
                self.first.append(Decision(id, "preempt", job.node, plugin, f"stopped {whom}: {why}"))
            else:
                shares = without(allocation_of(job), (s for piece in mine for s in piece.shares))
                self.changed[id] = shares
                reason = f"shrinks to {size(shares)} members {whom}: {mine[0].why}"
                self.first.append(Decision(id, "resize", shares[0].node, plugin, reason, 0.0, shares))

    # ---- models ----

    def _scale(self, model: ModelState) -> None:
        count, why = wanted(model, self.now, self.settings.serving)
        if not why:
            return
        shares = {(s.node, s.type): s.members for s in model.allocation}
        plugin = model.plugins[0] if model.plugins else ""
        surplus = min(model.replicas - count, sum(shares.values()))  # where some of them are may not be known yet
        for _ in range(surplus):  # from the fullest nodes first: what is left stays spread
            at = max(shares, key=lambda key: (shares[key], key))
            shares[at] -= 1
            self.room.give(model.request, (Share(at[0], 1, at[1]),), plugin)
            self.ledger.give(model.tenant, amount_of(model.request))
        probe = PendingJob(f"model {model.name}", model.name, model.request, model.plugins, model.priority, model.tenant,
                           artifacts=(model.artifact,) if model.artifact else ())  # fmt: skip
        ask, added = Ask(model.request, model.plugins, model.tenant, 1, (model.type,) if model.type else ()), 0
        missing = max(count - model.replicas - self._leaving.replicas(probe, ask, count - model.replicas), 0)
        while added < missing:
            short = self.ledger.shortage(ask.tenant, ask.whole)
            found = None if short else self.room.find(ask, probe.artifacts)
            if found is None and self.index.actions & {"preempt", "resize"}:
                freed = free_for(probe, ask, self._offered, self.room, self.ledger, self.changed)
                if freed is not None:
                    self._record(freed.pieces, f"for a replica of {model.name}")
                    found = freed.found
            if found is None:
                break
            share = self.room.take(ask, found)[0]
            self.ledger.take(model.tenant, ask.whole)
            shares[share.node, share.type] = shares.get((share.node, share.type), 0) + share.members
            plugin, added = found.plugin, added + share.members
        if count > model.replicas and not added:
            if model.replicas < model.minimum:
                why_not = misses(probe, ask, self.index, self.ledger, self.room) if missing else COMING
                blocked = lacks(ask, self.index, self.ledger) or why_not
                self.first.append(Decision(model.name, "wait", reason=blocked[0], remedy=blocked[1]))
            return
        allocation = tuple(Share(node, n, type) for (node, type), n in shares.items() if n > 0)
        node = allocation[0].node if allocation else ""
        short = f", {count - size(allocation)} more find no room" if size(allocation) < count else ""
        self.first.append(Decision(model.name, "scale", node, plugin, why + short, 0.0, allocation))

    # ---- what is left over ----

    def _resting(self) -> list[PlacedJob]:
        rest_s = self.settings.elastic.rest_s
        placed = [self.index.placed[id] for id in sorted(self.index.measured) if id not in self.changed]
        return [p for p in placed if movable(p, self.now, rest_s)]

    def _may_plan(self) -> bool:
        """Whether elastic jobs are sized together, and not one member after the other."""
        if not self.index.actions >= {"preempt", "resize", "migrate"} or not self.settings.elastic.planned:
            return False
        return 0 < len(self.index.plannable) <= self.settings.elastic.planned

    def _plan(self) -> None:
        new = [Holding(job, shares, plugin) for _, job, shares, plugin in self.placed if plannable(job)]
        running = [Holding(p, allocation_of(p), next(iter(p.plugins), "")) for p in self._resting() if plannable(p)]
        planning = Planning(self.index, self.room, self.ledger)
        order, stopped = planning.in_order(changed := planning.plan([*new, *running], self._hoping))
        for id in stopped:
            self.changed[id], node = (), self.index.placed[id].node
            self.last.append(Decision(id, "preempt", node, changed[id].plugin, "changes places with another"))
        for id in order:
            shares, plugin = changed[id].shares, changed[id].plugin
            members, kind = size(shares), shares[0].type or "any type"
            action: Action = "place"
            if id in self.index.placed:
                self.changed[id] = shares
                action = "migrate" if members == size(allocation_of(self.index.placed[id])) else "resize"
            reason = f"{members} members on {kind}: most goodput, by what is left of each job"
            self.last.append(Decision(id, action, shares[0].node, plugin, reason, 0.0, shares))
        self.made = [d for d in self.made if d.job not in changed]
        for id in changed:
            self.waits.pop(id, None)

    def _grow(self) -> None:
        new = {job.id: (at, job, shares, plugin) for at, job, shares, plugin in self.placed}
        running = [(p, allocation_of(p), p.plugins[0] if p.plugins else "") for p in self._resting() if p.most > p.members]
        started = [(job, shares, plugin) for _, job, shares, plugin in new.values() if job.most > job.members]
        for id, grown in Growing(self.index, self.room, self.ledger).grow([*started, *running]).items():
            count = size(grown.shares)
            if id in new:
                at, old = new[id][0], self.made[new[id][0]]
                self.made[at] = Decision(id, "place", grown.shares[0].node, old.plugin, f"{old.reason}; {count} members", old.score,
                                         grown.shares)  # fmt: skip
            else:
                self.changed[id] = grown.shares
                plugin = next(iter(self.index.placed[id].plugins), "")
                reason = f"grows to {count} members: ends {duration(grown.saved_s)} earlier"
                self.last.append(Decision(id, "resize", grown.shares[0].node, plugin, reason, 0.0, grown.shares))

    def _move(self) -> None:
        jobs = [p for p in self._resting() if not (self._plans and plannable(p))]
        for id, moved in Growing(self.index, self.room, self.ledger).move(jobs).items():
            plugin = next(iter(self.index.placed[id].plugins), "")
            reason = f"to {moved.shares[0].type or 'other'} devices: ends {duration(moved.saved_s)} earlier"
            self.last.append(Decision(id, "migrate", moved.shares[0].node, plugin, reason, 0.0, moved.shares))
