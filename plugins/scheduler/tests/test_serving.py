"""Replicas of served models: enough for the objective, not more than needed, and training gives way to them."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kernelm_contracts.scheduler import ClusterState, ModelState, NodeState, PendingJob, PlacedJob, Share
from kernelm_scheduler.policy import decide
from kernelm_scheduler.serving import erlang_c, is_late, needed, wanted
from kernelm_scheduler.settings import Serving, Settings
from kernelm_sdk.system import Resources

RULES = Serving()
MODEL = ModelState("news", request=Resources(1.0, 10), plugins=("s",), replicas=1, allocation=(Share("n"),), minimum=0, maximum=8,
                   arrivals_per_s=5.0, rate_per_s=10.0, objective_ms=500.0)  # fmt: skip


def test_erlang_c_is_the_formula() -> None:
    for slots, load in ((1, 0.5), (3, 2.0), (20, 17.5)):
        top = load**slots / math.factorial(slots) * slots / (slots - load)
        assert erlang_c(slots, load) == pytest.approx(top / (sum(load**n / math.factorial(n) for n in range(slots)) + top))
    assert erlang_c(2, 2.0) == 1.0


def test_more_calls_a_queue_and_a_tighter_objective_need_more() -> None:
    assert needed(MODEL, 5.0, RULES) == 2
    assert needed(MODEL, 50.0, RULES) > needed(MODEL, 20.0, RULES) > 2
    assert needed(replace(MODEL, queue=1000), 5.0, RULES) > 10
    assert needed(replace(MODEL, objective_ms=5000.0), 5.0, RULES) == 1
    assert needed(replace(MODEL, objective_ms=1.0), 5.0, RULES) < 10  # shorter than one call: no number helps, none is wasted
    slow = replace(MODEL, rate_per_s=0.0, latency_ms=700.0, replicas=2)
    assert needed(slow, 5.0, RULES) == 3  # by the latency alone, at most twice as many


def test_the_way_down_is_slower_than_the_way_up() -> None:
    many = replace(MODEL, replicas=6, scaled=990.0)
    assert wanted(many, 1000.0, RULES)[0] == 6  # changed just now
    assert wanted(many, 2000.0, RULES)[0] == 2
    assert wanted(replace(MODEL, arrivals_per_s=0.0, idle_s=700.0), 2000.0, RULES)[0] == 0
    assert wanted(replace(MODEL, replicas=0, queue=1), 2000.0, RULES)[0] >= 1
    assert wanted(replace(MODEL, minimum=3), 2000.0, RULES)[0] == 3
    assert wanted(replace(MODEL, arrivals_per_s=900.0), 2000.0, RULES)[0] == 8


def test_training_gives_way_in_the_morning() -> None:
    node = NodeState("n", Resources(4.0, 100), Resources(0.0, 50), {"s": 9, "t": 9})
    training = tuple(PlacedJob(f"t{i}", "n", Resources(1.0, 10), plugins=("t",), preemptible=True) for i in range(3))
    state = ClusterState(1, 1000.0, (node,), (), training, models=(MODEL,), actions=("preempt", "scale"))
    decisions = decide(state, Settings()).decisions
    assert [d.action for d in decisions] == ["preempt", "scale"]
    assert decisions[1].allocation == (Share("n", 2),)
    assert decide(replace(state, actions=()), Settings()).decisions == ()


RATES = st.floats(0.5, 50.0)
ARRIVALS = st.floats(0.0, 200.0)
OBJECTIVES = st.sampled_from((0.0, 100.0, 400.0, 2000.0))


@given(ARRIVALS, ARRIVALS, RATES, st.integers(0, 200), OBJECTIVES)
@settings(deadline=None)
def test_more_load_never_needs_less_and_a_faster_replica_never_more(a: float, more: float, rate: float, queue: int,
                                                                    ms: float) -> None:  # fmt: skip
    model = replace(MODEL, rate_per_s=rate, queue=queue, objective_ms=ms)
    assert needed(model, a + more, RULES) >= needed(model, a, RULES)
    assert needed(replace(model, queue=queue + 10), a, RULES) >= needed(model, a, RULES)
    if ms == 0.0 or 1000.0 / rate < ms:  # else no number keeps it, and what is spent on it is another matter
        assert needed(replace(model, rate_per_s=rate * 2), a, RULES) <= needed(model, a, RULES)


@given(st.floats(0.1, 200.0), RATES)
@settings(deadline=None)
def test_what_is_needed_meets_the_objective_and_one_less_does_not(arrivals: float, rate: float) -> None:
    objective_s = 3.0 / rate
    count = needed(replace(MODEL, rate_per_s=rate, objective_ms=1000.0 * objective_s), arrivals, replace(RULES, variation=1.0))
    load = arrivals / rate

    def late(replicas: int) -> float:  # M/M/1, the broker splits calls at random: rho * exp(-(mu - lambda) * t)
        busy = load / replicas
        return 1.0 if busy >= 1.0 else busy * math.exp(-(1.0 - busy) * rate * (objective_s - 1.0 / rate))

    assert late(count) <= RULES.late + 1e-9
    assert count == 1 or late(count - 1) > RULES.late - 1e-9


@given(st.integers(0, 8), st.floats(0.0, 60.0), RATES, st.integers(0, 30), OBJECTIVES, st.integers(0, 2), st.integers(2, 8))
@settings(deadline=None)
def test_a_constant_load_never_makes_it_flap(has: int, arrivals: float, rate: float, queue: int, ms: float, low: int,
                                             high: int) -> None:  # fmt: skip
    model = replace(MODEL, replicas=has, arrivals_per_s=arrivals, rate_per_s=rate, queue=queue, objective_ms=ms, minimum=low,
                    maximum=high)  # fmt: skip
    seen, now = [has], 0.0
    for _ in range(60):
        now += 30.0
        count, why = wanted(model, now, RULES)
        if arrivals or queue:
            assert count == model.replicas or low <= count <= high
        assert bool(why) == (count != model.replicas)
        if count != model.replicas:
            model = replace(model, replicas=count, scaled=now)
            seen.append(count)
    steps = [b - a for a, b in pairwise(seen)]
    assert len(steps) <= 2  # into the bounds, then to what is needed
    assert not any(a < 0 < b for a, b in pairwise(steps)), seen
    if arrivals or queue:
        assert model.replicas >= 1


def test_latency_that_is_measured_counts_for_more_than_the_formula() -> None:
    late = replace(MODEL, replicas=2, latency_ms=2048.0, scaled=0.0, start_s=5.0)
    assert not is_late(late, 10.0, RULES)  # it has just got a replica
    assert is_late(late, 20.0, RULES)
    count, why = wanted(late, 20.0, RULES)
    assert count == 3
    assert "p99 is over 1024 ms" in why
    assert wanted(replace(late, latency_ms=1000.0), 20.0, RULES) == (2, "")  # perhaps within 500 ms
    assert wanted(replace(late, replicas=8), 200.0, RULES) == (8, "")  # no more than the most, and no fewer while it is late
    assert not is_late(replace(late, rate_per_s=1.5), 20.0, RULES)  # one call alone takes longer: no number helps


def test_a_deployment_says_itself_when_it_goes_to_zero() -> None:
    idle = replace(MODEL, arrivals_per_s=0.0, idle_s=30.0)
    assert wanted(idle, 2000.0, RULES) == (1, "")
    assert wanted(replace(idle, zero_after_s=20.0), 2000.0, RULES)[0] == 0
    assert wanted(replace(idle, zero_after_s=20.0, minimum=1), 2000.0, RULES) == (1, "")
    assert wanted(replace(idle, zero_after_s=20.0), idle.scaled + 25.0, RULES)[0] == 0  # before `down_after_s`, which is for fewer
    assert wanted(replace(idle, zero_after_s=20.0), idle.scaled + 15.0, RULES)[0] == idle.replicas


PAIR = replace(MODEL, replicas=0, allocation=(), minimum=2, maximum=2, arrivals_per_s=0.0)  # its nodes were lost


def test_replicas_go_to_several_nodes_where_none_has_room_for_all() -> None:
    small = NodeState("a", Resources(4.0, 100), Resources(1.0, 50), {"s": 9})
    other = replace(small, name="b", free=Resources(1.5, 50))
    state = ClusterState(1, 1000.0, (small, other), (), models=(PAIR,), actions=("scale",))
    [decision] = decide(state, Settings()).decisions
    assert (decision.action, decision.reason) == ("scale", "at least 2 replicas")
    assert sorted(decision.allocation, key=lambda share: share.node) == [Share("a"), Share("b")]
    [decision] = decide(replace(state, nodes=(small, replace(other, free=Resources(0.5, 50)))), Settings()).decisions
    assert (decision.allocation, decision.reason) == ((Share("a"),), "at least 2 replicas, 1 more find no room")
    left = replace(PAIR, replicas=1, allocation=(Share("b"),))  # one of its nodes was lost
    [decision] = decide(replace(state, models=(left,)), Settings()).decisions
    assert Share("b") in decision.allocation or Share("b", 2) in decision.allocation
    assert sum(share.members for share in decision.allocation) == 2


def test_a_model_that_finds_no_room_says_for_what_it_waits() -> None:
    full = NodeState("a", Resources(4.0, 100), Resources(0.5, 50), {"s": 9})
    state = ClusterState(1, 1000.0, (full,), (), models=(PAIR,), actions=("scale",))
    [decision] = decide(state, Settings()).decisions
    assert (decision.job, decision.action, decision.reason) == ("news", "wait", "waits: needs 1 core, node a has 0.5 free")
    assert decision.remedy == "jobs on node a end, or a node with room"
    small = replace(full, capacity=Resources(0.5, 100))
    [decision] = decide(replace(state, nodes=(small,)), Settings()).decisions
    assert (decision.reason, decision.remedy) == ("waits: needs 1 core, node a has 0.5 in all", "a larger node, or a larger quota")
    [decision] = decide(replace(state, quotas={"default": Resources(0.0, 999)}), Settings()).decisions
    assert decision.reason == "waits: needs 1 core, the quota of tenant default has 0 left"
    [decision] = decide(replace(state, nodes=(replace(full, plugins={"other": 1}),)), Settings()).decisions
    assert decision.reason == "waits: no node that is there has the plugin that serves news"
    has_one = replace(PAIR, replicas=1, allocation=(Share("a"),))
    assert [d.action for d in decide(replace(state, models=(has_one,)), Settings()).decisions] == ["wait"]
    assert decide(replace(state, models=(replace(has_one, minimum=1),)), Settings()).decisions == ()


def test_nobody_else_is_stopped_for_a_replica_that_room_is_being_made_for() -> None:
    node = NodeState("n", Resources(4.0, 100), Resources(0.0, 50), {"s": 9, "t": 9})
    training = tuple(PlacedJob(f"t{i}", "n", Resources(1.0, 10), plugins=("t",), preemptible=True, leaving=i == 0)
                     for i in range(3))  # fmt: skip
    state = ClusterState(1, 1000.0, (node,), (), training, models=(MODEL,), actions=("preempt", "scale"))
    assert decide(state, Settings()).decisions == ()
    busier = replace(state, models=(replace(MODEL, arrivals_per_s=10.0),))  # needs two more
    assert [d.action for d in decide(busier, Settings()).decisions] == ["preempt", "scale"]


def test_what_comes_free_for_a_replica_piece_by_piece_is_kept_for_it() -> None:
    node = NodeState("n", Resources(2.0, 100), Resources(0.25, 50), {"s": 9, "t": 9})
    quarter = Resources(0.25, 10)
    leaving = tuple(PlacedJob(f"t{i}", "n", quarter, plugins=("t",), preemptible=True, leaving=True) for i in range(2))
    waiting = PendingJob("w", "w", quarter, ("t",), preemptible=True)
    model = replace(MODEL, request=Resources(0.75, 10))  # one of its three quarters is free already
    state = ClusterState(1, 1000.0, (node,), (waiting,), leaving, models=(model,), actions=("preempt", "scale"))
    assert [d.action for d in decide(state, Settings()).decisions] == ["wait"]
    free = replace(state, nodes=(replace(node, free=Resources(0.75, 50)),), placed=())
    assert [d.action for d in decide(free, Settings()).decisions] == ["scale", "wait"]
