"""Elastic jobs that are sized together: never more than there is, and what people can check by hand."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kernelm_contracts.scheduler import ClusterState, Devices, NodeState, PendingJob, PlacedJob, Point, Share, Speed, Tenant
from kernelm_jobs.checks import check
from kernelm_scheduler.amounts import allocation_of, size
from kernelm_scheduler.goodput import weights_of
from kernelm_scheduler.policy import decide
from kernelm_scheduler.settings import Elastic, Settings
from kernelm_sdk.system import Resources

ACTIONS = ("preempt", "resize", "migrate")
ONE = Resources(1, 10, 1)


def curve(type: str, one: float, power: float = 0.8) -> Speed:
    return Speed(type, tuple(Point(n, one * n**power) for n in (1, 2, 4, 8)))


def cluster(placed: tuple[PlacedJob, ...], pending: tuple[PendingJob, ...], types: tuple[str, ...] = ("slow", "fast"),
            tenants: tuple[Tenant, ...] = ()) -> ClusterState:  # fmt: skip
    """Two nodes of four devices for each type; what is free is what the placed jobs left."""
    nodes = []
    for type in types:
        for n in range(2):
            held = sum(s.members for p in placed for s in allocation_of(p) if s.node == f"{type}{n}")
            free = Resources(16 - held, 1000 - 10 * held, 4 - held)
            nodes.append(NodeState(f"{type}{n}", Resources(16, 1000, 4), free, {"t": 16 - held}, (), (Devices(type, 4, 4 - held),)))
    return ClusterState(3, 1000.0, tuple(nodes), pending, placed, {}, tenants, (), ACTIONS)


def waiting(id: str, remaining: float = 1000.0, most: int = 8, tenant: str = "a") -> PendingJob:
    speeds = (curve("slow", 1.0), curve("fast", 3.0))
    return PendingJob(id, id, ONE, ("t",), tenant=tenant, submitted=900.0, most=most, speeds=speeds, remaining=remaining,
                      restart_s=30.0)  # fmt: skip


def running(id: str, node: str, members: int, remaining: float = 1000.0, tenant: str = "a",
            movable: bool = True) -> PlacedJob:  # fmt: skip
    return PlacedJob(id, node, ONE, 0, tenant, 100.0, (Share(node, members, node[:-1]),), plugins=("t",), submitted=50.0,
                     most=8, speeds=(curve("slow", 1.0), curve("fast", 3.0)), remaining=remaining, restart_s=30.0,
                     movable=movable)  # fmt: skip


@st.composite
def states(draw: st.DrawFn) -> ClusterState:
    placed, tenants = [], st.sampled_from("ab")
    for node in ("slow0", "slow1", "fast0", "fast1"):
        left = 4
        while left and draw(st.booleans()):
            members = draw(st.integers(1, left))
            left -= members
            id = f"r{len(placed)}"
            placed.append(running(id, node, members, draw(st.floats(0, 1e5)), draw(tenants), draw(st.booleans())))
    pending = [waiting(f"w{i}", draw(st.floats(0, 1e5)), draw(st.sampled_from((0, 2, 8))), draw(tenants))
               for i in range(draw(st.integers(0, 8)))]  # fmt: skip
    gpus = draw(st.integers(2, 16))
    shares = {"a": Resources(99, 9999, gpus), "b": Resources(99, 9999, 16 - gpus)}
    limits = tuple(Tenant(name, nominal=nominal, cohort="c") for name, nominal in shares.items())
    return cluster(tuple(placed), tuple(pending), tenants=draw(st.sampled_from(((), limits))))


@given(states())
@settings(max_examples=60, deadline=None)
def test_the_job_table_accepts_every_plan_and_nobody_loses_what_it_needs(state: ClusterState) -> None:
    answer = decide(state, Settings())
    assert check(state, answer).refused == {}
    assert decide(state, Settings()) == answer
    for d in answer.decisions:
        if d.action in ("place", "resize", "migrate"):
            assert size(d.allocation or (Share(d.node),)) >= 1
            assert len({s.type for s in d.allocation}) <= 1


def test_one_job_alone_gets_the_fast_devices() -> None:
    answer = {d.job: d for d in decide(cluster((), (waiting("only"),)), Settings()).decisions}
    assert size(answer["only"].allocation) == 8
    assert {s.type for s in answer["only"].allocation} == {"fast"}


def test_a_full_cluster_shrinks_for_a_newcomer_in_the_same_round() -> None:
    held = tuple(running(f"r-{n}", n, 4, 1e6) for n in ("slow0", "slow1", "fast0", "fast1"))
    answer = {d.job: d for d in decide(cluster(held, (waiting("new"),)), Settings()).decisions}
    assert answer["new"].action == "place"
    assert sum(d.action == "resize" for d in answer.values()) >= 1


def test_a_change_that_costs_more_than_it_brings_is_not_made() -> None:
    held = (replace(running("r", "fast0", 4), restart_s=5000.0),)
    assert decide(cluster(held, ()), Settings()).decisions == ()
    assert [d.action for d in decide(cluster((running("r", "fast0", 4, 1e6),), ()), Settings()).decisions] == ["resize"]
    assert decide(cluster((running("r", "fast0", 4, 1e6),), ()), Settings(elastic=Elastic(keep=9.0))).decisions == ()


def test_a_configuration_that_has_lasted_long_is_reckoned_to_last_as_long_again() -> None:
    rules = Settings(elastic=Elastic(lasts_s=600.0))
    young = replace(running("r", "slow0", 4, 1e6), started=900.0, restart_s=400.0)
    assert decide(cluster((young,), ()), rules).decisions == ()
    old = replace(young, started=100.0)
    assert [d.action for d in decide(cluster((old,), ()), rules).decisions] == ["resize"]


@given(st.floats(1.0, 1e5), st.floats(1.0, 1e5), st.sampled_from((0.3, 0.5, 0.8)))
def test_the_weights_are_what_the_least_sum_of_completion_times_falls_by(a: float, b: float, power: float) -> None:
    """Two jobs on one machine, which run at the power of their parts of it: by search, and by the weights."""
    large, small = max(a, b), min(a, b)
    weights = weights_of({"large": (large, 0.0), "small": (small, 0.0)}, power)

    def both(part: float) -> float:
        first = small / part**power
        return 2 * first + large - (1 - part) ** power * first

    searched = min(both(0.5 + n / 20000) for n in range(10001))
    assert abs(weights["large"] * large + weights["small"] * small - searched) < 1e-3 * searched


def test_without_a_power_goodput_alone_counts_and_of_equal_jobs_the_first_one_comes_first() -> None:
    assert weights_of({"a": (5.0, 0.0), "b": (7.0, 0.0)}, 0.0) == {"a": 1.0, "b": 1.0}
    weights = weights_of({"late": (5.0, 2.0), "early": (5.0, 1.0)}, 0.7)
    assert weights["early"] > weights["late"]
