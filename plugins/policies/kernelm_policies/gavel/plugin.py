"""Max-min fairness over unlike accelerators: Gavel (Narayanan et al., OSDI 2020, sections 4.1 and 5).

The allocation X[job, type], shares of time, maximizes the least throughput over all jobs, each relative to what an equal share of
every type would give it (a linear program). Rounds approach X: the jobs go first that have had least of what X gives them. Gavel
keeps the time each job had on each type; a pure function of the state knows only the device seconds a job has had in all, so the
priority here is X[job, type] over the job's share of its life that it has run.
"""

from typing import Any

import numpy as np
from msgspec import Struct
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack

from kernelm_contracts.scheduler import ClusterState, Decisions, Scheduler
from kernelm_policies.placing import Job, Room, Target, current, free_to_move, settle, speed
from kernelm_policies.serving import beside_models
from kernelm_sdk.plugin import Plugin


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    round_s: float = 360.0  # a placed job keeps its devices so long, as in the paper


class Gavel(Plugin, Scheduler):
    Settings = Settings
    resizes = False

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        return beside_models(request, lambda state: decide(state, self.settings))


def decide(state: ClusterState, settings: Settings) -> Decisions:
    room = Room(state)
    jobs: list[Job] = [*state.placed, *state.pending]
    types = sorted(room.capacity) or [""]
    left = dict(room.capacity)
    targets: dict[str, Target] = {}
    for job in state.placed:
        if not free_to_move(job) or state.now - job.started < settings.round_s:
            targets[job.id] = current(job)
            left[current(job)[0]] = left.get(current(job)[0], 0) - current(job)[1] * job.request.gpus
    shares = allocate(jobs, types, room)
    order = sorted(((-shares[i, k] / _had(job, state.now), job.submitted, job.id, i, k) for i, job in enumerate(jobs)
                    for k in range(len(types)) if job.id not in targets and shares[i, k] > 1e-6))  # fmt: skip
    for *_, i, k in order:
        job, need = jobs[i], jobs[i].members * jobs[i].request.gpus
        if job.id not in targets and left.get(types[k], 0) >= need:
            targets[job.id] = (types[k], job.members)
            left[types[k]] = left.get(types[k], 0) - need
    return settle(state, targets, "max-min fairness")


def allocate(jobs: list[Job], types: list[str], room: Room) -> np.ndarray:
    """X: jobs x types, shares of time between 0 and 1. A job without a curve runs equally fast everywhere."""
    if not jobs:
        return np.zeros((0, len(types)))
    capacity = np.array([float(room.capacity.get(t, 0)) for t in types])
    rate = np.array([[speed(j, t, j.members) if j.speeds else 1.0 for t in types] for j in jobs])
    need = np.array([[float(j.members * j.request.gpus)] for j in jobs])
    rate[(need > capacity[None, :])] = 0.0
    even = (rate * (capacity / max(capacity.sum(), 1.0))).sum(axis=1, keepdims=True)
    rate = np.divide(rate, even, out=np.zeros_like(rate), where=even > 0)
    n, m = rate.shape
    able = np.flatnonzero(even[:, 0] > 0)  # a job that runs nowhere must not hold the others at nothing
    if not len(able):
        return np.zeros((n, m))
    x = np.arange(n * m).reshape(n, m)
    time = coo_array((np.ones(n * m), (np.repeat(np.arange(n), m), x.ravel())), shape=(n, n * m + 1))
    room_of = coo_array((np.repeat(need[:, 0], m), (np.tile(np.arange(m), n), x.ravel())), shape=(m, n * m + 1))
    rows = np.repeat(np.arange(len(able)), m)
    columns = np.concatenate([x[able].ravel(), np.full(len(able), n * m)])
    rows = np.concatenate([rows, np.arange(len(able))])
    worst = coo_array((np.concatenate([-rate[able].ravel(), np.ones(len(able))]), (rows, columns)), shape=(len(able), n * m + 1))
    gain = np.concatenate([-1e-4 * rate.ravel() / (n * m), [-1.0]])  # what is left over goes where it is of most use
    found = linprog(gain, vstack([time, room_of, worst]).tocsr(), np.concatenate([np.ones(n), capacity, np.zeros(len(able))]),
                    bounds=[*((0.0, 1.0 if r > 0 else 0.0) for r in rate.ravel()), (0.0, None)], method="highs")  # fmt: skip
    if found.x is None:
        raise ArithmeticError(f"the linear program of {n} jobs and {m} types: {found.message}")
    return found.x[:-1].reshape(n, m)


def _had(job: Job, now: float) -> float:
    """The share of its life that a job has run, a little above 0."""
    devices = max(1, job.members * job.request.gpus)
    return job.served_s / devices / max(now - job.submitted, 1.0) + 1e-3
