"""The job table's side of `work/1`, for checks: hands out jobs, and answers reports as a check wants."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from kernelm.testing.conformance.wire import Exchange, Wire
from kernelm_sdk.bus import Bus
from kernelm_sdk.contract import Contract, Method
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import Empty, Report, Used


class Attempt:
    """One job and epoch in the hands of an instance."""

    def __init__(self, job: str, epoch: int) -> None:
        self.job, self.epoch = job, epoch
        self.reports: list[tuple[float, Report]] = []
        self.answer: Callable[[Report], Fault | None] = lambda _: None  # a fault to answer a report with
        self.released = asyncio.Event()  # until it is set, a final report waits for its answer
        self.released.set()
        self.came = asyncio.Event()  # the first final report
        self.dispatched: Exchange | None = None

    @property
    def final(self) -> Report | None:
        """The first report with a result or a fault."""
        return next((r for _, r in self.reports if r.result is not None or r.fault is not None), None)

    @property
    def finals(self) -> int:
        """How many of them came."""
        return sum(r.result is not None or r.fault is not None for _, r in self.reports)

    @property
    def text(self) -> str:
        """For people: what was sent and reported."""
        sent = self.dispatched.text if self.dispatched else ""
        lines = [f"<- work/1.report {msgspec.json.encode(r).decode()[:400]}" for _, r in self.reports[-6:]]
        return "\n".join([sent, *lines])


class JobDriver:
    """Serves `work/1`, and where contracts are installed `jobs/1`, as `jobs`."""

    def __init__(self) -> None:
        self.bus: Bus
        self._attempts: dict[tuple[str, int], Attempt] = {}
        self._numbers = 0
        self.tables: dict[str, Any] = {}  # instance -> what answers its calls of jobs/1
        self.strays: list[tuple[str, Report]] = []  # (instance, report) of jobs that nobody handed out

    def offer(self, contract: type[Contract]) -> None:
        """Serve `jobs/1` as well: each instance is answered by the table that its case has set for it."""
        for method in contract.methods.values():
            setattr(self, method.attribute, self._passing_on(method))

    def _passing_on(self, method: Method) -> Callable[[Any, Any], Any]:
        def found(caller: str) -> Callable[[Any], Any]:
            answer: Callable[[Any], Any] | None = getattr(self.tables.get(caller), method.attribute, None)
            if answer is None:
                raise ClientFault("unsupported_method", f"{method.name} of jobs/1 is no part of this check")
            return answer

        async def unary(request: Any, call: Any) -> Any:
            return found(call.caller)(request)

        async def streamed(request: Any, call: Any) -> AsyncIterator[Any]:
            yield found(call.caller)(request)

        return streamed if method.kind == "streamed" else unary

    async def on_start(self) -> None:
        """Nothing to prepare."""

    async def on_stop(self) -> None:
        """Nothing to close."""

    async def report(self, request: Report, call: Any) -> Empty:
        """`work/1.report`."""
        attempt = self._attempts.get((request.job, request.epoch))
        if attempt is None:
            self.strays.append((call.caller, request))
            raise ClientFault("not_found", f"job {request.job!r} is not known")
        attempt.reports.append((time.monotonic(), request))
        if request.result is not None or request.fault is not None:
            attempt.came.set()
            await attempt.released.wait()
        if (fault := attempt.answer(request)) is not None:
            raise fault
        return Empty()

    async def used(self, request: Used, call: Any) -> Empty:
        """`work/1.used`: nobody is charged here."""
        return Empty()

    def attempt(self, job: str = "", epoch: int = 1) -> Attempt:
        """A new job, or another epoch of one."""
        self._numbers += 1
        attempt = Attempt(job or f"check-{self._numbers}", epoch)
        self._attempts[attempt.job, epoch] = attempt
        return attempt

    def message(self, wire: Wire, contract: str, method: str, attempt: Attempt, request: Any,
                checkpoint: str = "") -> tuple[str, bytes]:  # fmt: skip
        """(subject, body) of the dispatch."""
        subject = Wire(self.bus, wire.instance, wire.pool).subject(contract, method)
        raw = request if isinstance(request, bytes) else msgspec.json.encode(request)
        body = {"job": attempt.job, "epoch": attempt.epoch, "attempt": 1, "request": msgspec.Raw(raw), "checkpoint": checkpoint,
                "run": "check", "name": attempt.job}  # fmt: skip
        return subject, msgspec.json.encode(body)

    async def hand(self, wire: Wire, contract: str, method: str, request: Any, attempt: Attempt | None = None,
                   checkpoint: str = "") -> Attempt:  # fmt: skip
        """Dispatch a job; returns when the instance has answered the dispatch."""
        attempt = attempt or self.attempt()
        mine = Wire(self.bus, wire.instance, wire.pool)
        mine.seen = wire.seen
        attempt.dispatched = await mine.ask(*self.message(wire, contract, method, attempt, request, checkpoint))
        return attempt
