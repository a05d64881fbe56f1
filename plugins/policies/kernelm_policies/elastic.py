"""What the policies for elastic jobs share: configurations, what a restart costs, and the integer program over both."""

from collections.abc import Callable

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from kernelm_contracts.scheduler import ClusterState, PlacedJob
from kernelm_policies.placing import Job, Room, Target, current, free_to_move, speed


def most(job: Job) -> int:
    """Members it can use."""
    return max(job.members, job.most)


def sizes(room: Room, type: str) -> list[int]:
    """Numbers of devices worth considering: powers of two within a node, whole nodes beyond (Sia, section 3.3). Jobs of these sizes
    always fit without being split."""
    node = max((b.total.get(type, 0) for b in room.bins.values()), default=0)
    powers = [2**i for i in range(node.bit_length()) if 2**i < node]
    return [*powers, *range(node, room.capacity.get(type, 0) + 1, node)] if node else []


def configurations(job: Job, room: Room) -> list[tuple[Target, float]]:
    """((type, members), speed) of all the job may have; a job that is not elastic has one for each type."""
    found = []
    for type in room.types(job):
        counts = sizes(room, type) if job.most > job.members else [job.members]
        for members in counts:
            rate = speed(job, type, members) if job.speeds else 1.0
            if job.members <= members <= most(job) and members * job.request.gpus <= room.capacity.get(type, 0) and rate > 0:
                found.append(((type, members), rate))
    return found


def restart_factor(job: Job, now: float) -> float:
    """What another configuration is worth beside the present one: the share of its life that a job does not spend on restarts,
    if it is restarted once more (Pollux, section 4.2.2; Sia, section 3.4)."""
    age, cost = now - job.submitted, job.restart_s
    return 1.0 if age <= cost else max(age - job.preemptions * cost, 0.0) / (age + cost)


def fixed(state: ClusterState) -> dict[str, Target]:
    """What can't be moved now."""
    return {job.id: current(job) for job in state.placed if not free_to_move(job)}


def present(job: Job) -> Target | None:
    return current(job) if isinstance(job, PlacedJob) else None


def best(state: ClusterState, room: Room, worth: Callable[[Job], list[tuple[Target, float]]], gap: float,
         limit_s: float) -> dict[str, Target]:  # fmt: skip
    """At most one configuration for each job, so that the sum of their `worth` is largest and no type is oversubscribed: an integer
    program, solved by HiGHS to a relative `gap`, in `limit_s` seconds at most. What can't be moved stays."""
    targets, left = fixed(state), dict(room.capacity)
    jobs: list[Job] = [*state.placed, *state.pending]
    for job in jobs:
        if job.id in targets:
            type, members = targets[job.id]
            left[type] = left.get(type, 0) - members * job.request.gpus
    choices = [(i, target, value) for i, job in enumerate(jobs) if job.id not in targets for target, value in worth(job)
               if value > 0 and target[1] * job.request.gpus <= left.get(target[0], 0)]  # fmt: skip
    if not choices:
        return targets
    types, columns = sorted(left), np.arange(len(choices))
    once = coo_array((np.ones(len(choices)), ([i for i, *_ in choices], columns)), shape=(len(jobs), len(choices)))
    needs, rows = [float(t[1] * jobs[i].request.gpus) for i, t, _ in choices], [types.index(t[0]) for _, t, _ in choices]
    taken = coo_array((needs, (rows, columns)), shape=(len(types), len(choices)))
    values = np.array([value for *_, value in choices])
    found = milp(-values / values.max(), integrality=np.ones(len(choices)), bounds=Bounds(0, 1),
                 constraints=[LinearConstraint(once, ub=1.0), LinearConstraint(taken, ub=[float(left[t]) for t in types])],
                 options={"mip_rel_gap": gap, "time_limit": limit_s})  # fmt: skip
    if found.x is None:
        raise ArithmeticError(f"the integer program of {len(choices)} configurations: {found.message}")
    return targets | {jobs[i].id: target for (i, target, _), x in zip(choices, found.x, strict=True) if x > 0.5}
