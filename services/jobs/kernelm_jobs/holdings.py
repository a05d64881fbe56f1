"""Who holds what, by our own account, as pure functions: the allocation of every job and of every deployment.

A job holds its request once for each of its members. A deployment that serves holds that of one instance for each one that it is
to have, and for those that are still ending: what is told to stop holds its share until it has stopped. One whose node is gone
holds nothing: `stranded`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from msgspec import Struct

from kernelm_contracts.jobs import Deployment, JobRecord
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


def stranded(deployment: Deployment, node: str, system: SystemState) -> str:
    """Why a deployment whose replicas are on `node` has none of them: what has become of the node. "" while one of them lives (it
    may outlive the node's own process), the node is there, or it is to have none."""
    if not deployment.replicas or not node or any(i.pool == deployment.pool and i.state not in GONE for i in system.instances):
        return ""
    return away(node, system)


def home(deployment: Deployment, job: JobRecord) -> str:
    """The node on which the replicas of a deployment are to be; `job` is the one that it serves for."""
    return deployment.node or job.node


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
            node = home(deployment, job)
            wanted = 0 if stranded(deployment, node, system) else deployment.replicas
        else:  # another one has taken over the name
            node = (pool in specs and specs[pool].node) or job.node
            wanted = specs[pool].instances if pool in specs and not away(node, system) else 0
        there = Counter(i.node or node for i in system.instances if i.pool == pool and i.state not in GONE)
        there[node] = max(there[node], wanted)
        shares = tuple(Share(at, count) for at, count in sorted(there.items()) if count)
        if shares or deployment:
            found.append(Held(job, shares, deployment.name if deployment else ""))
    return found
