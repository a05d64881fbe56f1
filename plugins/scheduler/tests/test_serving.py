"""Replicas of served models: enough for the objective, not more than needed, and training gives way to them."""

import math

import pytest
from msgspec.structs import replace

from kernelm_contracts.scheduler import ClusterState, ModelState, NodeState, PlacedJob, Share
from kernelm_scheduler.policy import decide
from kernelm_scheduler.serving import erlang_c, needed, wanted
from kernelm_scheduler.settings import Serving, Settings
from kernelm_sdk.system import Resources

RULES = Serving()
MODEL = ModelState("news", request=Resources(1.0, 10), plugins=("s",), replicas=1, allocation=(Share("n"),), minimum=0, maximum=8,
                   arrivals_per_s=5.0, rate_per_s=10.0, objective_ms=300.0)  # fmt: skip


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
    assert needed(slow, 5.0, RULES) == 4  # by the latency alone, at most twice as many


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
