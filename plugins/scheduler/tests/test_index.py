"""A state that is kept and changed by deltas gives the same decisions as the whole state at once; deltas lead where they say."""

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kernelm_contracts.deltas import applied, changes, parts
from kernelm_contracts.scheduler import (
    ClusterState,
    Devices,
    NodeState,
    PendingJob,
    PlacedJob,
    Point,
    Share,
    Speed,
    Tenant,
)
from kernelm_jobs.checks import check
from kernelm_scheduler.index import Index
from kernelm_scheduler.policy import decide, decided, news
from kernelm_scheduler.settings import Elastic, Preemption, Settings
from kernelm_sdk.system import Resources

RULES = Settings(preemption=Preemption(rest_s=0.0), elastic=Elastic(rest_s=0.0))
CURVE = (Speed("a100", (Point(1, 1.0), Point(2, 1.8), Point(4, 3.0))), Speed("t4", (Point(1, 0.4), Point(4, 1.2))))


@st.composite
def waiting(draw: st.DrawFn, number: int) -> PendingJob:
    request = Resources(draw(st.sampled_from((0.5, 2.0, 5.0))), 100, draw(st.sampled_from((0, 0, 1))))
    name, priority, tenant = f"j{number}", draw(st.integers(0, 2)), draw(st.sampled_from("abc"))
    job = PendingJob(name, name, request, ("t",), priority, tenant, draw(st.floats(0, 1000)))
    members = draw(st.sampled_from((1, 1, 2, 3)))
    return replace(
        job, artifacts=tuple(draw(st.lists(st.sampled_from("xy"), max_size=1))), members=members,
        most=members + draw(st.sampled_from((0, 2))), speeds=CURVE if request.gpus else (),
        remaining=500.0 if request.gpus else 0.0, within=draw(st.sampled_from(("", "node", "link"))),
        estimate_s=draw(st.sampled_from((0.0, 50.0))),
        deadline=draw(st.sampled_from((0.0, 1100.0))), preemptible=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def states(draw: st.DrawFn, version: int = 1) -> ClusterState:
    """Any consistent state: devices, gangs, elastic and preemptible jobs, quotas in a cohort."""
    nodes: list[NodeState] = []
    placed: list[PlacedJob] = []
    for n in range(draw(st.integers(1, 4))):
        count, type = draw(st.sampled_from((0, 2, 4))), draw(st.sampled_from(("a100", "t4")))
        cpu, gpus = 8.0, count
        for _ in range(draw(st.integers(0, 3))):
            request = Resources(draw(st.sampled_from((0.5, 1.0, 3.0))), 100, draw(st.sampled_from((0, 1))) if gpus else 0)
            if request.cpu > cpu or request.gpus > gpus:
                continue
            cpu, gpus = cpu - request.cpu, gpus - request.gpus
            share = Share(f"n{n}", 1, type if request.gpus else "")
            tenant = draw(st.sampled_from("abc"))
            ends = draw(st.sampled_from((0.0, 1100.0, 2000.0)))
            placed.append(PlacedJob(f"p{n}-{len(placed)}", f"n{n}", request, draw(st.integers(0, 2)), tenant, 10.0, (share,),
                                    plugins=("t",), preemptible=draw(st.booleans()), movable=draw(st.booleans()), ends=ends,
                                    leaving=draw(st.booleans())))  # fmt: skip
        devices = (Devices(type, count, gpus, 1000, draw(st.sampled_from(("", "rack")))),) if count else ()
        nodes.append(NodeState(f"n{n}", Resources(8.0, 9000, count), Resources(cpu, 5000, gpus), {"t": draw(st.integers(0, 6))},
                               tuple(draw(st.lists(st.sampled_from("xy"), max_size=2, unique=True))), devices))  # fmt: skip
    pending = [draw(waiting(i)) for i in range(draw(st.integers(0, 8)))]
    lending = draw(st.sampled_from((None, Resources(2.0, 2000, 1))))
    tenants = tuple(Tenant(name, 1.0 + n, Resources(4.0, 4000, 2), None, lending, "c") for n, name in enumerate("ab"))
    tenants = tenants if draw(st.booleans()) else ()
    quotas = {"c": Resources(3.0, 9000, 1)} if draw(st.booleans()) else {}
    actions: tuple[Any, ...] = ("preempt", "resize", "migrate") if draw(st.booleans()) else ()
    return ClusterState(version, 1000.0 + version, tuple(nodes), tuple(pending), tuple(placed), quotas, tenants, (), actions, "me")


def by_name(state: ClusterState) -> dict[str, Any]:
    return {"nodes": {n.name: n for n in state.nodes}, "pending": {j.id: j for j in state.pending},
            "placed": {j.id: j for j in state.placed},
            "rest": (state.quotas, state.tenants, state.actions, state.version)}  # fmt: skip


@given(st.lists(states(), min_size=2, max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_kept_state_decides_as_the_whole_one_does(sequence: list[ClusterState]) -> None:
    """Nodes, jobs and quotas come, change and go in any way from one state to the next: failures of nodes and jobs among them."""
    index, before = Index(RULES), None
    waits: dict[str, tuple[str, str]] = {}
    for version, state in enumerate(sequence, 1):
        now = replace(state, version=version, now=1000.0 + version)
        index.apply(changes(before, now))
        whole = decide(now, RULES)
        assert decided(index) == whole
        fresh = news(index)
        assert version > 1 or fresh == whole  # the first time it is all of it, in the same order
        waits = {id: w for id, w in waits.items() if id in {j.id for j in now.pending}}
        waits |= {d.job: (d.reason, d.remedy) for d in fresh.decisions if d.action == "wait"}
        for d in whole.decisions:
            if d.action == "wait":  # what was left out is as it was
                assert waits[d.job][1] == d.remedy
        assert [d for d in fresh.decisions if d.action != "wait"] == [d for d in whole.decisions if d.action != "wait"]
        before = now


@given(states(), states(), st.integers(200, 4000))
@settings(max_examples=100, deadline=None)
def test_deltas_lead_from_one_state_to_the_other_in_any_number_of_parts(old: ClusterState, new: ClusterState, size: int) -> None:
    new = replace(new, version=2)
    assert by_name(applied(old, changes(old, new))) == by_name(new)
    state = None
    pieces = list(parts(changes(None, new), size))
    assert [p.more for p in pieces] == [True] * (len(pieces) - 1) + [False]
    for piece in pieces:
        state = applied(state, msgspec.json.decode(msgspec.json.encode(piece), type=type(piece)))
    assert state is not None
    assert by_name(state) == by_name(new)


@given(states())
@settings(max_examples=100, deadline=None)
def test_the_order_of_entries_does_not_matter(state: ClusterState) -> None:
    turned = replace(state, nodes=state.nodes[::-1], pending=state.pending[::-1], placed=state.placed[::-1])
    assert decide(turned, RULES) == decide(state, RULES)


@given(states())
@settings(max_examples=200, deadline=None)
def test_the_check_never_finds_anything(state: ClusterState) -> None:
    """No oversubscription, no second assignment, gangs whole, quotas and cohorts kept, a decision on each, with a reason."""
    assert check(state, decide(state, RULES)).refused == {}
