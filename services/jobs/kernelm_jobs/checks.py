"""The check of what a scheduler decided, as a pure function.

The scheduler is a plugin and may be wrong: nothing that it says is carried out before it was checked here. Decisions are checked
in their order, each on what those before it have left.
"""

from collections.abc import Iterable

from msgspec import Struct

from kernelm_contracts.scheduler import (
    ClusterState,
    Decision,
    Decisions,
    ModelState,
    NodeState,
    PendingJob,
    PlacedJob,
    Share,
    Tenant,
)
from kernelm_jobs.holdings import size
from kernelm_jobs.rounds import CPU_TOLERANCE
from kernelm_sdk.system import Resources

Amounts = dict[str, float]


class Checked(Struct):
    """What may be carried out, and what not: job or model -> complaint."""

    accepted: list[Decision]
    refused: dict[str, str]


def check(state: ClusterState, answer: Decisions) -> Checked:
    """Check every decision against the state that it was made on, each after those before it were carried out."""
    checked = Checked([], {})
    if answer.version != state.version:
        checked.refused = {j.id: f"the scheduler decided on version {answer.version}, not {state.version}" for j in state.pending}
        return checked
    room = _Room(state)
    for decision in answer.decisions:
        if complaint := room.complaint(decision):
            checked.refused[decision.job] = complaint
        else:
            checked.accepted.append(decision)
    decided = {d.job for d in answer.decisions}
    checked.refused |= {j.id: "the scheduler gave no decision" for j in state.pending if j.id not in decided}
    return checked


def amounts(request: Resources, members: int, type: str = "") -> Amounts:
    """What so many members hold, by dimension; devices of a type are one of their own."""
    found = {"cores": request.cpu * members, "MiB": float(request.memory_mb * members), "GPUs": float(request.gpus * members)}
    return found | {f"devices of {type}": found["GPUs"]} if type and request.gpus else found


class _Room:
    """What is left of nodes, slots and quotas while decisions are checked one after the other."""

    def __init__(self, state: ClusterState) -> None:
        self.actions = {"place", "wait", "reject", *state.actions}
        self.kinds = {"scale": self._scale, "place": self._place, "wait": self._waits, "reject": self._waits}
        self.pending = {job.id: job for job in state.pending}
        self.placed = {job.id: job for job in state.placed}
        self.models = {model.name: model for model in state.models}
        self.free = {node.name: _free(node) for node in state.nodes}
        self.slots = {node.name: dict(node.plugins) for node in state.nodes}
        self.quotas = state.quotas
        self.tenants = {tenant.name: tenant for tenant in state.tenants}
        self.held: dict[str, Amounts] = {}
        self.taken: set[str] = set()
        for job in state.placed:
            self._book(job.tenant, job.request, _shares(job), 1)
        for model in state.models:
            self._book(model.tenant, model.request, model.allocation, 1)

    def complaint(self, d: Decision) -> str:
        """What is wrong with the decision; "" if nothing is: then what it takes is taken."""
        if d.job in self.taken:
            return "the scheduler decided on it twice"
        if d.action not in self.actions:
            return f"the scheduler says to {d.action} it, which this system can't carry out"
        if not d.reason and d.action != "place":
            return f"the scheduler gave no reason to {d.action}"
        complaint = self.kinds.get(d.action, self._change)(d)
        if not complaint:
            self.taken.add(d.job)
        return complaint

    def _waits(self, d: Decision) -> str:
        if d.action == "wait" and d.job in self.models:
            return ""
        return "" if d.job in self.pending else "the scheduler decided on a job that does not wait"

    def _place(self, d: Decision) -> str:
        job = self.pending.get(d.job)
        if job is None:
            return "the scheduler decided on a job that does not wait"
        return self._take(d, job, d.allocation or (Share(d.node),))

    def _change(self, d: Decision) -> str:
        """preempt, migrate, resize"""
        job = self.placed.get(d.job)
        if job is None:
            return f"the scheduler says to {d.action} a job that is not placed"
        if not job.movable or job.leaving:
            return f"the scheduler says to {d.action} a job that can't be moved now"
        self._put(job.tenant, job.request, _shares(job), next(iter(job.plugins), ""), -1)
        complaint = "" if d.action == "preempt" else self._take(d, job, d.allocation)
        if complaint:
            self._put(job.tenant, job.request, _shares(job), next(iter(job.plugins), ""), 1)
        return complaint

    def _scale(self, d: Decision) -> str:
        model = self.models.get(d.job)
        if model is None:
            return "the scheduler scales a model that is not served"
        fewest = min(model.minimum, model.replicas + 1)  # it may have fewer than that already, and no node room for all
        if not fewest <= size(d.allocation) <= max(model.maximum, model.minimum):
            return f"the scheduler gave it {size(d.allocation)} replicas, not {model.minimum} to {model.maximum}"
        plugin = next(iter(model.plugins), "")
        self._put(model.tenant, model.request, model.allocation, plugin, -1)
        complaint = self._take(d, model, d.allocation)
        if complaint:
            self._put(model.tenant, model.request, model.allocation, plugin, 1)
        return complaint

    def _take(self, d: Decision, job: PendingJob | PlacedJob | ModelState, shares: tuple[Share, ...]) -> str:
        members = size(shares)
        if isinstance(job, PendingJob | PlacedJob) and not job.members <= members <= max(job.most, job.members):
            return f"the scheduler gave it {members} of its {job.members} members: a gang starts whole or not at all"
        if any(share.members < 1 or share.type != shares[0].type for share in shares):
            return "the scheduler gave it an allocation that is none"
        if d.plugin not in job.plugins and d.action == "place":
            return f"the scheduler gave it to plugin {d.plugin!r}, which can't do it"
        if complaint := self._room(d.plugin, job.request, shares):
            return complaint
        asked = amounts(job.request, members)
        if complaint := self._quota(job.tenant, asked):
            return complaint
        self._put(job.tenant, job.request, shares, d.plugin, 1)
        return ""

    def _room(self, plugin: str, request: Resources, shares: Iterable[Share]) -> str:
        asked: dict[str, Amounts] = {}
        members: dict[str, int] = {}
        for share in shares:
            if share.node not in self.free:
                return f"the scheduler placed it on {share.node!r}, which is no node"
            _add(asked.setdefault(share.node, {}), amounts(request, share.members, share.type), 1)
            members[share.node] = members.get(share.node, 0) + share.members
        for node, need in asked.items():
            if self.slots[node].get(plugin, 0) < members[node]:
                return f"the scheduler gave it to {plugin} on {node}, which has no free slot"
            if short := _over(need, self.free[node]):
                return f"the scheduler oversubscribed node {node}: {short}"
        return ""

    def _quota(self, tenant: str, asked: Amounts) -> str:
        quota, entry = self.quotas.get(tenant), self.tenants.get(tenant)
        if quota is None and entry is None:
            return ""
        held = dict(self.held.get(tenant, {}))
        _add(held, asked, 1)
        if quota is not None and (short := _over(held, amounts(quota, 1), asked)):
            return f"the scheduler broke the quota of tenant {tenant}: {short}"
        if entry is None or entry.nominal is None:
            return ""
        limit = amounts(entry.nominal, 1)
        if entry.cohort and entry.borrowing is None:
            limit = dict.fromkeys(limit, float("inf"))
        elif entry.cohort and entry.borrowing is not None:
            _add(limit, amounts(entry.borrowing, 1), 1)
        if short := _over(held, limit, asked):
            return f"the scheduler broke the limit of tenant {tenant}: {short}"
        return self._cohort(entry, held, asked) if entry.cohort else ""

    def _cohort(self, entry: Tenant, held: Amounts, asked: Amounts) -> str:
        """What the tenants hold beyond what is only theirs must fit into what they lend together."""
        used: Amounts = {}
        pool: Amounts = {}
        for tenant in self.tenants.values():
            if tenant.cohort != entry.cohort:
                continue
            if tenant.nominal is None:
                return ""
            nominal = amounts(tenant.nominal, 1)
            lent = amounts(tenant.lending, 1) if tenant.lending is not None else nominal
            own = {n: max(nominal[n] - lent[n], 0.0) for n in nominal}
            has = held if tenant.name == entry.name else self.held.get(tenant.name, {})
            before = self.held.get(tenant.name, {})
            _add(used, {n: max(has.get(n, 0.0) - own[n], 0.0) for n in nominal}, 1)
            _add(pool, {n: nominal[n] - own[n] for n in nominal}, 1)
            if tenant.name == entry.name:
                asked = {n: max(has.get(n, 0.0) - own[n], 0.0) - max(before.get(n, 0.0) - own[n], 0.0) for n in nominal}
        short = _over(used, pool, asked)
        return f"the scheduler broke the limit of cohort {entry.cohort}: {short}" if short else ""

    def _put(self, tenant: str, request: Resources, shares: tuple[Share, ...], plugin: str, sign: int) -> None:
        self._book(tenant, request, shares, sign)
        for share in shares:
            if share.node in self.free:
                _add(self.free[share.node], amounts(request, share.members, share.type), -sign)
                if plugin in self.slots[share.node]:
                    self.slots[share.node][plugin] -= sign * share.members

    def _book(self, tenant: str, request: Resources, shares: tuple[Share, ...], sign: int) -> None:
        _add(self.held.setdefault(tenant, {}), amounts(request, size(shares)), sign)


def _shares(job: PlacedJob) -> tuple[Share, ...]:
    return job.allocation or (Share(job.node),)


def _free(node: NodeState) -> Amounts:
    return amounts(node.free, 1) | {f"devices of {d.type}": float(d.free) for d in node.devices}


def _add(to: Amounts, what: Amounts, sign: int) -> None:
    for name, amount in what.items():
        to[name] = to.get(name, 0.0) + sign * amount


def _over(need: Amounts, room: Amounts, asked: Amounts | None = None) -> str:
    """The first dimension in which `need` is more than `room`, of those in which something was asked for."""
    asked = need if asked is None else asked
    for name, amount in need.items():
        if amount > room.get(name, 0.0) + CPU_TOLERANCE and asked.get(name, 0.0) > 0:
            return f"{amount:g} {name} of {room.get(name, 0.0):g}"
    return ""
