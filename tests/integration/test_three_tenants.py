"""Three tenants on one node, through a real broker, kernel and job service: a served model whose load rises and falls, and training
jobs of two tenants. Quotas hold at every moment, the model keeps its objective, every job is done, and nothing is lost.

What they do is a matter of time alone (a call occupies its replica, a training takes its steps), so that a busy machine spoils
nothing; `make bench-tenants` does the same with real models and real training. With PICTURE=<file.png> the schedule is drawn.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm.testing.node import InlineNode
from kernelm_cli.timeline import draw, lanes
from kernelm_contracts.deployments import DEPLOY, Deployment
from kernelm_contracts.jobs import JobList, JobQuery, JobRecord, Jobs, JobSpec
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, ServedModel, Server
from kernelm_contracts.trainer import Scores, Trained, Trainer, TrainRequest
from kernelm_scheduler.plugin import SchedulerPlugin
from kernelm_sdk.errors import Fault
from kernelm_sdk.events import received
from kernelm_sdk.plugin import Call, Job, Manifest, Plugin
from kernelm_sdk.system import PoolSpec, Resources

pytestmark = pytest.mark.slow
CORES = 4.0
CALL_S = 0.1  # one call of one replica, which answers 10 calls/s
OBJECTIVE_MS = 2000.0
STEPS, STEP_S, CHECKPOINT_STEPS = 120, 0.05, 6
TENANTS = """
load_every_s = 0.3
load_window_s = 1.5
preempt_after_s = 10.0
[[tenants]]
name = "shop"
cohort = "all"
nominal = { cpu = 2.0, memory_mb = 4000 }
[[tenants]]
name = "lab"
cohort = "all"
nominal = { cpu = 1.5, memory_mb = 3000 }
[[tenants]]
name = "course"
cohort = "all"
nominal = { cpu = 0.5, memory_mb = 1000 }
borrowing = { cpu = 1.5, memory_mb = 3000 }
"""
SCHEDULER = {"preemption": {"rest_s": 1.0, "most": 100},
             "serving": {"down_after_s": 2.0, "drain_s": 1.0, "settle_s": 2.0}}  # fmt: skip
SETTINGS = {"shop": 99.0, "lab": 99.0, "course": 2.0}  # most cores that a tenant may ever hold: nominal and borrowing


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: ServedModel | None = None


class Clerk(Plugin, Server):
    """One call at a time, each of which takes CALL_S."""

    Settings = ServerSettings

    async def on_start(self) -> None:
        self._turn = asyncio.Lock()

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,) if self.settings.model else ()

    async def classify(self, request: ClassifyRequest, call: Call) -> ClassifyReply:
        async with self._turn:
            await asyncio.sleep(CALL_S)
        served = self.settings.model
        return ClassifyReply(served.name, served.generation, served.artifact, (), 0, CALL_S * 1e3)


class Stepper(Plugin, Trainer):
    """Trains STEPS steps and goes on where the last checkpoint was; what it did is written down."""

    steps: Counter[str] = Counter()  # job's name -> steps, repeated ones among them
    at: dict[str, int] = {}  # checkpoint -> step

    async def train(self, request: TrainRequest, job: Job) -> Trained:
        for step in range(self.at.get(job.checkpoint, 0), STEPS):
            await asyncio.sleep(STEP_S)
            self.steps[job.name] += 1
            job.progress((step + 1) / STEPS, "train")
            if (step + 1) % CHECKPOINT_STEPS == 0 and step + 1 < STEPS:
                digest = f"sha256:{job.id}-{job.epoch}-{step + 1}"
                self.at[digest] = step + 1
                await job.report(digest)
        return Trained("m", "encoder", "adamw", 1, Scores("validation", 1, 1.0, 1.0, 1.0))


def manifest(name: str, contract: str, **more) -> Manifest:
    return Manifest(name, "1", "for this test", (contract,), "test_three_tenants:X", default=False, **more)


PLUGINS = {"scheduler": (manifest("scheduler", "scheduler/1"), SchedulerPlugin),
           "trainer": (manifest("trainer", "trainer/1", max_jobs=16), Stepper),
           "encoder": (manifest("encoder", "server/1"), Clerk)}  # fmt: skip


@pytest.fixture
async def system() -> AsyncIterator[System]:
    Stepper.steps, Stepper.at = Counter(), {}
    async with System(manifests={name: m for name, (m, _) in PLUGINS.items()}) as system:
        (system.home / "jobs.toml").write_text(TENANTS)
        node: InlineNode = await system.node(PLUGINS, "node-local")
        node.capacity = Resources(CORES, 8000)
        await system.service("jobs")
        await system.pool(PoolSpec("scheduler", "scheduler", settings=SCHEDULER))
        await system.pool(PoolSpec("trainer", "trainer"))
        yield system


class Load:
    """Calls at a rate that may change, whether or not answers come (open loop); a latency counts from when a call was due."""

    def __init__(self, system: System) -> None:
        self.bus, self.rate, self.faults = system.admin, 2.0, list[Fault]()
        self.took: list[tuple[float, float]] = []  # (due, seconds)
        self.rates: list[tuple[float, float]] = []  # (due, calls/s)
        self._calls: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        due = time.monotonic()
        while True:
            self.rates.append((due, self.rate))
            due += 1.0 / self.rate
            await asyncio.sleep(max(due - time.monotonic(), 0.0))
            task = asyncio.create_task(self._call(due))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _call(self, due: float) -> None:
        try:
            await self.bus.call(Server.classify, ClassifyRequest(("text",)), model="news", timeout_s=60.0)
            self.took.append((due, time.monotonic() - due))
        except Fault as fault:
            self.faults.append(fault)

    async def settled(self) -> None:
        if self._calls:
            await asyncio.wait(self._calls)

    def recent_ms(self, seconds: float) -> float:
        """The longest latency of what was answered lately."""
        now = time.monotonic()
        return 1e3 * max((took for due, took in self.took if due + took > now - seconds), default=60.0)

    def p99_ms(self, begin: float, end: float) -> float:
        found = sorted(took for due, took in self.took if begin <= due < end)
        assert len(found) > 20
        return 1e3 * found[int(0.99 * len(found))]


class Account:
    """Looks again and again at who holds what by the records; every moment counts."""

    def __init__(self, system: System) -> None:
        self.bus = system.admin
        self.deployments = self.bus.bucket("deployments", Deployment)
        self.most: Counter[str] = Counter()  # tenant -> most cores at any look
        self.total, self.replicas, self.looks = 0.0, list[int](), 0

    async def jobs(self) -> list[JobRecord]:
        found: JobList = await self.bus.call(Jobs.find, JobQuery(limit=1000))
        return list(found.jobs)

    async def run(self) -> None:
        while True:
            held: Counter[str] = Counter()
            for job in await self.jobs():
                if job.state in ("placed", "running") and job.spec.uses != DEPLOY:
                    held[job.spec.tenant] += job.spec.resources.cpu
            model, _ = await self.deployments.get("model.news")
            replicas = model.replicas if model else 0
            held["shop"] += replicas * 1.0
            self.replicas.append(replicas)
            self.looks += 1
            self.total = max(self.total, sum(held.values()))
            for tenant, cores in held.items():
                self.most[tenant] = max(self.most[tenant], cores)
            await asyncio.sleep(0.1)


async def submit(system: System, tenant: str, name: str, cpu: float, **more) -> JobRecord:
    spec = JobSpec(name, "trainer/1.train", {"dataset": "d", "seed": len(name) * 1000 + sum(name.encode())}, Resources(cpu, 100),
                   tenant=tenant, estimate_s=STEPS * STEP_S, **more)  # fmt: skip
    job: JobRecord = await system.admin.call(Jobs.submit, spec)
    return job


async def picture(system: System, load: Load, path: Path) -> None:
    """The events of the job table, drawn."""
    found = []
    for pattern in ("evt.job.state.jobs", "evt.model.scaled.jobs"):
        async for number, subject, body, headers in system.admin.read("EVT", pattern):
            event = received(subject, body, headers, number)
            found.append((datetime.fromisoformat(event.time).timestamp(), event.event))
    shift, latency = time.time() - time.monotonic(), {}
    for due, took in load.took:
        latency.setdefault(due + shift - (due + shift) % 1.0, []).append(took * 1e3)
    curves = [("calls/s", [(due + shift, rate) for due, rate in load.rates]),
              (f"slowest call, ms\n(within {OBJECTIVE_MS:g})", [(at, max(ms)) for at, ms in sorted(latency.items())])]  # fmt: skip
    draw(path, lanes(sorted(found, key=lambda f: f[0]), time.time()), CORES, curves, "a model (shop) and two tenants' training")


async def test_quotas_objective_and_jobs_through_a_day(system: System) -> None:
    model = {"name": "news", "model": "sha256:" + "a" * 64, "maximum": 3, "objective_ms": OBJECTIVE_MS}
    deploy = JobSpec("deploy", DEPLOY, model, Resources(1.0, 500), tenant="shop")
    replica: JobRecord = await system.admin.call(Jobs.submit, deploy)
    account, load = Account(system), Load(system)

    async def replicas(count: int) -> bool:
        ready = [i for i in (await system.state()).instances if "news" in i.models and i.state == "ready"]
        return len(ready) == count

    await until(lambda: replicas(1), 30.0, "the model")
    tasks = [asyncio.create_task(account.run())]
    # night: few calls; training takes what is left
    tasks.append(asyncio.create_task(load.run()))
    jobs = [await submit(system, "lab", f"lab-{i}", 1.0) for i in range(4)]
    jobs += [await submit(system, "course", f"course-{i}", 0.5, preemptible=True) for i in range(5)]
    try:
        await until(lambda: account.most["lab"] >= 2.0, 20.0, "the lab to borrow at night")
        # morning: the model needs three replicas, and takes back what its tenant has lent
        load.rate = 21.0
        await until(lambda: replicas(3), 40.0, "three replicas")
        await until(lambda: load.recent_ms(1.0) <= OBJECTIVE_MS, 30.0, "the queue of the time before to be worked off")
        begin = time.monotonic()
        await asyncio.sleep(5.0)
        busy = load.p99_ms(begin, time.monotonic() - OBJECTIVE_MS / 1e3)
        # night again
        load.rate = 2.0
        await until(lambda: replicas(1), 30.0, "one replica")

        async def all_done() -> bool:
            states = {job.id: job.state for job in await account.jobs()}
            assert "dead" not in states.values()
            return all(states[job.id] == "done" for job in jobs)

        await until(all_done, 60.0, "all jobs")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await load.settled()
    if path := os.environ.get("PICTURE"):
        await picture(system, load, Path(path))

    assert not load.faults  # nothing was lost
    assert busy <= OBJECTIVE_MS
    assert account.looks > 100
    assert account.total <= CORES + 1e-6
    for tenant, most in SETTINGS.items():
        assert account.most[tenant] <= most + 1e-6, tenant
    done = {job.id: job for job in await account.jobs()}
    gave_way = [job for job in (done[j.id] for j in jobs) if job.preemptions]
    assert gave_way  # in the morning somebody did
    assert all(job.attempt == 0 for job in done.values())
    for job in gave_way:  # it went on from its checkpoint: at most the steps since the last one were done again
        assert Stepper.steps[job.spec.name] <= STEPS + job.preemptions * CHECKPOINT_STEPS
    assert done[replica.id].state == "running"
    assert max(account.replicas) == 3
