"""What runs while a fault does: calls in an open loop, durable events, jobs. Everything is noted that somebody was promised."""

import asyncio
import random
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from chaosplugin.contract import Chaos, Effect, Tick
from chaosplugin.plugin import POISON

from faultmatrix.rig import POOL, Rig
from kernelm_contracts.jobs import JobName, JobRecord, Jobs, JobSpec
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Resources

PATIENCE_S = 40.0  # of a caller, until it gives a call or an event up as lost
JOB_S = 90.0  # the same for a job, which may have to wait for a lease to run out, twice
FINAL = ("done", "dead", "cancelled")


@dataclass
class CallRecord:
    """One call, in all its tries."""

    id: str
    hold_s: float = 0.0  # what the handler was asked to wait
    attempts: int = 0
    took_s: float = 0.0
    failure: str = ""  # "" once it was answered


@dataclass
class JobNote:
    """One job: what was asked for, and what it came to."""

    name: str
    steps: int
    poison: bool = False
    may_restart: bool = False  # from the first step: its checkpoint is damaged
    record: JobRecord | None = None
    failure: str = ""


@dataclass
class Load:
    """Load on one system for one run. `start()`, then `finish()`; then everything has its answer or is lost."""

    rig: Rig
    run: str
    rng: random.Random
    calls_per_s: float = 60.0
    events_per_s: float = 20.0
    jobs_at_once: int = 2
    steps: int = 24
    step_s: float = 0.04
    calls: list[CallRecord] = field(default_factory=list)
    acknowledged: dict[int, int] = field(default_factory=dict)  # number of an event -> its sequence in the stream
    refused: dict[int, str] = field(default_factory=dict)
    jobs: list[JobNote] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()
        self._events = 0
        self._publishing = asyncio.Lock()

    # ---- life ----

    async def start(self) -> None:
        """Begin, on connections of its own; returns when calls are answered and each job has made a step."""
        self.callers = [await self.rig.connect() for _ in range(2)]
        self.publisher = await self.rig.connect()
        works = [self._open_loop(self.calls_per_s, self._call), self._open_loop(self.events_per_s, self._event)]
        works += [self._job_loop() for _ in range(self.jobs_at_once)]
        self._loops = [asyncio.create_task(work) for work in works]

    async def finish(self) -> None:
        """Begin nothing more, and wait for all that is under way."""
        self._stop.set()
        await asyncio.gather(*self._loops)
        while self._tasks:
            await asyncio.gather(*self._tasks)
        for bus in (*self.callers, self.publisher):
            await bus.close()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _open_loop(self, per_s: float, begin: Any) -> None:
        """`begin()` at its times, however long the answers take: a closed loop would go easy on a system that stalls."""
        due = time.monotonic()
        while not self._stop.is_set():
            self.spawn(begin())
            due += self.rng.expovariate(per_s)
            await asyncio.sleep(max(due - time.monotonic(), 0.0))

    # ---- calls ----

    async def _call(self) -> None:
        hold_s = 0.15 if self.rng.random() < 0.1 else 0.0
        await self.call(hold_s=hold_s)

    async def call(self, bus: Bus | None = None, hold_s: float = 0.0) -> CallRecord:
        """One call with an effect, repeated as a caller may: under the same id, after a retriable fault of the system."""
        record = CallRecord(f"{self.run}-c{len(self.calls)}", hold_s, failure="no answer yet")
        self.calls.append(record)
        begun = time.monotonic()
        bus = bus or self.callers[len(self.calls) % len(self.callers)]
        while True:
            record.attempts += 1
            try:
                answer = await bus.call(Chaos.apply, Effect(record.id, record.attempts, hold_s), timeout_s=1.5)
                record.failure = "" if answer.id == record.id else f"the answer is {answer.id}'s"
            except Fault as fault:
                record.failure = str(fault)
                if fault.retriable and time.monotonic() - begun < PATIENCE_S:
                    await asyncio.sleep(0.05)
                    continue
            record.took_s = time.monotonic() - begun
            return record

    # ---- events ----

    async def _event(self) -> None:
        await self.event()

    async def event(self) -> int:
        """One durable event; its number."""
        n = self._events = self._events + 1
        until = time.monotonic() + PATIENCE_S
        async with self._publishing:  # as in the bus, but so that waiting for one's turn is part of one's patience
            try:
                tick = Tick(run=self.run, n=n, padding="x" * 100)
                self.acknowledged[n] = await self.publisher.publish(tick, max(until - time.monotonic(), 0.0))
            except Fault as fault:
                self.refused[n] = str(fault)
        return n

    # ---- jobs ----

    async def _job_loop(self) -> None:
        while not self._stop.is_set():
            await self.job(self.steps)

    async def job(self, steps: int, poison: bool = False, checkpoint_every: int = 6) -> JobNote:
        """Submit a job and follow it to its end."""
        note = JobNote(f"{self.run}-j{len(self.jobs)}", steps, poison, failure="no end")
        self.jobs.append(note)
        request = {"dataset": note.name, "epochs": steps, "learning_rate": self.step_s, "batch_size": checkpoint_every,
                   "base": POISON if poison else ""}  # fmt: skip
        attempts = 3 if poison else 20
        spec = JobSpec(note.name, "trainer/1.train", request, Resources(0.05, 16), plugin=POOL, attempts=attempts)
        bus, begun = self.callers[0], time.monotonic()
        try:
            record = await bus.call(Jobs.submit, spec, timeout_s=3.0, patience_s=PATIENCE_S)
            while record.state not in FINAL and time.monotonic() - begun < JOB_S:
                await asyncio.sleep(0.1)
                record = await bus.call(Jobs.get, JobName(record.id), timeout_s=2.0, patience_s=PATIENCE_S)
            note.record = record
            note.failure = "" if record.state in FINAL else f"{record.state} after {JOB_S:g} s: {record.why}"
        except Fault as fault:
            note.failure = str(fault)
        return note
