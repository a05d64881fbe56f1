"""What every policy here shares: room on nodes, and the way from targets (which type, how many members) to decisions.

A policy says what each job should have; `settle` finds nodes for that. Whoever keeps type and number of members keeps its nodes,
the others go where they fit most tightly; jobs larger than a node take whole nodes. Where room is there but in pieces, the
movable jobs of that type are packed anew, largest first. The decisions come in an order in which each finds its room free.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from kernelm_contracts.deployments import WAITS
from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, PendingJob, PlacedJob, Share

Job = PendingJob | PlacedJob
Target = tuple[str, int]  # (type of the devices, members)
TOLERANCE = 1e-6  # cores; sums of decimal fractions are not exact


@dataclass(slots=True)
class Bin:
    """A node, while a round goes on."""

    name: str
    cpu: float
    memory_mb: int
    gpus: int
    plugins: dict[str, int]
    free: dict[str, int] = field(default_factory=dict)  # devices by type; {} where types are not known
    total: dict[str, int] = field(default_factory=dict)  # as `free`, but with "" where types are not known

    def fits(self, job: Job, type: str) -> int:
        """How many members of `job` fit on devices of `type` ("" for any)."""
        request, most = job.request, [max(self.plugins.get(p, 0) for p in job.plugins) if job.plugins else 0]
        if request.cpu > 0:
            most.append(int((self.cpu + TOLERANCE) / request.cpu))
        if request.memory_mb > 0:
            most.append(self.memory_mb // request.memory_mb)
        if request.gpus > 0:
            devices = self.gpus if not self.free else self.free.get(type, 0) if type else max(self.free.values(), default=0)
            most.append(devices // request.gpus)
        return max(0, min(most))

    def take(self, job: Job, share: Share, plugin: str, sign: int = -1) -> None:
        """Take (or with `sign` 1 give back) what `share` of `job` holds."""
        request, n = job.request, sign * share.members
        self.cpu += n * request.cpu
        self.memory_mb += n * request.memory_mb
        self.gpus += n * request.gpus
        if share.type in self.free:
            self.free[share.type] += n * request.gpus
        if plugin in self.plugins:
            self.plugins[plugin] += n


class Room:
    """What is free on the nodes while decisions are made."""

    def __init__(self, state: ClusterState) -> None:
        self._nodes = state.nodes
        self.capacity: dict[str, int] = {}  # devices by type, held by jobs or not; what models hold is not theirs to give
        for node in state.nodes:
            for devices in node.devices:
                self.capacity[devices.type] = self.capacity.get(devices.type, 0) + devices.count
            if not node.devices and node.capacity.gpus:
                self.capacity[""] = self.capacity.get("", 0) + node.capacity.gpus
        for model in state.models:
            for share in model.allocation if model.request.gpus > 0 else ():
                self.capacity[share.type] = self.capacity.get(share.type, 0) - share.members * model.request.gpus

    @cached_property
    def bins(self) -> dict[str, Bin]:
        """By the name of the node; made only where somebody looks for a place."""
        return {n.name: Bin(n.name, n.free.cpu, n.free.memory_mb, n.free.gpus, dict(n.plugins),
                            {d.type: d.free for d in n.devices},
                            {d.type: d.count for d in n.devices} or {"": n.capacity.gpus})
                for n in self._nodes}  # fmt: skip

    def types(self, job: Job) -> list[str]:
        """Types `job` can run on, fastest first; [""] where it doesn't matter."""
        known = [s.type for s in sorted(job.speeds, key=lambda s: (-speed(job, s.type, job.members), s.type))]
        return [t for t in known if t in self.capacity or not t] or [""] if known else list(self.capacity) or [""]

    def find(self, job: Job, type: str, members: int, spread: bool = True) -> tuple[Share, ...]:
        """Nodes for `members` of `job`: one if any will do, the tightest; else, with `spread`, the emptiest first. () for none."""
        bins = [(b.fits(job, type), b) for b in self.bins.values() if b.name not in job.avoid or len(job.avoid) >= len(self.bins)]
        able = [(n, b) for n, b in bins if n > 0]
        single = [(n, b) for n, b in able if n >= members]
        if single:
            chosen = min(single, key=lambda nb: (nb[0], nb[1].name))[1]
            return (Share(chosen.name, members, self._type(chosen, type)),)
        if job.within == "node" or not spread:
            return ()
        shares, left = [], members
        for n, b in sorted(able, key=lambda nb: (-nb[0], nb[1].name)):
            part = min(n, left)
            shares.append(Share(b.name, part, self._type(b, type)))
            left -= part
            if not left:
                return tuple(shares) if len({s.type for s in shares}) == 1 else ()
        return ()

    def fits_whole(self, job: Job, type: str, members: int) -> bool:
        """Whether `members` could sit on as few nodes as possible if those were empty."""
        return members <= max((b.total.get(type, 0) for b in self.bins.values()), default=0)

    def take(self, job: Job, allocation: Iterable[Share], plugin: str) -> None:
        for share in allocation:
            self.bins[share.node].take(job, share, plugin)

    def give(self, job: Job, allocation: Iterable[Share], plugin: str) -> None:
        for share in allocation:
            if share.node in self.bins:  # or the node has gone
                self.bins[share.node].take(job, share, plugin, 1)

    def plugin(self, job: Job, allocation: tuple[Share, ...]) -> str:
        """The first of its plugins with a slot for each member; the first of all if none has."""
        able = (p for p in job.plugins if all(self.bins[s.node].plugins.get(p, 0) >= s.members for s in allocation))
        return next(able, job.plugins[0] if job.plugins else "")

    def _type(self, bin: Bin, type: str) -> str:
        return type or next(iter(sorted(bin.free, key=lambda t: -bin.free[t])), "")


def speed(job: Job, type: str, members: int) -> float:
    """Progress per second with `members` on `type`, by its curve (between its points linear, beyond flat); 0 if it has none."""
    curve = next((s.points for s in job.speeds if s.type in (type, "")), ())
    if not curve or members < 1:
        return 0.0
    if members <= curve[0][0]:
        return curve[0][1] if members == curve[0][0] else 0.0
    for (n0, v0), (n1, v1) in pairwise(curve):
        if members <= n1:
            return v0 + (v1 - v0) * (members - n0) / (n1 - n0)
    return curve[-1][1]


def held(job: PlacedJob) -> tuple[Share, ...]:
    """What `job` holds."""
    return job.allocation or (Share(job.node),)


def current(job: PlacedJob) -> Target:
    """(type, members) of a placed job."""
    shares = held(job)
    return shares[0].type, shares[0].members if len(shares) == 1 else sum(s.members for s in shares)


def settle(state: ClusterState, targets: Mapping[str, Target], reason: str) -> Decisions:
    """Decisions that bring every movable job from what it has to what `targets` says; a job without a target has to wait. Jobs
    that can't be moved now keep what they have, so that a policy must leave room for them."""
    room = Room(state)
    jobs: dict[str, Job] = {j.id: j for j in (*state.placed, *state.pending)}
    before = {j.id: held(j) for j in state.placed}
    after = {j.id: held(j) for j in state.placed if not free_to_move(j) or targets.get(j.id) == current(j)}
    for id in before.keys() - after.keys():
        room.give(jobs[id], before[id], _plugin(jobs[id]))
    wanted = sorted((id for id in targets if id not in after), key=lambda id: (-targets[id][1], jobs[id].submitted, id))
    for id in wanted:
        job, (type, members) = jobs[id], targets[id]
        found = room.find(job, type, members, spread=not room.fits_whole(job, type, members))
        if not found:
            found = _packed_anew(room, jobs, after, targets, job) or room.find(job, type, members)
        if found:
            after[id] = found
            room.take(job, found, room.plugin(job, found))
    return Decisions(state.version, tuple(_in_order(state, jobs, before, after, reason)))


def free_to_move(job: PlacedJob) -> bool:
    """Whether a policy may take its devices now."""
    return job.movable and not job.leaving


def _plugin(job: Job) -> str:
    return job.plugins[0] if job.plugins else ""


def _packed_anew(room: Room, jobs: dict[str, Job], after: dict[str, tuple[Share, ...]], targets: Mapping[str, Target],
                 job: Job) -> tuple[Share, ...]:  # fmt: skip
    """Room for `job` by moving others of its type: those are taken up and put down again, largest first. () if that fails."""
    type, members = targets[job.id]
    others = [id for id, shares in after.items() if shares[0].type == type and id in targets and _movable(jobs[id])]
    for id in others:
        room.give(jobs[id], after[id], _plugin(jobs[id]))
    found: dict[str, tuple[Share, ...]] = {}
    for id in sorted([*others, job.id], key=lambda i: (-targets[i][1], i == job.id, jobs[i].submitted, i)):
        stays = id != job.id and targets[id][1] > members and all(
            room.bins[s.node].fits(jobs[id], type) >= s.members for s in after[id])  # fmt: skip
        shares = after[id] if stays else room.find(jobs[id], type, targets[id][1])
        if not shares:
            break
        found[id] = shares
        room.take(jobs[id], shares, _plugin(jobs[id]))
    for id, shares in found.items():  # all up again: the caller takes what it keeps
        room.give(jobs[id], shares, _plugin(jobs[id]))
    if len(found) == len(others) + 1:
        after.update({id: found[id] for id in others})
    for id in others:
        room.take(jobs[id], after[id], _plugin(jobs[id]))
    return found[job.id] if len(found) == len(others) + 1 else ()


def _movable(job: Job) -> bool:
    return not isinstance(job, PlacedJob) or free_to_move(job)


def _in_order(state: ClusterState, jobs: dict[str, Job], before: dict[str, tuple[Share, ...]], after: dict[str, tuple[Share, ...]],
              reason: str) -> list[Decision]:  # fmt: skip
    """Decisions of which each finds its room free. Where jobs wait for each other's places, one is stopped and waits a round."""
    decisions: list[Decision] = []
    if before == after:
        return _waits(state, decisions, reason)
    room = Room(state)
    for id in sorted(before.keys() - after.keys()):
        decisions.append(Decision(id, "preempt", reason=f"{reason}: others go first"))
        room.give(jobs[id], before[id], _plugin(jobs[id]))
    left = [id for id in after if after[id] != before.get(id)]
    while left:
        ready = next((id for id in left if _free(room, jobs[id], before.get(id, ()), after[id])), "")
        if ready:
            job, shares = jobs[ready], after[ready]
            room.give(job, before.get(ready, ()), _plugin(job))
            plugin = room.plugin(job, shares)
            room.take(job, shares, plugin)
            members = sum(s.members for s in shares)
            action = "place" if ready not in before else "resize" if members != sum(s.members for s in before[ready]) else "migrate"
            why = f"{reason}: {members} on {shares[0].type or 'any type'}"
            decisions.append(Decision(ready, action, shares[0].node, plugin, why, allocation=shares))
            left.remove(ready)
            continue
        stopped = next((id for id in left if id in before), "")
        if not stopped:
            break  # pending jobs whose room is held by others that stay: they wait
        decisions.append(Decision(stopped, "preempt", reason=f"{reason}: changes places with another"))
        room.give(jobs[stopped], before[stopped], _plugin(jobs[stopped]))
        left.remove(stopped)
    return decisions + _waits(state, decisions, reason)


def _waits(state: ClusterState, decisions: list[Decision], reason: str) -> list[Decision]:
    """For the pending jobs of which nothing is decided."""
    told, why = {d.job for d in decisions}, f"{WAITS}{reason}: others go first"
    return [Decision(j.id, "wait", reason=why) for j in state.pending if j.id not in told]


def _free(room: Room, job: Job, old: tuple[Share, ...], new: tuple[Share, ...]) -> bool:
    room.give(job, old, _plugin(job))
    fits = all(room.bins[s.node].fits(job, s.type) >= s.members for s in new)
    room.take(job, old, _plugin(job))
    return fits
