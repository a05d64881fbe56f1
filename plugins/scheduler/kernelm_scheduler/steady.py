"""Until when a round decides the same, if nothing happens: what a simulation need not ask."""

from math import inf

from kernelm_contracts.scheduler import ClusterState, PendingJob, PlacedJob
from kernelm_scheduler.settings import Settings


def steady(state: ClusterState, settings: Settings) -> float:
    """Unix seconds until which nothing is decided, after a round that decided nothing, if no job comes, ends, or becomes movable.

    With time alone a waiting job comes to have a reservation (`reserve_after_s`); jobs that end before the first reservation only
    become fewer. `state.now`, that is not at all, wherever more hangs on the clock: curves (they follow the progress), deadlines,
    models, and jobs that may be stopped for others, whose order changes as they run.
    """
    jobs: list[PendingJob | PlacedJob] = [*state.pending, *state.placed]
    if state.models or settings.preemption.shorter > 0 or any(job.speeds or job.deadline for job in jobs):
        return state.now
    equals = len({job.priority for job in jobs}) < 2 and all(job.preemptible for job in state.pending) and not state.tenants
    if not equals or any(job.leaving for job in state.placed):
        return state.now
    ripe = (job.submitted + settings.reserve_after_s for job in state.pending)
    return min((moment for moment in ripe if moment > state.now), default=inf)
