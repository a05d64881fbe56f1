"""Synthetic traces: arrivals by a Poisson process, evenly or over the day; run times lognormal, sizes powers of two."""

import math
import random

from kernelm_sdk.errors import ClientFault
from kernelm_simulator.trace import TraceJob
from kernelm_simulator.work import FixedWork

DAY_S = 86400.0
SIZES, WEIGHTS = (1, 2, 4, 8, 16), (50, 20, 15, 10, 5)  # most jobs are small (Philly, figure 2)
SPREAD = 1.5  # of the logarithm of the run time: the longest hundredth takes thirty times the median
ELASTIC = 4  # an elastic job can use so many times what it asks for
SERIAL = 0.02  # part of an elastic job's time that does not shrink


def generate(shape: str, jobs: int, seed: int, per_hour: float = 20.0, median_s: float = 1800.0, tenants: int = 4,
             elastic: bool = True) -> list[TraceJob]:  # fmt: skip
    """`jobs` jobs of the shape "poisson" or "diurnal" (the rate follows the day: twice the mean at 14:00, nearly none at 2:00)."""
    if shape not in ("poisson", "diurnal"):
        raise ClientFault("unknown_trace", f"no synthetic trace {shape!r}", "poisson or diurnal")
    dice, now, found = random.Random(seed), 0.0, []
    while len(found) < jobs:
        now += dice.expovariate(2 * per_hour / 3600)  # thinning: from a process of twice the rate
        share = 0.5 if shape == "poisson" else 0.5 + 0.5 * math.sin((now / DAY_S - 8 / 24) * 2 * math.pi)
        members, seconds = dice.choices(SIZES, WEIGHTS)[0], dice.lognormvariate(math.log(median_s), SPREAD)
        tenant = f"tenant-{dice.randrange(tenants)}"
        if dice.random() >= share:
            continue
        work = FixedWork(seconds, members, serial=SERIAL if elastic else 0.0, restart_s=30.0)
        found.append(TraceJob(f"job-{len(found)}", now, work, members, members * ELASTIC if elastic else 0, tenant))
    return found
