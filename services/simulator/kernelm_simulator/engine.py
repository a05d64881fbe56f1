"""The simulation: discrete events, rounds in which a scheduler decides, and a check of every step.

Jobs arrive and finish at any moment; rounds are held at multiples of `round_s`, only when there is something to decide: something
has happened, or jobs wait or could be resized, and the scheduler does not say that it would decide nothing (`Steady`). A decision
is carried out at once; a job that is placed, moved or resized first restarts from a checkpoint (`Work.restart_s`), during which it
holds its devices and makes no progress.
What a scheduler decides must be possible: `Floor` refuses what is taken, `_checked` what the job can't do, and a refused
decision ends the simulation with the job, the time and the reason. The same trace, cluster and scheduler give the same result.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from msgspec import Struct

from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, Share
from kernelm_sdk.errors import ClientFault
from kernelm_simulator.cluster import Cluster, Floor
from kernelm_simulator.run import Run
from kernelm_simulator.trace import TraceJob

Decide = Callable[[ClusterState], Decisions]
Steady = Callable[[ClusterState], float]  # until when it decides nothing, if no job comes, ends, or becomes movable
ROUND_S = 60.0  # Pollux and Sia
STUCK_S = 30 * 86400.0  # nothing runs, nothing comes, and the scheduler places nothing for so long: it never will


class Options(Struct, frozen=True):
    round_s: float = ROUND_S
    refresh_s: float = ROUND_S  # a round is held at least so often while jobs wait or could be resized
    rigid: bool = False  # jobs run with the members and the batch size their owners asked for
    remaining_known: bool = True  # whether the scheduler is told how much work is left


class Change(NamedTuple):
    """A job got other devices; `members` 0 for none."""

    time: float
    job: str
    type: str
    members: int


class Result(Struct):
    """What happened; times in seconds from the first job on."""

    runs: list[Run]
    changes: list[Change]
    decide_s: list[float]  # of each round
    makespan: float


class Simulation:
    """`Simulation(jobs, cluster, decide).run()`."""

    def __init__(self, jobs: list[TraceJob], cluster: Cluster, decide: Decide, options: Options | None = None,
                 steady: Steady | None = None) -> None:  # fmt: skip
        self.options = options or Options()
        if not (self.options.round_s > 0 and self.options.refresh_s > 0):
            said = f"round_s {self.options.round_s:g}, refresh_s {self.options.refresh_s:g}"
            raise ClientFault("invalid", f"rounds have no distance: {said}", "seconds above 0")
        self.cluster, self.decide, self.floor, self.steady = cluster, decide, Floor(cluster), steady
        if len({job.id for job in jobs}) < len(jobs):
            raise ClientFault("invalid_trace", "two jobs of the trace have the same id", "make the ids unique")
        self.coming = [Run(job, cluster, self.options.rigid) for job in reversed(jobs)]  # the next one last
        self.all = self.coming[::-1]
        self.active: dict[str, Run] = {}
        self.now, self.version = 0.0, 0
        self.changes: list[Change] = []
        self.decide_s: list[float] = []
        self.idle_since = 0.0
        self.steady_until = 0.0

    def run(self) -> Result:
        """Simulate until every job is done or rejected."""
        while self.coming or self.active:
            event, wanted = self._next_event(), self._attention()
            at = self._boundary(event)
            if wanted:
                at = min(at, self._boundary(max(self.now + self.options.refresh_s, self.steady_until)))
            if math.isinf(at):
                raise self._stuck()
            self._advance(at)
            if self._attention():
                self._round()
            self._watch()
        return Result(self.all, self.changes, self.decide_s, max((r.finished for r in self.all), default=0.0))

    # ---- time --------------------------------------------------------------------------------------------------------

    def _next_event(self) -> float:
        arrival = self.coming[-1].job.submitted if self.coming else math.inf
        return min(arrival, min([run.ends for run in self.active.values()], default=math.inf))

    def _attention(self) -> bool:
        """Whether there is something a scheduler could change."""
        return any(run.elastic or not run.allocation for run in self.active.values())

    def _boundary(self, moment: float) -> float:
        if math.isinf(moment):
            return moment
        return math.ceil(moment / self.options.round_s - 1e-9) * self.options.round_s

    def _advance(self, to: float) -> None:
        """All that happens until `to`."""
        for run in [r for r in self.active.values() if r.ends <= to]:
            self._finish(run, run.ends)
        while self.coming and self.coming[-1].job.submitted <= to:
            run = self.coming.pop()
            self.active[run.job.id] = run
        self.now = to

    def _finish(self, run: Run, moment: float) -> None:
        self._stop(run, moment)
        run.finished = moment
        del self.active[run.job.id]

    # ---- rounds ------------------------------------------------------------------------------------------------------

    def state(self) -> ClusterState:
        """What the scheduler decides on."""
        known = self.options.remaining_known
        return ClusterState(
            self.version, self.now, self.floor.states(),
            tuple([run.pending(known) for run in self.active.values() if not run.allocation]),
            tuple([run.shown(self.now, known) for run in self.active.values() if run.allocation]),
            actions=("preempt", "migrate", "resize"),
        )  # fmt: skip

    def _round(self) -> None:
        self.version += 1
        state = self.state()
        begun = time.perf_counter()
        decisions = self.decide(state)
        self.decide_s.append(time.perf_counter() - begun)
        if decisions.version != self.version:
            raise ClientFault("refused", f"the scheduler answered for version {decisions.version} of {self.version}")
        changed = [self._carry_out(decision) for decision in decisions.decisions]
        if any(changed):
            self.check()
        self.steady_until = 0.0 if any(changed) or self.steady is None else self._calm(self.steady(state))

    def _calm(self, until: float) -> float:
        """`until`, or when the first job has restarted, and can be moved again."""
        restarting = [run.working for run in self.active.values() if run.allocation and run.working > self.now]
        return min([until, *restarting])

    def _carry_out(self, decision: Decision) -> bool:
        """Whether it changes anything."""
        run = self.active.get(decision.job)
        if run is None:
            raise ClientFault("refused", f"at {self.now:g} s: {decision.action} of {decision.job!r}, which is no job that is here")
        try:
            if decision.action == "wait":
                self._expect(run, placed=False)
                return False
            if decision.action == "place":
                self._expect(run, placed=False)
                self._start(run, decision)
            elif decision.action in ("migrate", "resize"):
                self._expect(run, placed=True)
                self._stop(run, self.now)
                self._start(run, decision)
                run.preemptions += 1
            elif decision.action == "preempt":
                self._expect(run, placed=True)
                self._stop(run, self.now)
                run.preemptions += 1
            elif decision.action == "reject":
                self._expect(run, placed=False)
                run.rejected = decision.reason or "rejected"
                del self.active[run.job.id]
            else:
                raise ClientFault("refused", f"a job can't be told to {decision.action!r}")
        except ClientFault as fault:
            message = f"at {self.now:g} s, {decision.action} of {decision.job}: {fault.message}"
            raise ClientFault("refused", message, "the scheduler decided what is not possible: correct it") from None
        return True

    def _expect(self, run: Run, placed: bool) -> None:
        if bool(run.allocation) != placed:
            raise ClientFault("refused", f"it is {'placed' if run.allocation else 'waiting'}")

    def _start(self, run: Run, decision: Decision) -> None:
        allocation = decision.allocation or (Share(decision.node),)
        type = self._checked(run, allocation)
        self.floor.take(run.job.id, allocation)
        run.place(self.now, allocation, type)
        self.changes.append(Change(self.now, run.job.id, type, run.devices))

    def _checked(self, run: Run, allocation: tuple[Share, ...]) -> str:
        """The type of its devices; ClientFault if the job can't run on `allocation`."""
        members = sum(share.members for share in allocation)
        if not run.members <= members <= max(run.members, run.most):
            raise ClientFault("refused", f"{members} members of a job of {run.members} to {max(run.members, run.most)}")
        types = {self.floor.types.get(share.node, "") for share in allocation}
        if len(types) > 1:
            raise ClientFault("refused", f"devices of several types: {', '.join(sorted(types))}")
        type = types.pop()
        if not run.work.fits(type, tuple(sorted(share.members for share in allocation))):
            raise ClientFault("refused", f"it can't run with {members} members on {type}")
        return type

    def _stop(self, run: Run, moment: float) -> None:
        self.floor.give(run.allocation)
        run.stop(moment)
        self.changes.append(Change(moment, run.job.id, "", 0))

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What holds after every step: nothing is taken twice, and what is free and what is held are all there is."""
        held: dict[str, int] = {}
        for run in self.active.values():
            for share in run.allocation:
                held[share.node] = held.get(share.node, 0) + share.members
        for node in self.cluster.nodes:
            if held.get(node.name, 0) + self.floor.free[node.name] != node.devices or self.floor.free[node.name] < 0:
                raise AssertionError(f"at {self.now} s node {node.name} of {node.devices} devices: {held.get(node.name, 0)} held, "
                                     f"{self.floor.free[node.name]} free")  # fmt: skip

    def _watch(self) -> None:
        if self.coming or any(run.allocation for run in self.active.values()):
            self.idle_since = self.now
        elif self.active and self.now - self.idle_since > STUCK_S:
            raise self._stuck()

    def _stuck(self) -> ClientFault:
        waiting = ", ".join(list(self.active)[:3])
        message = f"at {self.now:g} s nothing runs, and the scheduler places none of {len(self.active)} jobs: {waiting}"
        return ClientFault("stuck", message, "a cluster on which they fit, or a scheduler that rejects what can never run")
