"""Shadow traffic: another deployment answers copies of a share of a model's calls, and its answers are compared and thrown away.

A copy is made after its caller has the whole answer, so that it can neither delay nor fail the call; it is on no tenant's account.
At most MOST are under way: what is beyond is counted as dropped. Which deployments have a shadow is on record (`jobs/1.shadow`),
and so is what comes of the copies (`jobs/1.compared`), of all gateways together.
"""

import asyncio
import itertools
import logging
import operator
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from msgspec.structs import replace

from kernelm_contracts.jobs import Jobs
from kernelm_contracts.server import ClassifyReply, EmbedReply, ExtractReply, GenerateFrame, Server
from kernelm_contracts.shadows import Compared, Copies, Shadow
from kernelm_gateway.metrics import Metrics
from kernelm_sdk.contract import Method, method_of
from kernelm_sdk.errors import Fault
from kernelm_sdk.events import Received

COPIED = tuple(map(method_of, (Server.classify, Server.embed, Server.extract, Server.generate)))
MOST = 32  # copies under way, of one gateway
EVERY_S = 2.0  # between two looks at the record, and two reports
ALIKE = 0.99  # least cosine of two vectors that agree
log = logging.getLogger("kernelm.gateway")


class Copy:
    """Of a call under way: what its caller is told, to be compared."""

    def __init__(self, shadow: Shadow, method: Method, request: Any, headers: dict[str, str] | None) -> None:
        self.shadow, self.method, self.headers = shadow, method, headers
        self.request = replace(request, model=shadow.to, at_least=0)  # generations are each deployment's own
        self.frames: list[Any] = []
        self.begun = time.perf_counter()

    async def heard(self, frames: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The same frames, which are kept."""
        async with aclosing(frames) as frames:  # type: ignore[type-var]
            async for frame in frames:
                self.frames.append(frame)
                yield frame


class Shadows:
    """Of one gateway. `bus`: what has `call`, `stream`, `follow` and `bucket`; `longest_s`: of a copy."""

    def __init__(self, bus: Any, metrics: Metrics, longest_s: float) -> None:
        self._bus, self._metrics, self._longest_s = bus, metrics, longest_s
        self.known: dict[str, Shadow] = {}  # deployment -> its shadow; of those that are over, too
        self._untold: dict[tuple[str, str, float], Copies] = {}
        self._copies: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._subscription: Any = None

    async def start(self) -> None:
        """Follow the record."""
        self._records = self._bus.bucket("deployments", Shadow)
        self._subscription = await self._bus.follow(self._told, "evt.model.shadowed.*")
        self._changed.set()
        self._loop = asyncio.create_task(self._run(), name="shadows")

    async def stop(self) -> None:
        """Make no more copies, and tell what came of those that were made."""
        if self._loop is None:
            return
        await self._subscription.unsubscribe()
        for task in (self._loop, *self._copies):
            task.cancel()
        await asyncio.gather(self._loop, *self._copies, return_exceptions=True)
        await self._tell()

    async def _told(self, _: Received) -> None:
        self._changed.set()

    async def _run(self) -> None:
        while True:
            if self._changed.is_set() or any(shadow.percent for shadow in self.known.values()):
                self._changed.clear()
                await self._tell()
                try:
                    found = await self._records.all("shadow")
                    self.known = {shadow.name: shadow for shadow, _ in found.values()}
                except Fault as fault:
                    log.info("shadows stay as they are: %s", fault.message)
                    self._changed.set()
            await asyncio.sleep(EVERY_S)

    async def _tell(self) -> None:
        """What has come of copies. A report whose answer is lost is not repeated: it would count twice."""
        untold, self._untold = self._untold, {}
        for (name, to, since), copies in untold.items():
            try:
                await self._bus.call(Jobs.compared, Compared(name, to, since, copies), timeout_s=5.0)
            except Fault as fault:
                log.warning("what came of %s's shadow is not counted: %s; %s", name, fault.message, copies)

    def copy_of(self, method: Method, request: Any, model: str, headers: dict[str, str] | None) -> Copy | None:
        """For a call of `model` that begins now and was chosen to be copied; None for the others."""
        shadow = self.known.get(model)
        if shadow is None or method not in COPIED or random.random() * 100 >= shadow.percent:
            return None
        return Copy(shadow, method, request, headers)

    def make(self, copy: Copy, answer: list[Any]) -> None:
        """Have the shadow answer, now that the caller has its `answer`: the reply, or the frames."""
        if len(self._copies) >= MOST:
            self._count(copy, "dropped")
            return
        task = asyncio.create_task(self._ask(copy, answer, (time.perf_counter() - copy.begun) * 1000), name="shadow")
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _ask(self, copy: Copy, wanted: list[Any], beside_ms: float) -> None:
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(self._longest_s):
                answer = await self._answer(copy)
        except (Fault, TimeoutError) as error:
            waking = isinstance(error, Fault) and error.code == "starting"
            self._count(copy, "dropped" if waking else "failed")
            log.debug("%s, the shadow of %s: %s", copy.shadow.to, copy.shadow.name, error)
            return
        same = "same" if agree(wanted, answer) else "different"
        self._count(copy, same, (time.perf_counter() - begun) * 1000, beside_ms)

    async def _answer(self, copy: Copy) -> list[Any]:
        options: Any = {"model": copy.shadow.to, "headers": copy.headers}
        if copy.method.kind != "streamed":
            return [await self._bus.call(copy.method, copy.request, timeout_s=self._longest_s, **options)]
        async with aclosing(self._bus.stream(copy.method, copy.request, idle_s=self._longest_s, **options)) as frames:
            return [frame async for frame in frames]

    def _count(self, copy: Copy, outcome: str, took_ms: float = 0.0, beside_ms: float = 0.0) -> None:
        shadow = copy.shadow
        self._metrics.copied(shadow.name, shadow.to, outcome)
        key = shadow.name, shadow.to, shadow.since
        sums = self._untold.get(key, Copies())
        more = {outcome: getattr(sums, outcome) + 1, "took_ms": sums.took_ms + took_ms, "beside_ms": sums.beside_ms + beside_ms}
        self._untold[key] = replace(sums, **more)


def agree(one: list[Any], other: list[Any]) -> bool:
    """Whether two answers say the same, as `kernelm_contracts.jobs.Copies` has it."""
    if not one or isinstance(one[0], GenerateFrame):
        return _said(one) == _said(other)
    first, second = one[0], other[0]
    if isinstance(first, EmbedReply):
        pairs = itertools.zip_longest(first.embeddings, second.embeddings, fillvalue=())
        return all(_cosine(a, b) >= ALIKE for a, b in pairs)
    return BEST[type(first)](first) == BEST[type(second)](second)


BEST: dict[type, Callable[[Any], Any]] = {
    ClassifyReply: lambda reply: [row[0].label if row else "" for row in reply.results],
    ExtractReply: lambda reply: [sorted((e.label, e.start, e.end) for e in row) for row in reply.results],
}


def _said(frames: list[GenerateFrame]) -> tuple[str, list[tuple[str, str]]]:
    calls = [(call.name, call.arguments) for frame in frames for call in frame.tool_calls]
    return "".join(frame.text for frame in frames), calls


def _cosine(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Of two vectors of unit length; those of different sizes have nothing in common."""
    return sum(map(operator.mul, one, other)) if len(one) == len(other) else 0.0
