"""Preemptive list scheduling: jobs in an order, each with the members it was submitted with, as far as the devices go."""

from collections.abc import Callable

from kernelm_contracts.scheduler import ClusterState, Decisions, PlacedJob
from kernelm_policies.placing import Job, Room, Target, current, free_to_move, settle, speed
from kernelm_policies.serving import beside_models

Rank = Callable[[Job], tuple[float, float, str]]


def decide(state: ClusterState, rank: Rank, reason: str) -> Decisions:
    """The jobs of lowest `rank` run; a placed job stays on its type as long as it may run at all."""
    return beside_models(state, lambda left: _settled(left, rank, reason))


def _settled(state: ClusterState, rank: Rank, reason: str) -> Decisions:
    room = Room(state)
    left = dict(room.capacity)
    targets: dict[str, Target] = {}
    for job in state.placed:
        if not free_to_move(job):
            _take(left, current(job), job)
    for job in sorted((j for j in (*state.placed, *state.pending) if not isinstance(j, PlacedJob) or free_to_move(j)), key=rank):
        types = room.types(job)
        if isinstance(job, PlacedJob):
            types = [current(job)[0], *(t for t in types if t != current(job)[0])]
        need = job.members * job.request.gpus
        type = next((t for t in types if left.get(t, 0) >= need or not need), None)
        if type is not None:
            targets[job.id] = (type, job.members)
            _take(left, targets[job.id], job)
    return settle(state, targets, reason)


def _take(left: dict[str, int], target: Target, job: Job) -> None:
    left[target[0]] = left.get(target[0], 0) - target[1] * job.request.gpus


def any_speeds(state: ClusterState) -> bool:
    """Whether any job tells how fast it is, which may change as it gets on."""
    return any(job.speeds for job in (*state.placed, *state.pending))


def seconds_left(job: Job) -> float:
    """Run time left with the members it was submitted with, on the type it runs on or its fastest; 0 for not known."""
    if not job.speeds:
        return job.estimate_s
    types = [current(job)[0]] if isinstance(job, PlacedJob) else [s.type for s in job.speeds]
    fastest = max(speed(job, t, job.members) for t in types)
    return job.remaining / fastest if fastest > 0 else job.estimate_s
