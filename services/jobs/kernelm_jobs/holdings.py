"""Who holds what, by our own account, as pure functions: the allocation of every job and of every deployment.

A job holds its request once for each of its members. A deployment that serves holds that of one instance for each one that it is
to have, and for those that are still ending: what is told to stop holds its share until it has stopped. One without a place, as its
node is gone, holds nothing: `stranded`.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from msgspec import Struct

from kernelm_contracts.deployments import Deployment
from kernelm_contracts.jobs import JobRecord
from kernelm_contracts.scheduler import Share
from kernelm_jobs.deployment import is_replica
from kernelm_jobs.states import HOLDING
from kernelm_sdk.system import Resources, SystemState

GONE = ("exited", "lost")  # states of an instance that holds nothing any more
Allocation = tuple[Share, ...]


class Held(Struct, frozen=True):
    """What a job holds; `model` is the deployment that it serves now, "" for none."""

    job: JobRecord
    shares: Allocation
    model: str = ""

    def on(self, node: str) -> Resources:
        """What it holds on a node."""
        return times(self.job.spec.resources, sum(share.members for share in self.shares if share.node == node))


def times(request: Resources, members: int) -> Resources:
    """What so many members hold together."""
    return Resources(request.cpu * members, request.memory_mb * members, request.gpus * members)


def shares_of(job: JobRecord) -> Allocation:
    """Where the members of a placed job are."""
    return job.allocation or (Share(job.node),)


def instances_of(job: JobRecord) -> tuple[str, ...]:
    """The instances that work on it, the one that leads first."""
    return job.gang or ((job.instance,) if job.instance else ())


def reserved(job: JobRecord) -> Allocation:
    """What a placed job holds, with what it will have after its next checkpoint, if that is decided."""
    most = {share.node: share for share in shares_of(job)}
    for share in job.target:
        if share.node not in most or most[share.node].members < share.members:
            most[share.node] = share
    return tuple(most.values())


def size(shares: Allocation) -> int:
    return sum(share.members for share in shares)


def serving(job: JobRecord, deployments: Mapping[str, Deployment]) -> Deployment | None:
    """The deployment that the job serves now, if it does."""
    if not is_replica(job) or not job.result:
        return None
    deployment = deployments.get(job.result["model"])
    return deployment if deployment is not None and deployment.job == job.id else None


def away(node: str, system: SystemState) -> str:
    """What has become of a node on which nothing can run now; "" while it is there. Who is silent is waited for by the kernel, for
    a lease, like any member."""
    member = next((i for i in system.instances if i.id == f"node-{node}"), None)
    if member is None:  # of the dead the kernel remembers the last ones only
        return f"node {node} is not there"
    return f"node {node} is {member.state}{': ' * bool(member.reason)}{member.reason}" if member.state in GONE else ""


def named(nodes: Collection[str]) -> str:
    """"node one", or "nodes one, two"."""
    return f"node{'s' * (len(nodes) > 1)} {', '.join(nodes)}"


def spread(shares: Iterable[Share]) -> dict[str, int]:
    """Node -> members there."""
    found = Counter[str]()
    for share in shares:
        found[share.node] += share.members
    return dict(found)


def places(deployment: Deployment, job: JobRecord) -> dict[str, int]:
    """Node -> replicas that are to be there; `job` is the one that the deployment serves for."""
    return {node or job.node: count for node, count in deployment.spread.items()}


def missed(deployment: Deployment, places: Iterable[str], system: SystemState) -> dict[str, str]:
    """Of the nodes where replicas are to be those that have none, and why: they did not get ready there, or the node is gone. None
    while one of them lives there: it may outlive the node's own process."""
    found = {}
    for node in places:
        if entry := deployment.avoid.get(node):
            found[node] = f"node {node} is avoided until {time.strftime('%H:%M:%S', time.gmtime(entry.until))} UTC: {entry.why}"
        elif not any(i.pool == deployment.pool and i.node in ("", node) and i.state not in GONE for i in system.instances):
            found |= {node: why} if (why := away(node, system)) else {}
    return found


def stranded(deployment: Deployment, places: Collection[str], system: SystemState) -> str:
    """Why a deployment has no place: none of its nodes can have a replica. "" while one can, and where it is to have none."""
    lost = missed(deployment, places, system)
    return "; ".join(lost.values()) if len(lost) == len(places) else ""


def given_up(deployment: Deployment) -> bool:
    """Whether its replicas did not get ready on the nodes where they were to be, and it has no other one yet."""
    return deployment.replicas > 0 and deployment.avoid.keys() >= deployment.spread.keys()


def avoided(deployments: Iterable[Deployment], now: float) -> dict[str, set[str]]:
    """Deployment -> nodes that it is not to be given."""
    return {d.name: {node for node, entry in d.avoid.items() if entry.until > now} for d in deployments if d.avoid}


def holdings(jobs: Iterable[JobRecord], deployments: Mapping[str, Deployment], system: SystemState) -> list[Held]:
    """What all placed and running jobs hold; those that hold nothing are left out, but for deployments."""
    specs = {pool.pool: pool for pool in system.pools if not pool.parked}
    found = []
    for job in jobs:
        if job.state not in HOLDING:
            continue
        if not is_replica(job) or not job.result:
            found.append(Held(job, reserved(job)))
            continue
        pool, deployment = job.result["pool"], serving(job, deployments)
        if deployment:
            wanted = places(deployment, job)
            gone = set(missed(deployment, wanted, system))
        else:  # another one has taken over the name
            wanted = {node or job.node: count for node, count in specs[pool].spread.items()} if pool in specs else {}
            gone = {node for node in wanted if away(node, system)}
        there = Counter(i.node or job.node for i in system.instances if i.pool == pool and i.state not in GONE)
        for node in wanted.keys() - gone:
            there[node] = max(there[node], wanted[node])
        shares = tuple(Share(at, count) for at, count in sorted(there.items()) if count)
        if shares or deployment:
            found.append(Held(job, shares, deployment.name if deployment else ""))
    return found
