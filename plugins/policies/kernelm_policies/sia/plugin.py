"""Goodput over unlike accelerators: Sia (Jayaram Subramanya et al., SOSP 2023, section 3.4).

Each round every job gets one configuration (type, number) or none, so that the sum over jobs of (goodput / the job's least goodput)
to the power p, plus a penalty for each job that gets nothing, is least: an integer program. Another configuration than the
present one counts less by the restart factor; jobs that restart now are left alone. Parameters are those of the paper.
Where the paper learns throughput while jobs run and lets a job grow to twice its size at most, the curves are given here.
"""

from typing import Any

from msgspec import Struct

from kernelm_contracts.scheduler import ClusterState, Decisions, Scheduler
from kernelm_policies import elastic
from kernelm_policies.placing import Job, Room, Target, settle
from kernelm_policies.serving import beside_models
from kernelm_sdk.plugin import Plugin


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    fairness: float = -0.5  # p: the lower, the more a slow job counts
    nothing: float = 1.1  # penalty for a job without devices
    gap: float = 1e-4  # relative distance from the optimum at which the solver may stop
    solver_s: float = 10.0  # most time it may take


class Sia(Plugin, Scheduler):
    Settings = Settings

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        return beside_models(request, lambda state: settle(state, allocate(state, self.settings), "goodput over all types"))


def allocate(state: ClusterState, settings: Settings) -> dict[str, Target]:
    """What each job should have."""
    room = Room(state)
    return elastic.best(state, room, lambda job: [(t, settings.nothing - cost) for t, cost in valued(job, state, room, settings)],
                        settings.gap, settings.solver_s)  # fmt: skip


def valued(job: Job, state: ClusterState, room: Room, settings: Settings) -> list[tuple[Target, float]]:
    """(configuration, its term of the sum): 1 for the slowest, less for faster ones."""
    found = elastic.configurations(job, room)
    if not found:
        return []
    least = min(rate for _, rate in found)
    factor, now = elastic.restart_factor(job, state.now), elastic.present(job)
    return [(t, max(rate / least * (factor if now and t != now else 1.0), 1e-4) ** settings.fairness) for t, rate in found]
