"""Goodput without regard to types: Pollux (Qiao et al., OSDI 2021, section 4.2).

Pollux maximizes the power mean with p = -1 of the jobs' speed-ups by a genetic search over placements. For numbers of devices alone
the sum over jobs can be maximized exactly, by dynamic programming, which is what is done here. All devices count as alike: a job's
speed-up is the mean over types, and it goes where it is or where most is free, as on a cluster whose types Pollux can't tell apart.
"""

from typing import Any

import numpy as np
from msgspec import Struct

from kernelm_contracts.scheduler import ClusterState, Decisions, Scheduler
from kernelm_policies import elastic
from kernelm_policies.placing import Job, Room, Target, settle, speed
from kernelm_policies.serving import beside_models
from kernelm_sdk.plugin import Plugin


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    fairness: float = -1.0  # p of the power mean
    nothing: float = 10.0  # the term of a job without devices: with p = -1 infinite, so that all get one where there are enough


class Pollux(Plugin, Scheduler):
    Settings = Settings

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        return beside_models(request, lambda state: settle(state, allocate(state, self.settings), "goodput, types alike"))


def allocate(state: ClusterState, settings: Settings) -> dict[str, Target]:
    """What each job should have: first how many, then of which type."""
    room, targets = Room(state), elastic.fixed(state)
    left = dict(room.capacity)
    jobs: list[Job] = [*state.placed, *state.pending]
    for job in jobs:
        if job.id in targets:
            type, members = targets[job.id]
            left[type] = left.get(type, 0) - members * job.request.gpus
    free = [job for job in jobs if job.id not in targets]
    for job, members in _numbers(free, sum(left.values()), state.now, room, settings):
        need, now = members * job.request.gpus, elastic.present(job)
        able = [t for t in room.types(job) if left.get(t, 0) >= need and (not job.speeds or speed(job, t, members) > 0)]
        if now and now[0] in able:
            able = [now[0]]
        if able:  # else it waits: what is left is in too small pieces
            type = max(able, key=lambda t: (left[t], t))
            targets[job.id] = (type, members)
            left[type] -= need
    return targets


def _numbers(jobs: list[Job], devices: int, now: float, room: Room, settings: Settings) -> list[tuple[Job, int]]:
    """(job, members) by dynamic programming over jobs and devices, the largest first."""
    best, chosen = np.zeros(devices + 1), []
    for job in jobs:
        options = _terms(job, now, room, settings)
        table = np.stack([np.concatenate([np.full(min(n, devices + 1), np.inf), best[: max(devices + 1 - n, 0)]]) + term
                          for n, term in options])  # fmt: skip
        pick = table.argmin(axis=0)
        best = table[pick, np.arange(devices + 1)]
        chosen.append([options[k][0] for k in pick])
    given, result = devices, []
    for job, picks in zip(reversed(jobs), reversed(chosen), strict=True):
        need = picks[given]
        given -= need
        if need:
            result.append((job, need // max(job.request.gpus, 1)))
    return sorted(result, key=lambda jn: (-jn[1], jn[0].submitted, jn[0].id))


def _terms(job: Job, now: float, room: Room, settings: Settings) -> list[tuple[int, float]]:
    """(devices, term of the sum) for every number of members, 0 first."""
    present, factor = elastic.present(job), elastic.restart_factor(job, now)
    options = [(0, settings.nothing)]
    rates: dict[int, list[float]] = {}
    for type in room.types(job):
        base = speed(job, type, job.members) or 1.0
        for (_, members), rate in [c for c in elastic.configurations(job, room) if c[0][0] == type]:
            rates.setdefault(members, []).append(rate / base)
    for members, values in sorted(rates.items()):
        gain = sum(values) / len(values) * (factor if present and members != present[1] else 1.0)
        options.append((members * job.request.gpus, max(gain, 1e-2) ** settings.fairness))
    return options
