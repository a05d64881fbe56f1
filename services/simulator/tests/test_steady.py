"""Rounds in which a scheduler would decide nothing are left out, and nothing becomes different by it."""

import pytest

from kernelm_simulator import synthetic
from kernelm_simulator.cluster import parse
from kernelm_simulator.engine import Options, Simulation
from kernelm_simulator.schedulers import load
from kernelm_simulator.trace import TraceJob
from kernelm_simulator.work import FixedWork


@pytest.mark.parametrize("scheduler", ["fifo", "srtf", "las", "scheduler"])
@pytest.mark.parametrize(("seed", "cluster", "blind", "restart_s"), [
    (1, "2x8", False, 0.0), (2, "2x8:a,2x4:b", False, 90.0), (3, "3x4:a,1x16:b", True, 30.0), (4, "1x16", False, 30.0),
])  # fmt: skip
def test_who_says_that_it_decides_nothing_decides_nothing(
    scheduler: str, seed: int, cluster: str, blind: bool, restart_s: float
) -> None:
    made = synthetic.generate("diurnal", 25, seed, per_hour=200, elastic=False)
    jobs = [TraceJob(j.id, j.submitted, FixedWork(j.work.total, j.members, restart_s=restart_s), j.members) for j in made]
    loaded, options = load(scheduler), Options(rigid=True, remaining_known=not blind)
    every = Simulation(jobs, parse(cluster), loaded.decide, options).run()
    fewer = Simulation(jobs, parse(cluster), loaded.decide, options, loaded.steady).run()
    assert fewer.changes == every.changes
    assert len(fewer.decide_s) < len(every.decide_s)
