"""What never happens, for any state and through any sequence of failures, as the job table's own check sees it."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kernelm_contracts.scheduler import ClusterState, NodeState, PendingJob, PlacedJob, Share, Tenant
from kernelm_jobs.checks import check
from kernelm_scheduler.policy import decide
from kernelm_scheduler.settings import Settings
from kernelm_sdk.system import Resources


class Machine:
    """A small cluster in which jobs really take time, and nodes and jobs fail at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.capacity = {f"n{i}": 4 for i in range(3)}
        self.pending: dict[str, PendingJob] = {}
        self.placed: dict[str, tuple[PlacedJob, PendingJob, float]] = {}
        self.done: dict[str, float] = {}
        self.submitted = 0

    def submit(self, now: float) -> None:
        rng = self.random
        members, cores = rng.choice((1, 1, 1, 2, 4)), rng.choice((1, 1, 2))
        job = PendingJob(f"j{self.submitted}", "job", Resources(cores, 10), ("t",), rng.randint(0, 2), rng.choice("ab"), now,
                         members=members, estimate_s=rng.choice((0.0, 20.0, 60.0)), preemptible=rng.random() < 0.3)  # fmt: skip
        self.pending[job.id] = job
        self.submitted += 1

    def state(self, version: int, now: float) -> ClusterState:
        free = dict(self.capacity)
        for job, _, _ in self.placed.values():
            for share in job.allocation:
                free[share.node] -= int(share.members * job.request.cpu)
        nodes = tuple(NodeState(n, Resources(c, 1000), Resources(free[n], 1000), {"t": 9}) for n, c in self.capacity.items())
        tenants = tuple(Tenant(name, nominal=Resources(6, 9999), cohort="all") for name in "ab")
        placed = tuple(job for job, _, _ in self.placed.values())
        return ClusterState(version, now, nodes, tuple(self.pending.values()), placed, {}, tenants, (), ("preempt",))

    def carry_out(self, state: ClusterState, rules: Settings, now: float) -> None:
        answer = decide(state, rules)
        assert check(state, answer).refused == {}
        for d in answer.decisions:
            if d.action == "preempt":
                job, was, _ = self.placed.pop(d.job)
                self.pending[d.job] = replace(was, preemptions=job.preemptions + 1)
            elif d.action == "place":
                was = self.pending.pop(d.job)
                placed = PlacedJob(was.id, d.node, was.request, was.priority, was.tenant, now, d.allocation or (Share(d.node),),
                                   plugins=("t",), preemptible=was.preemptible, preemptions=was.preemptions, members=was.members,
                                   ends=now + was.estimate_s if was.estimate_s else 0.0)  # fmt: skip
                self.placed[d.job] = placed, was, now + self.random.choice((10.0, was.estimate_s or 30.0))
            assert d.action != "reject"

    def fail(self) -> None:
        """A node loses everything that runs on it."""
        node = self.random.choice(sorted(self.capacity))
        for id, (job, was, _) in list(self.placed.items()):
            if any(s.node == node for s in job.allocation):
                del self.placed[id]
                self.pending[id] = replace(was, attempt=was.attempt + 1, avoid=(node,))

    def end(self, now: float) -> None:
        for id, (_, _, ends) in list(self.placed.items()):
            if ends <= now:
                del self.placed[id]
                self.done[id] = now


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_through_failures_nothing_is_lost_and_nothing_starves(seed: int) -> None:
    """Jobs come faster than they can be done for a while, nodes fail; then everything is done, at the latest when all that may
    go before it (what `overtaken_until` bounds) has had its turn."""
    machine, rules = Machine(seed), Settings()
    now = 0.0
    for version in range(1, 400):
        now = version * 10.0
        if now < 600:
            machine.submit(now)
        if now < 900 and machine.random.random() < 0.15:
            machine.fail()
        machine.carry_out(machine.state(version, now), rules, now)
        machine.end(now + 10.0)
        assert len(machine.pending) + len(machine.placed) + len(machine.done) == machine.submitted
        if not machine.pending and not machine.placed and now > 900:
            break
    assert len(machine.done) == machine.submitted


def test_backfill_does_not_delay_the_first_job() -> None:
    """The first needs the whole node, which is free at 100 by the estimate: a job of 50 s goes ahead, one of 200 s does not."""
    running = PlacedJob("r", "n", Resources(2, 10), started=0.0, ends=100.0, plugins=("t",))
    first = PendingJob("first", "first", Resources(4, 10), ("t",), submitted=0.0)
    short = PendingJob("short", "short", Resources(2, 10), ("t",), submitted=1.0, estimate_s=50.0)
    long = replace(short, id="long", estimate_s=200.0)
    node = NodeState("n", Resources(4, 100), Resources(2, 90), {"t": 9})
    for job, action in ((short, "place"), (long, "wait")):
        decisions = {d.job: d for d in decide(ClusterState(1, 10.0, (node,), (first, job), (running,)), Settings()).decisions}
        assert decisions[job.id].action == action
        assert decisions["first"].starts == 100.0


def test_an_owner_takes_back_what_was_borrowed_and_burst_gives_way() -> None:
    node = NodeState("n", Resources(4, 100), Resources(0, 100), {"t": 9})
    tenants = (Tenant("a", nominal=Resources(2, 99), cohort="c"), Tenant("b", nominal=Resources(2, 99), cohort="c"))
    running = tuple(PlacedJob(f"r{i}", "n", Resources(1, 0), 0, "b", 0.0, plugins=("t",)) for i in range(4))
    wanted = PendingJob("mine", "mine", Resources(1, 0), ("t",), 0, "a", 900.0)
    state = ClusterState(1, 1000.0, (node,), (wanted,), running, {}, tenants, (), ("preempt",))
    actions = {d.job: d.action for d in decide(state, Settings()).decisions}
    assert actions["mine"] == "place"
    assert sorted(actions.values()) == ["place", "preempt"]  # one is enough
    assert [d.action for d in decide(replace(state, actions=()), Settings()).decisions] == ["wait"]
    free = replace(state, tenants=(), placed=tuple(replace(p, preemptible=True) for p in running))
    assert sorted(d.action for d in decide(free, Settings()).decisions) == ["place", "preempt"]
    assert [d.action for d in decide(replace(free, pending=(replace(wanted, preemptible=True),)), Settings()).decisions] == ["wait"]
