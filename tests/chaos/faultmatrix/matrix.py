"""Plays the matrix: plans the runs, keeps a system for those that leave it whole, measures, judges."""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from faultmatrix import messages, processes, storage, world  # noqa: F401 - they enter their faults
from faultmatrix.load import Load
from faultmatrix.rig import Rig
from faultmatrix.stage import FAULTS, Fault, Stage, missing
from faultmatrix.verdict import judge
from kernelm.testing.harness import until
from kernelm_cli.home import read_up
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault as KernelmFault
from kernelm_sdk.system import Empty, Kernel, Node

WARM_S, AFTER_S = 0.8, 0.4  # of load before the fault and after the recovery
LIFE = 25  # runs of one system, then a new one: restarts that a launcher counts must not add up


@dataclass
class Outcome:
    """One run. `complaints`: what else went wrong than a loss or a duplicate."""

    fault: str
    seed: int
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    recovery_s: float | None = None
    note: str = ""
    skipped: str = ""
    took_s: float = 0.0
    promises: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not (self.lost or self.duplicated or self.complaints)


def plan(runs: int, seed: int, only: str = "", short: bool = False) -> list[Fault]:
    """`runs` runs by the faults' shares, each fault at least once, in an order that `seed` fixes; those that destroy their
    system come last."""
    chosen = [f for f in FAULTS.values() if only in f.name and (f.short or not short)]
    if not chosen:
        raise SystemExit(f"FAULT={only!r} is in no fault's name; there are: {', '.join(FAULTS)}")
    if short:
        return _ordered(chosen, seed)
    total = sum(f.share for f in chosen)
    planned = [f for f in chosen for _ in range(max(1, round(f.share * runs / total)))]
    pick = random.Random(seed)
    planned += [pick.choice(chosen) for _ in range(runs - len(planned))]
    return _ordered(planned, seed)


def _ordered(planned: list[Fault], seed: int) -> list[Fault]:
    planned = list(planned)
    random.Random(seed).shuffle(planned)
    return sorted(planned, key=lambda f: f.fresh)


async def play(planned: list[Fault], seed: int, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Play all; `tell` hears of each. A fault that this machine can't play is skipped, with the reason."""
    outcomes: list[Outcome] = []
    rig: Rig | None = None
    strict = os.environ.get("KERNELM_REQUIRE_ALL") == "1"
    why_not = {f.name: missing(f.needs) for f in planned}
    for k, fault in enumerate(planned):
        outcome = Outcome(fault.name, seed + k, skipped="" if strict else why_not[fault.name])
        if strict and why_not[fault.name]:
            outcome.complaints.append(f"can't be played here: {why_not[fault.name]} (KERNELM_REQUIRE_ALL is set)")
        elif not outcome.skipped:
            if rig is not None and (fault.fresh or rig.runs >= LIFE):
                await rig.down()
                rig = None
            rig = await _one(fault, outcome, rig)
        outcomes.append(outcome)
        tell(outcome)
    if rig is not None:
        await rig.down()
    return outcomes


async def _one(fault: Fault, outcome: Outcome, rig: Rig | None) -> Rig | None:
    """One run; the system if it can be used again. One with a complaint is kept on disk, stopped, for whoever looks into it."""
    begun = time.monotonic()
    new = rig is None
    rig = rig or fault.rig()
    rig.runs += 1
    try:
        if new:
            await rig.up()
        await run(rig, fault, outcome)
        if not fault.fresh:
            await rig.whole()
    except Exception as error:  # the run is void, which is a complaint; the other runs go on
        outcome.complaints.append(f"{type(error).__name__}: {error}")
    outcome.took_s = time.monotonic() - begun
    if outcome.good and not fault.fresh and "KEEP" not in os.environ:
        return rig
    keep = not outcome.good or "KEEP" in os.environ
    outcome.note += f" [kept: {rig.work}]" * keep
    await rig.down(keep=keep)
    return None


async def run(rig: Rig, fault: Fault, outcome: Outcome) -> None:
    """Load, fault, recovery, verdict."""
    rng = random.Random(outcome.seed)
    load = Load(rig, f"r{outcome.seed}", rng, **fault.load)
    stage = Stage(rig, load, rng)
    await load.start()
    try:
        await asyncio.sleep(WARM_S)
        await until(lambda: sum(not c.failure for c in load.calls) >= 20, 20.0, "calls answered before the fault")
        outcome.note = await fault.play(stage)
        stage.ended = stage.ended or time.monotonic()
        outcome.recovery_s = await recovered(stage) - stage.ended
        await asyncio.sleep(AFTER_S)
    finally:
        await load.finish()
    verdict = await judge(load, rig.bus, redelivered=stage.redelivered, damaged=stage.damaged)
    outcome.lost, outcome.duplicated = verdict.lost, verdict.duplicated
    outcome.promises = verdict.calls + verdict.events + verdict.jobs
    outcome.complaints += stage.complaints
    outcome.figures = stage.figures


async def recovered(stage: Stage) -> float:
    """When (monotonic) service is whole again: a call, a durable event, a job's step with its checkpoint, and an answer of
    kernel, node and gateway, each begun after the fault's end."""
    rig, load = stage.rig, stage.load

    async def calls() -> None:
        while True:  # as new callers would come: one that was sent to the dead waits for its time-out, the next does not
            tries = [load.spawn(load.call())]
            while not (done := [t for t in tries if t.done()]):
                await asyncio.wait(tries, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
                tries.append(load.spawn(load.call()))
            if any(not t.result().failure for t in done):
                return

    async def answer(ask: Callable[[], Awaitable[Any]]) -> None:
        end = time.monotonic() + 60.0
        while True:
            try:
                await ask()
                return
            except (KernelmFault, httpx.HTTPError):
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(0.05)

    async def gateway() -> None:
        up = read_up(rig.home)
        assert up is not None
        async with httpx.AsyncClient() as client:
            (await client.get(f"{up.http}/healthz", timeout=1.0)).raise_for_status()

    bus: Bus = rig.bus
    await asyncio.gather(
        calls(), load.event(), load.job(1, checkpoint_every=1), answer(gateway),
        answer(lambda: bus.call(Kernel.state, Empty(), timeout_s=1.0)),
        answer(lambda: bus.call(Node.report, Empty(), instance="node-local", timeout_s=1.0)),
    )  # fmt: skip
    return time.monotonic()
