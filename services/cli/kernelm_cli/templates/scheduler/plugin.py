"""First come, first served, within each priority: what does not fit yet keeps what is behind it waiting, so nobody starves."""

from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, PendingJob, Scheduler, Share
from kernelm_sdk.plugin import Call, Plugin


class InOrder(Plugin, Scheduler):
    async def decide(self, request: ClusterState, call: Call) -> Decisions:
        free = {n.name: [n.free.cpu, n.free.memory_mb, n.free.gpus, dict(n.plugins)] for n in request.nodes}
        held = {t: sum(p.request.cpu for p in request.placed if p.tenant == t) for t in request.quotas}
        blocked, decisions = "", []
        for job in sorted(request.pending, key=lambda j: (-j.priority, j.submitted, j.id)):
            cores, quota = job.request.cpu * job.members, request.quotas.get(job.tenant)
            if quota and held[job.tenant] + cores > quota.cpu:
                decisions.append(Decision(job.id, "wait", reason=f"the quota of {job.tenant} is {quota.cpu:g} cores"))
            elif blocked or not (found := self.place(job, free)):
                decisions.append(Decision(job.id, "wait", reason=f"{blocked or 'room for it'} comes first"))
                fits = any(n.capacity.cpu >= cores and set(job.plugins) & set(n.plugins) for n in request.nodes)
                blocked = blocked or (job.id if fits else "")  # what fits on no node must not keep others out
            else:
                held[job.tenant] = held.get(job.tenant, 0.0) + cores
                node, plugin = found
                decisions.append(
                    Decision(job.id, "place", node, plugin, "the first that fits", allocation=(Share(node, job.members),))
                )
        return Decisions(request.version, tuple(decisions))

    def place(self, job: PendingJob, free: dict[str, list]) -> tuple[str, str] | None:
        wanted = [job.members * n for n in (job.request.cpu, job.request.memory_mb, job.request.gpus)]
        for node, room in free.items():
            plugin = next((p for p in job.plugins if 0 < job.members <= room[3].get(p, 0)), "")
            if plugin and all(have >= want for have, want in zip(room, wanted, strict=False)):
                room[:3] = [have - want for have, want in zip(room, wanted, strict=False)]
                room[3][plugin] -= job.members
                return node, plugin
        return None
