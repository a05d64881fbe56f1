"""Asking the scheduler: a snapshot of the cluster once, then what has changed since."""

import logging
import time

from msgspec import structs

from kernelm_contracts.deltas import changes, parts
from kernelm_contracts.scheduler import ClusterDelta, ClusterState, Decision, Decisions, Scheduler
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault

log = logging.getLogger("kernelm.jobs")
TIMEOUT_S = 10.0
SOONEST_S, TIMES = 2.0, 20  # patience with a scheduler that has answered: so many times its last answer took, and no less
READY = "`kernelm plugin list` says which plugin implements it, `kernelm ps --all` and `kernelm doctor` why none is ready"
AGAIN = ("need_snapshot", "unsupported_method")  # it lacks what came before; it takes no deltas (or its successor takes none)


class Asking:
    """One line of questions, whose states are numbered; a scheduler that was replaced or restarted gets a snapshot again."""

    def __init__(self, bus: Bus, source: str) -> None:
        self._bus, self._source = bus, source
        self._known: ClusterState | None = None  # what the scheduler has
        self._waits: dict[str, Decision] = {}  # its last answers to those that wait
        self._patience_s = TIMEOUT_S  # shorter once it is known how long it takes: a frozen one must not keep its successor waiting
        self.version = 0
        self.fresh: set[str] = set()  # of the last answer: jobs on which it said something new

    async def decide(self, state: ClusterState) -> Decisions:
        """A decision on every waiting job, and on others; faults as of a call of the scheduler."""
        self.version += 1
        state = structs.replace(state, version=self.version, source=self._source)
        known, self._known = self._known, None  # until the answer is there
        begun = time.monotonic()
        try:
            answer = await self._update(known, state)
        except Fault as fault:
            self._patience_s = min(2 * self._patience_s, TIMEOUT_S)
            if fault.code != "no_responders":
                raise
            raise KernelFault(fault.code, f"no plugin that implements {Scheduler.id()} is ready", READY, retriable=True) from None
        self._patience_s = min(max(TIMES * (time.monotonic() - begun), SOONEST_S), TIMEOUT_S)
        self._known = state
        said = {d.job for d in answer.decisions}
        self.fresh = said
        pending = {job.id for job in state.pending}
        kept = [d for id, d in self._waits.items() if id in pending and id not in said]
        self._waits = {d.job: d for d in (*kept, *answer.decisions) if d.action == "wait"}
        return Decisions(answer.version, (*answer.decisions, *kept))

    def forget(self) -> None:
        """Send the whole state the next time."""
        self._known = None

    async def _update(self, known: ClusterState | None, state: ClusterState) -> Decisions:
        if known is not None:
            try:
                return await self._send(changes(known, state))
            except ClientFault as fault:
                if fault.code not in AGAIN:
                    raise
        self._waits.clear()
        try:
            return await self._send(changes(None, state))
        except Fault as fault:
            if fault.code not in AGAIN:
                raise
        answer: Decisions = await self._bus.call(Scheduler.decide, state, timeout_s=self._patience_s)  # it takes no deltas
        return answer

    async def _send(self, delta: ClusterDelta) -> Decisions:
        answer = Decisions(0, ())
        for part in parts(delta):
            answer = await self._bus.call(Scheduler.update, part, timeout_s=self._patience_s)
        return answer
