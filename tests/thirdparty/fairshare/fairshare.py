"""Weighted fair share over several resources: "Dominant Resource Fairness", Ghodsi et al., NSDI 2011, with weights.

A tenant's dominant share is the largest part that it holds of any resource of the cluster. The tenant with the lowest dominant
share for its weight goes next, with its most urgent job. A job that has no room keeps the nodes that will have it, so that small
jobs of others don't pass it for ever; one that only waits for a free instance keeps nothing.
"""

from collections import defaultdict
from collections.abc import Iterator

from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, NodeState, PendingJob, Scheduler, Share
from kernelm_sdk.plugin import Call, Plugin, Resources

NAMES = ("cores", "MB", "accelerators")
SMALL = 1e-6  # sums of decimal fractions are not exact


class FairShare(Plugin, Scheduler):
    async def decide(self, request: ClusterState, call: Call) -> Decisions:
        return Decisions(request.version, tuple(Round(request).decisions()))


def amounts(r: Resources, times: int = 1) -> list[float]:
    return [times * r.cpu, times * r.memory_mb, times * r.gpus]


def total(*parts: list[float]) -> list[float]:
    return [sum(column) for column in zip([0.0, 0.0, 0.0], *parts, strict=True)]


class Round:
    """One round of decisions on a state."""

    def __init__(self, state: ClusterState) -> None:
        self.nodes, self.pending, self.quotas = state.nodes, state.pending, state.quotas
        self.tenants = {t.name: t for t in state.tenants}
        self.free = {n.name: amounts(n.free) for n in state.nodes}
        self.slots = {n.name: dict(n.plugins) for n in state.nodes}
        self.kept: set[str] = set()  # nodes, for jobs that have no room yet
        self.whole = total(*(amounts(n.capacity) for n in state.nodes))
        self.held = defaultdict[str, list[float]](total)
        for job in state.placed:
            self.take(job.tenant, amounts(job.request, sum(s.members for s in job.allocation) or 1))
        for model in state.models:
            self.take(model.tenant, amounts(model.request, sum(s.members for s in model.allocation)))

    def take(self, tenant: str, what: list[float]) -> None:
        self.held[tenant] = total(self.held[tenant], what)

    def share(self, tenant: str) -> float:
        """Its dominant share for its weight."""
        weight = self.tenants[tenant].weight if tenant in self.tenants else 1.0
        return max(have / (there or 1.0) for have, there in zip(self.held[tenant], self.whole, strict=True)) / max(weight, SMALL)

    def decisions(self) -> Iterator[Decision]:
        queues = defaultdict[str, list[PendingJob]](list)
        for job in sorted(self.pending, key=lambda j: (-j.priority, j.submitted, j.id), reverse=True):
            queues[job.tenant].append(job)
        while queues:
            tenant = min(queues, key=lambda t: (self.share(t), t))
            yield self.decide(queues[tenant].pop())
            if not queues[tenant]:
                del queues[tenant]

    def decide(self, job: PendingJob) -> Decision:
        due = self.share(job.tenant)
        if limit := self.limit(job):
            return Decision(job.id, "wait", reason=f"fair share: {limit}", remedy="a larger quota, or the end of other jobs")
        for plugin in job.plugins:
            if shares := self.room(job, plugin):
                for s in shares:
                    self.free[s.node] = total(self.free[s.node], amounts(job.request, -s.members))
                    self.slots[s.node][plugin] -= s.members
                self.take(job.tenant, amounts(job.request, job.members))
                why = f"fair share: {job.tenant} has {due:.1%} for its weight, the least of those that wait"
                return Decision(job.id, "place", shares[0].node, plugin, why, -due, shares)
        if any(self.room(job, plugin, busy=True) for plugin in job.plugins):
            return Decision(job.id, "wait", reason="fair share: the instances that can do it are busy")
        for plugin in job.plugins:
            if shares := self.room(job, plugin, busy=True, empty=True):
                self.kept |= {s.node for s in shares}
                return Decision(job.id, "wait", reason=f"fair share: {', '.join(s.node for s in shares)} is kept for it")
        return Decision(job.id, "wait", reason="fair share: no node that nobody else waits for is large enough and can do it")

    def room(self, job: PendingJob, plugin: str, busy: bool = False, empty: bool = False) -> tuple[Share, ...]:
        """Nodes for all its members, one if any will do; () for none. `busy`: even if no instance is free there; `empty`: as they
        will be once nothing runs there."""
        fits = [(self.fits(job, plugin, n, busy, empty), n) for n in self.nodes if n.name not in self.kept]
        able = sorted(((k, n) for k, n in fits if k > 0), key=lambda kn: (kn[1].name in job.avoid, kn[0], kn[1].name))
        if one := next((n for k, n in able if k >= job.members), None):  # the tightest
            return (Share(one.name, job.members),)
        shares, left = list[Share](), job.members
        for k, n in reversed(able if not job.within else []):
            shares.append(Share(n.name, min(k, left)))
            left -= shares[-1].members
            if left <= 0:
                return tuple(shares)
        return ()

    def fits(self, job: PendingJob, plugin: str, node: NodeState, busy: bool, empty: bool) -> int:
        """How many members fit on the node."""
        if plugin not in node.plugins:
            return 0
        there = amounts(node.capacity) if empty else self.free[node.name]
        most = [int((have + SMALL) / need) for have, need in zip(there, amounts(job.request), strict=True) if need > 0]
        return max(min([*most, job.members if busy else self.slots[node.name][plugin]]), 0)

    def limit(self, job: PendingJob) -> str:
        """The limit that it would break; "" for none."""
        for name, tenants, most in self.limits(job.tenant):
            after = total(amounts(job.request, job.members), *(self.held[t] for t in tenants))
            for k, need in enumerate(amounts(job.request)):
                if need > 0 and after[k] > most[k] + SMALL:
                    return f"{name} is {most[k]:g} {NAMES[k]}"
        return ""

    def limits(self, tenant: str) -> Iterator[tuple[str, list[str], list[float]]]:
        """(what it is called, who counts, most that they hold): the quota, what is its own and may be borrowed, the cohort's."""
        if quota := self.quotas.get(tenant):
            yield f"the quota of {tenant}", [tenant], amounts(quota)
        mine = self.tenants.get(tenant)
        if mine is None or mine.nominal is None:
            return
        cohort = [t for t in self.tenants.values() if t.cohort and t.cohort == mine.cohort]
        if not cohort:
            yield f"the limit of {tenant}", [tenant], amounts(mine.nominal)
        elif mine.borrowing is not None:
            yield f"the limit of {tenant}", [tenant], total(amounts(mine.nominal), amounts(mine.borrowing))
        nominal = [t.nominal for t in cohort if t.nominal is not None]
        if cohort and len(nominal) == len(cohort):
            yield f"the limit of cohort {mine.cohort}", [t.name for t in cohort], total(*map(amounts, nominal))
