"""Checks and what they have to work with. A check is a coroutine function on a `Case` that returns, or raises Failed or Skipped."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from kernelm.testing.conformance.generate import Shapes
from kernelm.testing.conformance.places import Place
from kernelm.testing.conformance.results import NOT_STARTED, Failed, Report, Result, Skipped
from kernelm.testing.conformance.stand import Instance, Stand
from kernelm.testing.conformance.subject import Subject
from kernelm.testing.conformance.wire import Exchange
from kernelm_sdk.errors import Fault

LIMIT_S = 120.0  # of one check
Run = Callable[["Case"], Awaitable[None]]


class Check(msgspec.Struct, frozen=True):
    """One rule and how it is tried."""

    name: str
    rule: str
    run: Run
    remedy: str


class Case:
    """One plugin under test on a stand."""

    def __init__(self, stand: Stand, subject: Subject, seed: int = 0, place: Place | None = None) -> None:
        self.stand, self.subject, self.seed, self.place = stand, subject, seed, place or stand.own
        self.settings: dict[str, Any] = dict(subject.samples.settings)
        self.requests: dict[str, Any] = dict(subject.samples.requests)
        self.artifacts: dict[str, str] = {}
        self.table: Any = None  # what answers its instances' calls of jobs/1, if a contract's `prepare` sets one
        self.main: Instance
        self.spares: dict[str, Instance] = {}

    def chance(self, what: str) -> random.Random:
        """Random numbers that are the same in each run."""
        return random.Random(f"{self.seed} {what}")

    def methods(self, *kinds: str) -> list[tuple[str, str, Shapes, dict[str, Any]]]:
        """(contract, method, shapes, {"kind", "request", "reply"}) of the methods of these kinds."""
        return [(c, name, shapes, about) for c, shapes in self.subject.schemas.items()
                for name, about in shapes.schema["methods"].items() if about["kind"] in kinds]  # fmt: skip

    def sample(self, contract: str, method: str) -> Any:
        """A request that has to be answered without a fault, if there is one."""
        return self.requests.get(f"{contract}.{method}")

    async def call(self, contract: str, method: str, request: Any, **options: Any) -> Exchange:
        """Call the main instance."""
        return await self.main.wire.ask(self.main.wire.subject(contract, method), request, **options)

    async def prepare(self, roles: list[Any]) -> None:
        """Store the artifacts, settle settings and requests, and start the instances."""
        for name, folder in self.subject.samples.artifacts.items():
            self.artifacts[name] = await self.stand.store(self.subject.folder / folder, name)
        for role in roles:
            if hasattr(role, "prepare"):
                await role.prepare(self)
        self.settings, self.requests = self._filled(self.settings), self._filled(self.requests)
        self.main = await self.start()
        for name, refuse in (("stop", False), ("refused", True)):
            self.spares[name] = await self.start(refuse=refuse)
        await self.main.ready()

    async def start(self, refuse: bool = False, before: Callable[[Instance], None] = lambda _: None) -> Instance:
        """Another instance, in a pool of its own: see `Stand.start`."""

        def prepared(instance: Instance) -> None:
            self.stand.driver.tables[instance.name] = self.table
            before(instance)

        return await self.stand.start(self.subject, self.settings, refuse, self.place, prepared)

    def _filled(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._filled(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._filled(v) for v in value]
        if isinstance(value, str) and value.startswith("@"):
            if value[1:] not in self.artifacts:
                raise Failed(f"{value!r} names no artifact", remedy="list it under [artifacts] in conformance.toml; the kit "
                             "makes a small one itself where kernelm-artifacts and pyarrow are installed")  # fmt: skip
            return self.artifacts[value[1:]]
        return value

    async def settle(self) -> None:
        """Wait until no job is at work that a check has left behind."""
        if not self.methods("job"):
            return
        for _ in range(200):
            exchange = await self.main.wire.ask(self.main.wire.subject("plugin/1", "probe"), {}, timeout_s=10.0)
            if not exchange.answered or not exchange.body.get("jobs"):
                return
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """End what was started."""
        for instance in [*self.spares.values(), *([self.main] if hasattr(self, "main") else [])]:
            await instance.end()


async def run(case: Case, checks: list[Check], roles: list[Any],
              told: Callable[[Result], None] = lambda _: None) -> Report:  # fmt: skip
    """Make the checks one after another; the report. What has no instance to ask is skipped."""
    began, results = time.monotonic(), list[Result]()

    def note(result: Result) -> None:
        results.append(result)
        told(result)

    starts = Check("handshake.starts", "starts, enrolls, agrees on its contracts and becomes ready", lambda c: c.prepare(roles),
                   "kernel/PROTOCOL.md, 'The life of an instance'")  # fmt: skip
    try:
        note(first := await _one(case, starts, None))  # whose patience is that of Instance.ready
        for check in checks:
            if first.status == "passed":
                if case.main.code is None:
                    await case.settle()
                note(await _one(case, check))
            else:
                note(Result(check.name, check.rule, "skipped", NOT_STARTED))
        log = case.main.last_lines() if hasattr(case, "main") else ""
    finally:
        await case.close()
    m = case.subject.manifest
    return Report(m.name, m.version, case.place.runtime, m.contracts, tuple(results), time.monotonic() - began, log)


async def _one(case: Case, check: Check, limit_s: float | None = LIMIT_S) -> Result:
    began = time.monotonic()

    def result(status: Any, message: str = "", exchange: str = "", remedy: str = "") -> Result:
        return Result(check.name, check.rule, status, message, exchange, remedy, time.monotonic() - began)

    try:
        await asyncio.wait_for(check.run(case), limit_s)
    except Failed as failed:
        return result("failed", failed.message, failed.exchange, failed.remedy or check.remedy)
    except Skipped as skipped:
        return result("skipped", str(skipped))
    except TimeoutError:
        return result("failed", f"it took more than {limit_s} s", "", check.remedy)
    except (Fault, AssertionError) as error:
        return result("failed", str(error), "", check.remedy)
    return result("passed")


class Checks:
    """A list that checks are added to: `@checks.add("calls.invalid", "rule", "remedy")`."""

    def __init__(self) -> None:
        self.all: list[Check] = []

    def add(self, name: str, rule: str, remedy: str) -> Callable[[Run], Run]:
        """Register a check."""

        def register(function: Run) -> Run:
            self.all.append(Check(name, rule, function, remedy))
            return function

        return register
