"""Who gets how many devices of which type, over all elastic jobs at once: goodput, weighted by what is left.

For jobs whose speed grows with a power of their devices, the average completion time is least when each job's speed counts the
more the smaller it is among those that are there (heSRPT: Berg, Vesilo, Harchol-Balter, Performance Evaluation 142, 2020). A job is
worth, in one configuration, its speed relative to that with an even share of the devices, times heSRPT's weight of its rank by the
time that is left at that speed; the sum is maximized over all types by an integer program as Sia's (SOSP 2023, section 3.4).
A change costs the restart over the time that the configuration is likely to last, and must bring `keep` more than that: `lasts_s`,
or as long again as the present one has lasted. So a busy cluster moves nobody twice in a row, and a calm one moves for little.
Who runs, or has just been started, keeps its fewest members at least: the plan only hands out what the queue's order leaves over.
Who finds no room waits for what pays, `patience_s` at most.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from kernelm_contracts.scheduler import PendingJob, PlacedJob, Share
from kernelm_scheduler.amounts import amount_of, size, speed_of
from kernelm_scheduler.index import Index, Matrix
from kernelm_scheduler.queue import Ask
from kernelm_scheduler.quotas import Ledger
from kernelm_scheduler.room import Found, Room

Job = PendingJob | PlacedJob
Target = tuple[str, int]  # type of the devices, members
UNKNOWN_S = 60.0  # a job that does not tell what is left has as much left as it has had, and this at least


class Holding(NamedTuple):
    """A job with what it has before the plan; no shares for one that waits."""

    job: Job
    shares: tuple[Share, ...]
    plugin: str


class Choice(NamedTuple):
    """A configuration of one job, and what it is worth."""

    id: str
    target: Target
    worth: float


class Planning:
    """The plan of one round; `plan` takes from room and ledger what it hands out."""

    def __init__(self, index: Index, room: Room, ledger: Ledger) -> None:
        self.index, self.room, self.ledger, self.rules = index, room, ledger, index.settings.elastic
        self.known: dict[str, Holding] = {}

    def plan(self, held: Iterable[Holding], waiting: Iterable[PendingJob]) -> dict[str, Holding]:
        """`held`: running and just started jobs; `waiting`: those that find no room, in their order -> what has changed."""
        self.known = {h.job.id: h for h in held}
        self.known |= {job.id: Holding(job, (), "") for job in waiting}
        targets = self._solved(self._choices())
        slots = {plugin: counts.copy() for plugin, counts in self.room.slots.items()}
        before = (self.room.free.copy(), self.room.long.copy(), slots, dict(self.ledger.held))
        placed = self._settled(targets)
        if placed is None:
            self._restore(before)
            return {}
        return {id: new for id, new in placed.items() if new.shares != self.known[id].shares}

    # ---- what each job could have --------------------------------------------------------------------------------------------

    def _left(self, type: str) -> int:
        """Devices of a type that the plan may hand out."""
        free = float(self.room.long[:, self.index.column[type]].clip(0.0).sum()) if type in self.index.column else 0.0
        mine = (h for h in self.known.values() if h.shares and h.shares[0].type == type)
        return int(free) + sum(size(h.shares) * h.job.request.gpus for h in mine)

    def _configurations(self, job: Job, now: Target | None) -> list[tuple[Target, float]]:
        """((type, members), speed): powers of two within a node and whole nodes, which never lie split, and what it has."""
        found: dict[Target, float] = {}
        for type in {s.type for s in job.speeds} & set(self.index.types):
            whole = self.index.capacity[:, self.index.column[type]]
            node, total = int(whole.max()) // job.request.gpus, int(whole.sum()) // job.request.gpus
            counts = {job.members, *(2**i for i in range(node.bit_length())), *range(node, total + 1, max(node, 1))}
            measured = next(members for s in job.speeds if s.type == type for members, _ in s.points)
            for members in sorted(counts):
                if max(job.members, measured) <= members <= job.most and (rate := speed_of(job, members, type)) > 0:
                    found[type, members] = rate
        if now is not None and now not in found:
            found[now] = max(speed_of(job, now[1], now[0]), 1e-9)
        return sorted(found.items())

    def _choices(self) -> list[Choice]:
        options = {id: found for id, h in self.known.items() if (found := self._configurations(h.job, _present(h)))}
        fair = self._fair(options)
        left = {id: _left_s(self.known[id].job, *fair[id]) for id in options}
        weights = weights_of({id: (left[id], self.known[id].job.submitted) for id in options}, self.rules.small_first)
        choices = []
        for id, found in options.items():
            job, now, (speed, _) = self.known[id].job, _present(self.known[id]), fair[id]
            fresh = isinstance(job, PendingJob)  # it starts anyway: what it was to start with is worth no more than another
            lasts_s = self.rules.lasts_s if isinstance(job, PendingJob) else max(self.rules.lasts_s, self.index.now - job.started)
            keep = self.rules.keep * self.rules.lasts_s / lasts_s
            for target, rate in found:
                lasts = max(min(left[id] * speed / rate + job.restart_s, lasts_s), 1.0)
                cost = min(job.restart_s / lasts, 1.0)  # a start takes as long as a restart
                factor = 1.0 - cost if fresh or target != now else 1.0 + keep + cost
                if factor > 0 or fresh:
                    choices.append(Choice(id, target, weights[id] * rate / speed * max(factor, 0.0)))
        return choices

    def _fair(self, options: dict[str, list[tuple[Target, float]]]) -> dict[str, tuple[float, float]]:
        """(speed, devices) of each job with an even share of the devices that it can use: the mean over the types."""
        devices = {type: self._left(type) for type in {target[0] for found in options.values() for target, _ in found}}
        fair = {}
        for id, found in options.items():
            gpus, speeds = self.known[id].job.request.gpus, dict[str, float]()
            share = max(sum(devices[type] for type in {target[0] for target, _ in found}) / len(options), 1.0)
            for (type, members), rate in found:  # by members, the fewest first
                if type not in speeds or members * gpus <= share:
                    speeds[type] = rate
            fair[id] = sum(speeds.values()) / len(speeds), share
        return fair

    def _solved(self, choices: list[Choice]) -> dict[str, Target]:
        types = sorted({c.target[0] for c in choices})
        room = [float(self._left(type)) for type in types]
        ids, columns = sorted(self.known), np.arange(len(choices))
        if not choices:
            return {}
        row = {id: i for i, id in enumerate(ids)}
        once = coo_array((np.ones(len(choices)), ([row[c.id] for c in choices], columns)), shape=(len(ids), len(choices)))
        needs = [float(c.target[1] * self.known[c.id].job.request.gpus) for c in choices]
        taken = coo_array((needs, ([types.index(c.target[0]) for c in choices], columns)), shape=(len(types), len(choices)))
        values = np.array([c.worth for c in choices])
        run, due = {id for id in ids if self.known[id].shares}, self._due()
        for must in [run | due, run] if due else [run]:  # as a constraint: a large worth would hide all others in the solver's gap
            least = [float(id in must) for id in ids]
            found = milp(-values / (values.max() or 1.0), integrality=np.ones(len(choices)), bounds=Bounds(0, 1),
                         constraints=[LinearConstraint(once, least, 1.0), LinearConstraint(taken, ub=room)],
                         options={"mip_rel_gap": 1e-3, "node_limit": 1000})  # fmt: skip
            if found.x is not None:
                return {c.id: c.target for c, x in zip(choices, found.x, strict=True) if x > 0.5}
        return {}

    def _due(self) -> set[str]:
        """The first of the queue, if they have waited so long that nobody is to pass them any more."""
        first = [h.job for h in self.known.values() if not h.shares][: self.index.settings.preemption.heads]
        return {job.id for job in first if self.index.now - job.submitted >= self.rules.patience_s}

    # ---- where ---------------------------------------------------------------------------------------------------------------

    def _settled(self, targets: dict[str, Target]) -> dict[str, Holding] | None:
        """Nodes for the targets; None where one that runs would lose its place."""
        stay = {id for id, h in self.known.items() if id not in targets or _present(h) == targets[id]}
        placed = {id: self.known[id] for id in stay if self.known[id].shares}
        movers = [id for id in self.known if id not in stay]
        for id in movers:
            self._put(self.known[id])
        for id in sorted(movers, key=lambda id: (-targets[id][1], self.known[id].job.submitted, id)):
            new = self._found(id, targets[id])
            if new is None and self._packed(id, targets, placed):
                continue
            new = new or self._smaller(id, targets[id])
            if new is not None:
                placed[id] = new
            elif self.known[id].shares:
                return None
        return placed

    def _found(self, id: str, target: Target) -> Holding | None:
        """A place on one node, or on whole nodes; taken from the room."""
        holding, (type, members) = self.known[id], target
        job = holding.job
        if self.ledger.shortage(job.tenant, amount_of(job.request, members)):
            return None
        ask = Ask(job.request, job.plugins, job.tenant, 1, (type,), job.device_mb, job.within, job.avoid)
        one = members * job.request.gpus <= self.index.capacity[:, self.index.column[type]].max()
        for plugin in (holding.plugin,) if holding.plugin else job.plugins:
            if plugin in self.room.slots:
                found = self._at_home(holding, target) or self.room.gang(ask, members, type, plugin, self.room.long)
                if found is not None and (len(found.rows) == 1 or not one):
                    shares = self.room.take(ask, found._replace(plugin=plugin))
                    self.ledger.take(job.tenant, amount_of(job.request, members))
                    return Holding(job, shares, plugin)
        return None

    def _at_home(self, holding: Holding, target: Target) -> Found | None:
        """Where it is, if that is what it is to have and nobody has taken it."""
        if _present(holding) != target:
            return None
        parts = self.index.amounts(holding.job.request, holding.shares)
        if len(parts) < len(holding.shares) or any((self.room.long[row] + 1e-6 < amount).any() for row, amount, _ in parts):
            return None
        return Found(tuple((row, members) for row, _, members in parts), target[0], holding.plugin, 1.0)

    def _packed(self, id: str, targets: dict[str, Target], placed: dict[str, Holding]) -> bool:
        """Room by putting down all that have devices of this type anew, the largest first; nothing changes where that fails."""
        others = [other for other, h in placed.items() if h.shares[0].type == targets[id][0]]
        for other in others:
            self._put(placed[other])
        found: dict[str, Holding] = {}
        for other in sorted([*others, id], key=lambda o: (-(size(placed[o].shares) if o in placed else targets[o][1]), o == id, o)):
            target = targets[id] if other == id else (targets[id][0], size(placed[other].shares))
            if (new := self._found(other, target)) is None:
                break
            found[other] = new
        if len(found) == len(others) + 1:
            placed |= found
            return True
        for new in found.values():
            self._put(new)
        for other in others:
            self._put(placed[other], -1)
        return False

    def _smaller(self, id: str, target: Target) -> Holding | None:
        fewer = [t for t, _ in self._configurations(self.known[id].job, _present(self.known[id])) if t[1] < target[1]]
        for smaller in sorted(fewer, key=lambda t: (t[0] != target[0], -t[1], t[0])):
            if (new := self._found(id, smaller)) is not None:
                return new
        return None

    def _put(self, holding: Holding, sign: int = 1) -> None:
        """Back into room and ledger; out of it, with `sign` -1."""
        if holding.shares:
            self.room.give(holding.job.request, holding.shares, holding.plugin, float(sign))
            self.ledger.take(holding.job.tenant, amount_of(holding.job.request, -sign * size(holding.shares)))

    def _restore(self, before: tuple[Matrix, Matrix, dict[str, Matrix], dict[str, tuple[float, float, float]]]) -> None:
        same = self.room.long is self.room.free
        self.room.free, long, self.room.slots, held = before
        self.room.long = self.room.free if same else long
        for tenant in self.ledger.held.keys() | held.keys():
            has, had = self.ledger.held.get(tenant, (0.0, 0.0, 0.0)), held.get(tenant, (0.0, 0.0, 0.0))
            self.ledger.take(tenant, (had[0] - has[0], had[1] - has[1], had[2] - has[2]))
        self.room.touch()

    # ---- in which order ------------------------------------------------------------------------------------------------------

    def in_order(self, changed: dict[str, Holding]) -> tuple[list[str], list[str]]:
        """The changes in an order in which each finds its room free; those that must stop for a round, since each waits for
        another's place."""
        free, slots = self.room.free.copy(), {p: s.copy() for p, s in self.room.slots.items()}
        running = {id for id in changed if isinstance(self.known[id].job, PlacedJob)}

        def move(holding: Holding, sign: int) -> bool:
            ok = True
            for row, amount, members in self.index.amounts(holding.job.request, holding.shares):
                free[row] += sign * amount
                ok = ok and bool((free[row] > -1e-6)[amount > 0].all())
                if holding.plugin in slots and self.index.slots[holding.plugin][row] >= 0:
                    slots[holding.plugin][row] += sign * members
                    ok = ok and bool(slots[holding.plugin][row] >= 0)
            return ok

        for id, new in changed.items():
            move(new, 1)
            if id in running:
                move(self.known[id], -1)
        left, order, stopped = sorted(changed), list[str](), list[str]()
        while left:
            for id in left:
                if id in running:
                    move(self.known[id], 1)
                if move(changed[id], -1):
                    order.append(id)
                    left.remove(id)
                    break
                move(changed[id], 1)
                if id in running:
                    move(self.known[id], -1)
            else:
                id = next((id for id in left if id in running), left[0])
                if id in running:
                    move(self.known[id], 1)
                    stopped.append(id)
                else:  # only on a node that is oversubscribed already: the job table says so
                    order.append(id)
                left.remove(id)
        return order, stopped


def _present(holding: Holding) -> Target | None:
    return (holding.shares[0].type, size(holding.shares)) if holding.shares else None


def _left_s(job: Job, speed: float, devices: float) -> float:
    """Seconds that are left at `speed`, or on so many devices for a job that does not tell what is left."""
    return job.remaining / speed if job.remaining > 0 else job.estimate_s or max(job.served_s / devices, UNKNOWN_S)


def weights_of(left: dict[str, tuple[float, float]], power: float) -> dict[str, float]:
    """(seconds that are left, submission) of each job -> what its speed is worth: with k jobs left of which none is smaller,
    (k^a - (k - 1)^a)^(1 / a), a = 1 / (1 - power), as the least sum of the completion times falls with its work (heSRPT)."""
    a = 1.0 / (1.0 - power)
    order = sorted(left, key=lambda id: (-left[id][0], -left[id][1], id))
    return {id: k * (1.0 - (1.0 - 1.0 / k) ** a) ** (1.0 / a) for k, id in enumerate(order, 1)}
