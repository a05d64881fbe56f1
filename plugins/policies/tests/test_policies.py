"""Each policy on states of a few jobs whose right decisions are known, and all of them on random ones."""

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelm_contracts.scheduler import (
    ClusterState,
    Decisions,
    Devices,
    ModelState,
    NodeState,
    PendingJob,
    PlacedJob,
    Share,
    Speed,
)
from kernelm_jobs.checks import check
from kernelm_policies.fifo.plugin import Fifo
from kernelm_policies.gavel.plugin import Gavel
from kernelm_policies.gavel.plugin import allocate as gavel_shares
from kernelm_policies.hesrpt.plugin import Hesrpt
from kernelm_policies.las.plugin import Las
from kernelm_policies.placing import Room, held, speed
from kernelm_policies.pollux.plugin import Pollux
from kernelm_policies.sia.plugin import Sia
from kernelm_policies.srtf.plugin import Srtf
from kernelm_sdk.plugin import Plugin, find_manifests
from kernelm_sdk.system import Resources

ALL = (Fifo, Srtf, Las, Gavel, Pollux, Sia, Hesrpt)
ONE = Resources(cpu=1.0, memory_mb=1, gpus=1)


def node(name: str, type: str, count: int, free: int | None = None) -> NodeState:
    left = count if free is None else free
    have, rest = (Resources(64, 4096, gpus) for gpus in (count, left))
    return NodeState(name, have, rest, {"job": 64}, devices=(Devices(type, count, left),))


def pending(id: str, members: int = 1, most: int = 0, submitted: float = 0.0, speeds: tuple[Speed, ...] = (),
            **more) -> PendingJob:  # fmt: skip
    return PendingJob(id, id, ONE, ("job",), members=members, most=most, submitted=submitted, speeds=speeds, **more)


def placed(id: str, node: str, members: int, type: str, **more) -> PlacedJob:
    return PlacedJob(id, node, ONE, allocation=(Share(node, members, type),), members=members, plugins=("job",), **more)


def decide(policy: type[Plugin], state: ClusterState) -> Decisions:
    return asyncio.run(policy(SimpleNamespace(), policy.Settings()).decide(state, None))


def by_job(decisions: Decisions) -> dict[str, tuple[str, int]]:
    return {d.job: (d.action, sum(s.members for s in d.allocation)) for d in decisions.decisions}


def test_each_is_a_plugin_that_is_not_started_by_itself() -> None:
    good, _ = find_manifests()
    for name in ("fifo", "srtf", "las", "gavel", "pollux", "sia", "hesrpt"):
        assert good[name].contracts == ("scheduler/1",)
        assert not good[name].default


def test_fifo_lets_nobody_pass_the_oldest() -> None:
    state = ClusterState(1, 10.0, (node("a", "t", 4),), (pending("small", 1, submitted=2.0), pending("large", 8, submitted=1.0)))
    assert by_job(decide(Fifo, state)) == {"large": ("wait", 0), "small": ("wait", 0)}


def test_the_shortest_remaining_time_takes_the_place_of_a_longer_one() -> None:
    state = ClusterState(1, 10.0, (node("a", "t", 4, 0),), (pending("short", 4, estimate_s=10.0),),
                         (placed("long", "a", 4, "t", estimate_s=1000.0),))  # fmt: skip
    assert by_job(decide(Srtf, state)) == {"long": ("preempt", 0), "short": ("place", 4)}


def test_a_job_that_has_had_much_goes_to_the_second_queue() -> None:
    state = ClusterState(1, 10.0, (node("a", "t", 4, 0),), (pending("new", 4, submitted=9.0),),
                         (placed("old", "a", 4, "t", served_s=1e6),))  # fmt: skip
    assert by_job(decide(Las, state)) == {"old": ("preempt", 0), "new": ("place", 4)}


def test_max_min_fairness_gives_each_job_the_type_it_gains_most_from() -> None:
    picky = pending("picky", speeds=(Speed("fast", ((1, 10.0),)), Speed("slow", ((1, 1.0),))))
    easy = pending("easy", speeds=(Speed("fast", ((1, 1.0),)), Speed("slow", ((1, 1.0),))))
    state = ClusterState(1, 0.0, (node("f", "fast", 1), node("s", "slow", 1)), (picky, easy))
    x = gavel_shares([picky, easy], ["fast", "slow"], Room(state))
    assert x[0, 0] > x[1, 0]  # the fast one's time goes to the picky one
    assert min(x[0] @ (10, 1) / 5.5, x[1] @ (1, 1) / 1.0) >= 0.99  # and nobody has less than an equal share gives


@pytest.mark.parametrize("policy", [Pollux, Sia, Hesrpt])
def test_an_elastic_job_alone_grows_as_far_as_it_gains(policy: type[Plugin]) -> None:
    curve = (Speed("t", ((1, 1.0), (2, 1.9), (4, 3.5), (8, 3.4))),)
    state = ClusterState(1, 1000.0, (node("a", "t", 8),), (pending("j", 1, 8, speeds=curve),))
    assert by_job(decide(policy, state))["j"] == ("place", 4)


def test_sia_keeps_a_job_where_a_restart_is_worth_more_than_the_gain() -> None:
    curve = (Speed("t", ((1, 1.0), (2, 1.05), (4, 1.1))),)
    job = placed("j", "a", 1, "t", most=4, speeds=curve, restart_s=300.0, submitted=0.0)
    assert by_job(decide(Sia, ClusterState(1, 1000.0, (node("a", "t", 4, 3),), (), (job,)))) == {}


def test_of_two_elastic_jobs_the_one_with_less_left_gets_more() -> None:
    curve = (Speed("t", ((1, 1.0), (2, 1.6), (4, 2.4), (8, 3.4))),)
    jobs = (pending("long", most=8, speeds=curve, remaining=4e3), pending("short", most=8, speeds=curve, remaining=1e3))
    got = by_job(decide(Hesrpt, ClusterState(1, 0.0, (node("a", "t", 6),), jobs)))
    assert (got["short"], got["long"]) == (("place", 4), ("place", 2))


def test_a_curve_is_linear_between_its_points_and_flat_beyond() -> None:
    job = pending("j", speeds=(Speed("t", ((2, 2.0), (4, 3.0))),))
    assert [speed(job, "t", n) for n in (1, 2, 3, 4, 9)] == [0.0, 2.0, 2.5, 3.0, 3.0]


@st.composite
def states(draw: st.DrawFn) -> ClusterState:
    kinds, counts = st.sampled_from(["x", "y"]), st.sampled_from([1, 2, 4, 8])
    nodes = [node(f"n{i}", draw(kinds), draw(counts)) for i in range(draw(st.integers(1, 4)))]
    free = {n.name: n.devices[0].count for n in nodes}
    jobs, running = [], []
    for i in range(draw(st.integers(0, 8))):
        members, most = draw(st.integers(1, 4)), draw(st.sampled_from([0, 4, 16]))
        curve = tuple((n, n**0.8) for n in (1, 2, 3, 4, 8, 16) if n >= members) if most > members else ((members, 1.0),)
        speeds = tuple(Speed(t, tuple((n, v * draw(st.floats(0.5, 3.0))) for n, v in curve)) for t in ("x", "y"))
        common = {"members": members, "most": most, "speeds": speeds, "remaining": draw(st.floats(1, 1e5)), "restart_s": 30.0}
        at = draw(st.sampled_from([None, *nodes]))
        if at is not None and free[at.name] >= members:
            free[at.name] -= members
            common |= {"allocation": (Share(at.name, members, at.devices[0].type),), "movable": draw(st.booleans())}
            running.append(PlacedJob(f"j{i}", at.name, ONE, plugins=("job",), **common))
        else:
            jobs.append(PendingJob(f"j{i}", f"j{i}", ONE, ("job",), **common))
    left = tuple(node(n.name, n.devices[0].type, n.devices[0].count, free[n.name]) for n in nodes)
    return ClusterState(7, 5000.0, left, tuple(jobs), tuple(running))


@pytest.mark.parametrize("policy", ALL)
@given(state=states())
@settings(max_examples=40, deadline=None)
def test_no_decision_takes_what_is_not_free(policy: type[Plugin], state: ClusterState) -> None:
    decisions = decide(policy, state)
    assert decisions == decide(policy, state)
    free = {n.name: n.devices[0].free for n in state.nodes}
    types = {n.name: n.devices[0].type for n in state.nodes}
    jobs = {j.id: j for j in (*state.pending, *state.placed)}
    before = {j.id: held(j) for j in state.placed}
    seen = set()
    for d in decisions.decisions:
        assert d.job not in seen
        seen.add(d.job)
        if d.job in before:
            assert jobs[d.job].movable
            assert d.action in ("preempt", "migrate", "resize")
            for share in before[d.job]:
                free[share.node] += share.members
        else:
            assert d.action in ("place", "wait")
        for share in d.allocation:
            free[share.node] -= share.members
            assert free[share.node] >= 0
            assert share.type == types[share.node]
        if d.allocation:
            assert jobs[d.job].members <= sum(s.members for s in d.allocation) <= max(jobs[d.job].members, jobs[d.job].most)
            assert len({s.type for s in d.allocation}) == 1
    assert {j.id for j in state.pending} <= seen


@pytest.mark.parametrize("policy", ALL)
def test_served_models_keep_what_they_have_and_wake_when_they_are_called(policy: type[Plugin]) -> None:
    """Of 4 devices one is a model's: it stays. Another model wakes first, whose one device no job gets; the one that nobody calls
    sleeps on, and one that has more than its bound gives back."""
    here = (Share("n", 1, "a100"),)
    model = ModelState("serving", request=ONE, plugins=("job",), replicas=1, allocation=here, queue=9, maximum=3)
    called = ModelState("called", request=ONE, plugins=("job",), queue=1, maximum=3)
    shrunk = ModelState("shrunk", request=ONE, plugins=("job",), replicas=2, allocation=(Share("m", 2, "t4"),), minimum=1)
    models = (model, called, ModelState("asleep", request=ONE, plugins=("job",), maximum=3), shrunk)
    waiting = tuple(pending(f"j{n}", submitted=float(n)) for n in range(6))
    state = ClusterState(1, 100.0, (node("n", "a100", 4, 3), node("m", "t4", 2, 0)), waiting, models=models, actions=("scale",))
    answer = decide(policy, state)
    assert check(state, answer).refused == {}
    scaled = {d.job: sum(share.members for share in d.allocation) for d in answer.decisions if d.action == "scale"}
    assert scaled == {"called": 1, "shrunk": 1}
    assert sum(d.action == "place" for d in answer.decisions) == 2  # what is given back is free when it has stopped
