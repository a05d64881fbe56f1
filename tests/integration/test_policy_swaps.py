"""The scheduler is replaced while jobs run and wait: the default one by policies of the literature, each in a process of its own
that the real node starts, and back. Nothing is lost, nothing is done twice, and who decides shows in the reasons."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_contracts.jobs import JobChanged, JobList, JobQuery, JobRecord, Jobs, JobSpec
from kernelm_contracts.trainer import Scores, Trained, Trainer, TrainRequest
from kernelm_sdk.events import Received
from kernelm_sdk.plugin import Job, Manifest, Plugin, find_manifests
from kernelm_sdk.system import Bounds, Kernel, LoadRequest, PoolSpec, Resources, SystemState

pytestmark = pytest.mark.slow
ORDER = ("fifo", "las", "srtf", "scheduler")  # the last one is the default again
SLOTS, JOBS = 3, 24


class Stepper(Plugin, Trainer):
    """Works for a while, and writes down what it did."""

    done: Counter[str] = Counter()

    async def train(self, request: TrainRequest, job: Job) -> Trained:
        for step in range(10):
            await asyncio.sleep(0.1)
            job.progress((step + 1) / 10, "train")
        self.done[job.name] += 1
        return Trained("m", "encoder", "adamw", 1, Scores("validation", 1, 1.0, 1.0, 1.0))


TRAINER = Manifest("trainer", "1", "for this test", ("trainer/1",), "test_policy_swaps:Stepper", default=False, max_jobs=SLOTS)


@pytest.fixture
async def system() -> AsyncIterator[System]:
    Stepper.done = Counter()
    installed, _ = find_manifests()
    manifests = {"trainer": TRAINER, **{name: msgspec.structs.replace(installed[name], default=False) for name in ORDER}}
    async with System(manifests=manifests) as system:
        await system.service("node")
        await system.node({"trainer": (TRAINER, Stepper)}, "node-steps")
        await system.service("jobs")
        await system.pool(PoolSpec("scheduler", "scheduler", node="local", runtime="process"))
        await system.pool(PoolSpec("trainer", "trainer", node="steps"))
        yield system


async def jobs(system: System) -> list[JobRecord]:
    found: JobList = await system.admin.call(Jobs.find, JobQuery(limit=1000))
    return list(found.jobs)


async def replace(system: System, plugin: str) -> SystemState:
    """As `kernelm plugin replace scheduler/1 PLUGIN`; returns when all calls go to it and the one before is gone."""
    request = LoadRequest(plugin, replaces="scheduler/1", runtime="process", bounds=Bounds(watch_s=0.5), why="a test")
    swap = await system.admin.call(Kernel.load, request)

    async def over() -> SystemState | None:
        state = await system.state()
        now = next(s for s in state.swaps if s.id == swap.id)
        assert now.phase not in ("failed", "rolled_back"), now.outcome
        return state if now.phase == "done" else None

    state: SystemState = await until(over, 60.0, f"the swap to {plugin}")
    return state


async def test_policies_take_over_from_each_other_while_jobs_run(system: System) -> None:
    states: dict[str, list[str]] = {}
    reasons: set[str] = set()

    async def note(received: Received) -> None:
        event = received.event
        assert isinstance(event, JobChanged)
        states.setdefault(event.job, []).append(event.state)
        if event.state == "placed":
            reasons.add(event.why)

    await system.admin.follow(note, "evt.job.state.jobs")
    for number in range(JOBS):
        spec = JobSpec(f"job-{number}", "trainer/1.train", {"dataset": "d", "seed": number}, Resources(0.5, 50),
                       estimate_s=1.0 + number)  # fmt: skip
        await system.admin.call(Jobs.submit, spec)
    for serving in ORDER:
        state = await replace(system, serving)
        route = next(r for r in state.routes if r.name == "scheduler/1")
        assert [next(p.plugin for p in state.pools if p.pool == d.pool) for d in route.to] == [serving]
        before = Stepper.done.total()
        if before < JOBS:
            await until(lambda before=before: Stepper.done.total() > before, 30.0, f"{serving} to place a job")

    async def all_done() -> bool:
        return all(job.state == "done" for job in await jobs(system))

    await until(all_done, 60.0, "all jobs")
    found = await jobs(system)
    assert len(found) == JOBS
    assert all((job.attempt, job.epoch) == (0, 1) for job in found if not job.preemptions), "placed once each"
    assert set(Stepper.done) == {f"job-{n}" for n in range(JOBS)}
    assert all(count == 1 for count in Stepper.done.values())  # nothing was done twice
    await until(lambda: all(seen[-1] == "done" for seen in states.values()), 30.0, "the last events, which follow the records")
    assert all(seen[0] == "queued" and "dead" not in seen for seen in states.values())
    for words in ("packing", "the oldest that waits", "least attained service", "shortest remaining time"):
        assert any(words in reason for reason in reasons), f"{words}: none of {reasons}"
