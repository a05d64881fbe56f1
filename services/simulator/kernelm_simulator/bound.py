"""A clairvoyant lower bound of the average completion time: no scheduler, whatever it knows, can be better.

The whole cluster becomes one machine. Prices of the device types, such that all devices together cost 1, make a job's work its
cheapest cost from beginning to end (for each stage the configuration of least price times time); the machine does one unit of it
a second.
In any schedule the mean moment at which job j's work is done, M_j, and its end satisfy C_j >= M_j + T_j / 2, where T_j is the job's
run time in its fastest configuration, since it can't do its work faster than evenly over T_j. The least sum of the M_j on the one
machine is had by always working on the job of least total work (preemptive; Goemans et al., SIAM J. Discrete Math. 15, 2002, mean
busy times). Each choice of prices gives a valid bound; the best of a search is returned. A job can't do any work before the first
round after its submission and its first start. Placements on more nodes than needed count as no faster than packed ones.
"""

import math
from heapq import heappop, heappush

import numpy as np
from msgspec import Struct

from kernelm_simulator.cluster import Cluster
from kernelm_simulator.engine import ROUND_S
from kernelm_simulator.run import Run
from kernelm_simulator.trace import TraceJob

SEARCH = 8  # steps of halved length in the search for prices


class Costs(Struct):
    """What one job's work costs."""

    device_s: np.ndarray  # stage x configuration: devices times seconds
    types: np.ndarray  # configuration -> index of its type
    release: float  # earliest begin of work
    fastest: float  # seconds of work in all


def least_average(jobs: list[TraceJob], cluster: Cluster, round_s: float = ROUND_S, rigid: bool = False) -> float:
    """Seconds; 0.0 without jobs that can run."""
    types = sorted(cluster.types)
    costs = [c for job in jobs if (c := _costs(job, cluster, types, round_s, rigid)) is not None]
    submitted = sum(job.submitted for job in jobs)
    if not costs or len(costs) < len(jobs):
        return 0.0
    return max(0.0, (_best(costs, np.array([float(cluster.types[t]) for t in types])) - submitted) / len(jobs))


def _costs(job: TraceJob, cluster: Cluster, types: list[str], round_s: float, rigid: bool) -> Costs | None:
    run = Run(job, cluster, rigid)
    tables, of_type = [], []
    for type in types:
        counts = [run.members] if not run.elastic else range(1, min(run.most, cluster.types[type]) + 1)
        for members in counts:
            placement = cluster.packed(type, members)
            if placement and run.work.fits(type, placement):
                tables.append((members, np.diff(run.work.pace(type, placement).times)))
                of_type.append(types.index(type))
    if not tables:
        return None
    seconds = np.stack([times for _, times in tables], axis=1)
    release = math.ceil(job.submitted / round_s - 1e-9) * round_s + run.work.restart_s
    return Costs(seconds * np.array([float(n) for n, _ in tables]), np.array(of_type), release, float(seconds.min(axis=1).sum()))


def _best(costs: list[Costs], counts: np.ndarray) -> float:
    """The largest bound over prices, by coordinate search: any prices are valid, so where the search stops does not matter."""
    prices = np.full(len(counts), 1.0 / counts.sum())
    best = _sum(costs, prices)
    step = 2.0
    for _ in range(SEARCH):
        for k in range(len(counts)):
            for factor in (step, 1 / step):
                tried = prices.copy()
                tried[k] *= factor
                tried /= tried @ counts
                if (value := _sum(costs, tried)) > best:
                    best, prices = value, tried
        step = math.sqrt(step)
    return best


def _sum(costs: list[Costs], prices: np.ndarray) -> float:
    """The bound of the sum of all end times at `prices` of one device of each type."""
    work = [float((c.device_s * prices[c.types]).min(axis=1).sum()) for c in costs]
    order = sorted(range(len(costs)), key=lambda i: costs[i].release)
    ready: list[tuple[float, int]] = []
    left, total, now, k = list(work), 0.0, 0.0, 0
    while k < len(order) or ready:
        if not ready:
            now = max(now, costs[order[k]].release)
        while k < len(order) and costs[order[k]].release <= now:
            heappush(ready, (work[order[k]], order[k]))
            k += 1
        until = costs[order[k]].release if k < len(order) else math.inf
        i = ready[0][1]
        done = min(left[i], until - now)
        total += (now + done / 2) * done / work[i] if work[i] > 0 else 0.0
        left[i] -= done
        now += done
        if left[i] <= 1e-9 * work[i]:
            heappop(ready)
    return total + sum(c.fastest for c in costs) / 2
