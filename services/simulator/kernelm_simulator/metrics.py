"""What a simulation says of its scheduler."""

from bisect import bisect_left, bisect_right

import numpy as np
from msgspec import Struct

from kernelm_simulator.cluster import Cluster
from kernelm_simulator.engine import Result
from kernelm_simulator.run import Run


class Summary(Struct, frozen=True):
    """Times in seconds. `rho` is the finish-time fairness ratio (Themis, Mahajan et al., NSDI 2020): the time a job took over what
    it would have taken alone on an equal share of the cluster, with as many jobs as were there on average while it was."""

    scheduler: str
    jobs: int
    rejected: int
    average: float  # completion time: from submission to the end
    median: float
    p99: float
    makespan: float
    rho_worst: float
    rho_unfair: float  # part of the jobs with rho above 1
    utilization: float  # devices held, of all, until the last job ends
    restarting: float  # part of that in which jobs started or restarted
    restarts: float  # a job, without its first start
    rounds: int
    decide_ms: float  # mean
    decide_p99_ms: float


def summarize(scheduler: str, result: Result, cluster: Cluster) -> Summary:
    """The figures of one simulation; of no finished job all are 0."""
    done = [run for run in result.runs if run.finished >= 0]
    times = np.array([run.finished - run.job.submitted for run in done]) if done else np.zeros(1)
    rho = np.array(fairness(result.runs, cluster)) if done else np.zeros(1)
    held = sum(run.served_s for run in result.runs)
    decided = np.array(result.decide_s) * 1e3 if result.decide_s else np.zeros(1)
    capacity = cluster.devices * max(result.makespan, 1e-9)
    return Summary(
        scheduler, len(done), sum(bool(run.rejected) for run in result.runs), *map(float, (
            times.mean(), np.median(times), np.percentile(times, 99), result.makespan, rho.max(), (rho > 1).mean(), held / capacity,
            sum(run.restarting_s for run in result.runs) / max(held, 1e-9))),
        sum(run.preemptions for run in result.runs) / max(len(done), 1), len(result.decide_s),
        float(decided.mean()), float(np.percentile(decided, 99)),
    )  # fmt: skip


def fairness(runs: list[Run], cluster: Cluster) -> list[float]:
    """rho of every job that has finished, in the order of `runs`."""
    done = [run for run in runs if run.finished >= 0]
    begins = sorted(run.job.submitted for run in done)
    ends = sorted(run.finished for run in done)
    before = [np.concatenate([[0.0], np.cumsum(moments)]) for moments in (begins, ends)]

    def present(until: float) -> float:
        """Job seconds until a moment: the area below the number of jobs that are there."""
        b, e = bisect_right(begins, until), bisect_left(ends, until)
        return float(until * b - before[0][b] - (until * e - before[1][e]))

    ratios = []
    for run in done:
        took = run.finished - run.job.submitted
        others = max(1.0, (present(run.finished) - present(run.job.submitted)) / max(took, 1e-9))
        ratios.append(took / alone(run, cluster, others))
    return ratios


def alone(run: Run, cluster: Cluster, sharers: float) -> float:
    """Seconds the job takes alone on 1/`sharers` of each type, on the type that is best for it; of less than the devices it needs
    it has a share of the time."""
    elastic, best = run.job.most > 0, float("inf")
    work, least = run.job.work, 1 if run.job.most > 0 else run.job.members
    for type in run.types:
        share = cluster.types[type] / sharers
        members = max(least, min(int(share), run.job.most)) if elastic else least
        while members >= least:
            placement = cluster.packed(type, members)
            if placement and work.fits(type, placement):
                best = min(best, work.pace(type, placement).total * max(1.0, members / share))
                break
            members -= 1
    return best + work.restart_s
