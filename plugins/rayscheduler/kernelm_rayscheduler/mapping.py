"""Between jobs and placement groups, as pure functions: which groups there should be, and what Ray's answer means for the jobs.

A group is named after its job. One bundle is one member; labels hold it to nodes on which a plugin can do the job. What runs has a
group that is held to its nodes, so that Ray counts it, whoever placed it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from kernelm_contracts.deployments import WAITS
from kernelm_contracts.scheduler import ClusterState, Decision, ModelState, NodeState, PendingJob, Share, Speed
from kernelm_sdk.system import Resources

LEAST = {"CPU": 0.001}  # Ray knows no bundle of nothing
MODEL = "model "  # before the name of a model whose replicas have a group, and of each that it lacks; no job's id has a space
TOLERANCE = 1e-6  # cores; sums of decimal fractions are not exact


class Wanted(Struct, frozen=True):
    """A group that there should be."""

    id: str
    request: Resources  # of one bundle
    nodes: tuple[tuple[str, ...], ...]  # for each bundle: where it may be
    together: bool = False  # all on one node

    def bundle(self) -> dict[str, float]:
        """What one member needs, in Ray's units."""
        r = self.request
        amounts = {"CPU": r.cpu, "GPU": float(r.gpus), "memory": float(r.memory_mb * 2**20)}
        return {name: amount for name, amount in amounts.items() if amount > 0} or dict(LEAST)


class Group(Struct, frozen=True):
    """What Ray says of a group."""

    nodes: tuple[str, ...] = ()  # for each bundle; () until it is placed
    possible: bool = True  # whether Ray could hold it, were its nodes empty
    decided: bool = True  # False while Ray is at it


def order(state: ClusterState) -> list[PendingJob]:
    """Higher priority first, then the older one."""
    return sorted(state.pending, key=lambda job: (-job.priority, job.submitted, job.id))


def lacking(state: ClusterState) -> dict[str, list[PendingJob]]:
    """By model, the replicas that are to be there and aren't: of one that is called and has none, or that has lost a node. They
    wait like jobs, before these, each by itself: a model answers with those that it has."""
    if "scale" not in state.actions:
        return {}
    found = {}
    for model in sorted(state.models, key=lambda model: (-model.priority, model.name)):
        called = model.arrivals_per_s > 0 or model.queue > 0
        least = max(model.minimum, int(called)) if model.maximum else 0
        like = tuple(Speed(share.type, ()) for share in model.allocation[:1] if share.type)  # all replicas on devices of one type
        found[model.name] = [PendingJob(f"{MODEL}{model.name} {k}", model.name, model.request, model.plugins, model.priority,
                                        model.tenant, speeds=like) for k in range(model.replicas + 1, least + 1)]  # fmt: skip
    return {name: jobs for name, jobs in found.items() if jobs}


def scaled(model: ModelState, answers: Sequence[Decision]) -> list[Decision]:
    """The decision on a model of which Ray says `answers` to the replicas that it lacks: some have a place, or it waits for one."""
    if placed := [answer for answer in answers if answer.action == "place"]:
        shares = Counter({(share.node, share.type): share.members for share in model.allocation})
        shares.update((answer.node, share.type) for answer in placed for share in answer.allocation or (Share(answer.node),))
        where = tuple(Share(node, members, type) for (node, type), members in shares.items())
        return [replace(placed[0], job=model.name, action="scale", node=where[0].node, allocation=where)]
    return [replace(answers[0], job=model.name)] if model.replicas < model.minimum else []


def held(state: ClusterState) -> dict[str, Wanted]:
    """The groups of all that runs, by name: each bundle where its member is."""
    running = [(job.id, job.request, job.allocation or (Share(job.node),)) for job in state.placed]
    running += [(MODEL + model.name, model.request, model.allocation) for model in state.models if model.allocation]
    return {id: Wanted(id, request, tuple((s.node,) for s in shares for _ in range(s.members))) for id, request, shares in running}


def asked(job: PendingJob, state: ClusterState) -> Wanted | str:
    """The group of a waiting job, on nodes with an instance for it and with devices of one type; or why there is none."""
    able = [(node, type) for node in state.nodes if _has_instances(job, node) and (type := device_type(job, node)) is not None]
    able = [(node, type) for node, type in able if node.name not in job.avoid] or able
    if not able:
        return f"{WAITS}no node has an instance of {' or '.join(job.plugins)} for it, and the devices that it needs"
    speeds = {s.type: max((p.speed for p in s.points), default=0.0) for s in job.speeds}
    of_type: dict[str, list[NodeState]] = {}  # the fastest first
    for node, type in sorted(able, key=lambda found: (-speeds.get(found[1], 0.0), found[1], found[0].name)):
        of_type.setdefault(type, []).append(node)
    nodes = next((n for n in of_type.values() if _fitting(job, n) >= job.members), next(iter(of_type.values())))
    return Wanted(job.id, job.request, (tuple(node.name for node in nodes),) * job.members, job.within == "node")


def _has_instances(job: PendingJob, node: NodeState) -> bool:
    least = job.members if job.within == "node" else 1
    return any(node.plugins.get(plugin, 0) >= least for plugin in job.plugins)


def device_type(job: PendingJob, node: NodeState) -> str | None:
    """The type of the devices that the job would use there, "" for none or any; None where it can't run."""
    if job.request.gpus <= 0:
        return ""
    known = {s.type for s in job.speeds} - {""}
    good = [d for d in node.devices if d.count >= job.request.gpus and (not d.memory_mb or d.memory_mb >= job.device_mb)
            and (not known or d.type in known)]  # fmt: skip
    if good:
        return max(good, key=lambda d: d.free).type
    return "" if not node.devices and node.capacity.gpus >= job.request.gpus else None


def _fitting(job: PendingJob, nodes: Iterable[NodeState]) -> int:
    """Members that the free devices of the nodes are enough for."""
    return sum(node.free.gpus // job.request.gpus for node in nodes) if job.request.gpus > 0 else job.members


class Account:
    """What nodes, slots and quotas have left while the answer is made: Ray's own account knows no quotas, and what is about to stop
    may have left it before it has left its node."""

    def __init__(self, state: ClusterState) -> None:
        self._nodes = {node.name: node for node in state.nodes}
        self._free = {node.name: Counter({**_amounts(node.free), **{d.type: d.free for d in node.devices}}) for node in state.nodes}
        self._slots = {node.name: Counter(node.plugins) for node in state.nodes}
        self._limits = [{name: _amounts(quota) for name, quota in state.quotas.items()},
                        {tenant.name: _amounts(tenant.nominal) for tenant in state.tenants if tenant.nominal}]  # none borrows
        self._held: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for job in state.placed:
            self.hold(job.tenant, job.request, sum(share.members for share in job.allocation or (Share(job.node),)))
        for model in state.models:
            self.hold(model.tenant, model.request, sum(share.members for share in model.allocation))

    def hold(self, tenant: str, request: Resources, members: int) -> None:
        self._held[tenant].update(_amounts(request, members))

    def over(self, job: PendingJob) -> str:
        """Why the tenant may not have the job now; "" if it may."""
        asked = _amounts(job.request, job.members)
        for limits in self._limits:
            limit = limits.get(job.tenant, {})
            for what in limit:
                if asked[what] > 0 and self._held[job.tenant][what] + asked[what] > limit[what] + TOLERANCE:
                    return f"{WAITS}tenant {job.tenant} would hold more than its {limit[what]:g} {what}"
        return ""

    def take(self, job: PendingJob, nodes: Sequence[str]) -> Decision | str:
        """The placement of its members on `nodes`, or why it can't be yet."""
        counts = Counter(nodes)
        where = ", ".join(counts)
        kept = f"{WAITS}Ray keeps room for it on {where}, "
        if not counts.keys() <= self._nodes.keys():
            return f"{kept}of which not all report"
        plugin = next((p for p in job.plugins if all(self._slots[name][p] >= k for name, k in counts.items())), "")
        if not plugin:
            return f"{kept}where every instance of {' or '.join(job.plugins)} is at work"
        types = {name: device_type(job, self._nodes[name]) or "" for name in counts}
        needs = {name: _amounts(job.request, k, types[name]) for name, k in counts.items()}
        for name, need in needs.items():
            if any(amount > self._free[name][what] + TOLERANCE for what, amount in need.items() if amount > 0):
                return f"{kept}but {name} is not free yet"
        for name, need in needs.items():
            self._free[name].subtract(need)
            self._slots[name][plugin] -= counts[name]
        shares = tuple(Share(name, k, types[name]) for name, k in counts.items())
        plain = job.members == 1 and not shares[0].type
        return Decision(job.id, "place", shares[0].node, plugin, f"Ray has placed it on {where}", 0.0, () if plain else shares)


def _amounts(request: Resources, members: int = 1, type: str = "") -> dict[str, float]:
    found = {"cores": request.cpu * members, "MiB": float(request.memory_mb * members), "GPUs": float(request.gpus * members)}
    return found | {type: found["GPUs"]} if type else found


def waits(job: PendingJob, why: str, remedy: str) -> Decision:
    return Decision(job.id, "wait", reason=why, remedy=remedy)


def answer(job: PendingJob, group: Group | None, account: Account) -> Decision:
    """What becomes of a waiting job of which Ray says `group`; None: Ray was not asked yet."""
    if group is None:
        return waits(job, f"{WAITS}others are before it in Ray's queue", "they start")
    if not group.nodes:
        why = f"{WAITS}Ray has no room for it now" if group.possible else f"{WAITS}no nodes of Ray could hold it, were they empty"
        return waits(job, why, "jobs or deployments end, or more nodes of Ray that name their kernelm node in a label")
    found = account.take(job, group.nodes)
    return found if isinstance(found, Decision) else waits(job, found, "what holds it now ends")


def stale(groups: Mapping[str, Group], wanted: Mapping[str, Wanted]) -> list[str]:
    """The groups that are to be given up: of jobs that are gone, or elsewhere than Ray has them."""
    return [id for id, group in groups.items() if id not in wanted or len(group.nodes) not in (0, len(wanted[id].nodes))
            or any(node not in allowed for node, allowed in zip(group.nodes, wanted[id].nodes, strict=False))]  # fmt: skip
