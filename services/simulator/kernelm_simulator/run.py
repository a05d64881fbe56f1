"""One job of a simulation: where it runs, how far it is, and what a scheduler is told of it."""

from dataclasses import dataclass, field
from math import inf

from kernelm_contracts.scheduler import PendingJob, PlacedJob, Share, Speed
from kernelm_sdk.system import Resources
from kernelm_simulator.cluster import PLUGIN, Cluster
from kernelm_simulator.trace import TraceJob
from kernelm_simulator.work import Pace, Placement, Work

MEMBER = Resources(cpu=1.0, memory_mb=1, gpus=1)


@dataclass
class Run:
    """`rigid`: with the members and the batch size that its owner asked for, as under a scheduler that does not resize."""

    job: TraceJob
    cluster: Cluster
    rigid: bool
    allocation: tuple[Share, ...] = ()
    pace: Pace | None = None
    progress: float = 0.0  # when it got this allocation
    placed: float = 0.0  # when it did
    working: float = 0.0  # when it has restarted on it
    started: float = -1.0  # first time
    finished: float = -1.0
    rejected: str = ""
    served_s: float = 0.0  # device seconds, without those of this allocation
    restarting_s: float = 0.0  # device seconds in which it started or restarted
    placements: int = 0
    preemptions: int = 0  # times it was stopped, moved or resized
    ends: float = inf  # when it will be done where it runs now
    _begun: float = 0.0  # seconds of work behind it, on the pace of its allocation, when it got that
    _speeds: dict[int, tuple[Speed, ...]] = field(default_factory=dict)
    _waiting: PendingJob | None = None  # what a scheduler is shown of it: the same for as long as it waits

    def __post_init__(self) -> None:
        self.work: Work = self.job.rigid or self.job.work if self.rigid else self.job.work
        self.elastic = self.job.most > 0 and not self.rigid
        self.members = 1 if self.elastic else self.job.members
        self.most = self.job.most if self.elastic else 0
        self._curved = self.elastic or bool(self.work.types())
        self.types = [t for t in self.work.types() if t in self.cluster.types] or list(self.cluster.types)

    # ---- time --------------------------------------------------------------------------------------------------------

    def done(self, now: float) -> float:
        """Progress at `now`."""
        if self.pace is None or now <= self.working:
            return self.progress
        return self.pace.progress(self._begun + now - self.working)

    def served(self, now: float) -> float:
        """Device seconds it has had."""
        return self.served_s + self.devices * (now - self.placed if self.allocation else 0.0)

    @property
    def devices(self) -> int:
        return sum(share.members for share in self.allocation)

    @property
    def type(self) -> str:
        return self.allocation[0].type if self.allocation else ""

    def place(self, now: float, allocation: tuple[Share, ...], type: str) -> None:
        """Let it run on `allocation` (devices of one `type`), from its last checkpoint on, which costs a restart."""
        placement: Placement = tuple(sorted(share.members for share in allocation))
        self.allocation = tuple(Share(s.node, s.members, type) for s in allocation)
        self.pace, self.placed, self.working = self.work.pace(type, placement), now, now + self.work.restart_s
        self._begun, self._waiting = self.pace.time(self.progress), None
        self.ends = self.working + self.pace.total - self._begun
        self.started = now if self.started < 0 else self.started
        self.placements += 1

    def stop(self, now: float) -> None:
        """Take its devices away; it keeps its progress."""
        self.restarting_s += self.devices * (min(now, self.working) - self.placed)
        self.served_s, self.progress = self.served(now), self.done(now)
        self.allocation, self.pace, self.ends, self._waiting = (), None, inf, None

    # ---- what a scheduler sees ---------------------------------------------------------------------------------------

    def speeds(self, progress: float) -> tuple[Speed, ...]:
        """Its goodput on each type, packed on empty nodes; () for a job of which only the run time is known."""
        if not self._curved:
            return ()
        stage = self.work.stage(progress)
        if stage not in self._speeds:
            self._speeds = {stage: self._curves(progress)}  # the last one is all that is asked for again
        return self._speeds[stage]

    def _curves(self, progress: float) -> tuple[Speed, ...]:
        curves = []
        for type in self.types:
            points = []
            for members in self.counts(type):
                placement = self.cluster.packed(type, members)
                if placement and self.work.fits(type, placement):
                    points.append((members, self.work.pace(type, placement).speed(progress)))
            if points:
                curves.append(Speed(type, tuple(points)))
        return tuple(curves)

    def counts(self, type: str) -> list[int]:
        """Numbers of members worth a point of the curve: all within a node, and whole nodes."""
        if not self.elastic:
            return [self.members]
        node = max(n.devices for n in self.cluster.nodes if n.type == type)
        all_of_them = min(self.most, self.cluster.types[type])
        return [*range(1, min(node, all_of_them) + 1), *range(2 * node, all_of_them + 1, node)]

    def pending(self, remaining_known: bool) -> PendingJob:
        if self._waiting is None:
            self._waiting = self._pending(remaining_known)
        return self._waiting

    def _pending(self, remaining_known: bool) -> PendingJob:
        speeds, left = self.speeds(self.progress), self.work.total - self.progress
        return PendingJob(
            self.job.id, self.job.id, MEMBER, (PLUGIN,), tenant=self.job.tenant, submitted=self.job.submitted,
            members=self.members, most=self.most, speeds=speeds, done=self.progress,
            remaining=left if remaining_known and speeds else 0.0, estimate_s=left if remaining_known and not speeds else 0.0,
            preemptible=True, restart_s=self.work.restart_s, served_s=self.served_s, started=max(self.started, 0.0),
            preemptions=self.preemptions,
        )  # fmt: skip

    def shown(self, now: float, remaining_known: bool) -> PlacedJob:
        done = self.done(now)
        speeds = self.speeds(done)
        left = self.work.total - done
        return PlacedJob(
            self.job.id, self.allocation[0].node, MEMBER, tenant=self.job.tenant, started=self.placed, allocation=self.allocation,
            name=self.job.id, plugins=(PLUGIN,), submitted=self.job.submitted, members=self.members, most=self.most, speeds=speeds,
            done=done, remaining=left if remaining_known and speeds else 0.0,
            estimate_s=left if remaining_known and not speeds else 0.0, preemptible=True, restart_s=self.work.restart_s,
            served_s=self.served(now), preemptions=self.preemptions, checkpointed=now, movable=now >= self.working,
        )  # fmt: skip
