"""What the scheduler promises to those who wait and to those who lend, for any state: each checked by an account of its own."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kernelm_contracts.scheduler import ClusterState, NodeState, PendingJob, PlacedJob, Share, Tenant
from kernelm_scheduler.ordering import effective, overtaken_until
from kernelm_scheduler.policy import decide
from kernelm_scheduler.settings import Preemption, Settings
from kernelm_sdk.system import Resources

CORES = 4
RULES = Settings(preemption=Preemption(rest_s=0.0))


def job(id: str, cores: float, submitted: float, **more) -> PendingJob:
    return PendingJob(id, id, Resources(cores, 1), ("t",), submitted=submitted, **more)


def running(id: str, node: str, cores: float, **more) -> PlacedJob:
    return PlacedJob(id, node, Resources(cores, 1), allocation=(Share(node),), plugins=("t",), **more)


def node(name: str, used: float, cores: float = CORES) -> NodeState:
    return NodeState(name, Resources(cores, 99), Resources(cores - used, 99), {"t": 99})


# ---- aging: who comes before a job is bounded by a moment known beforehand ----------------------------------------------


@st.composite
def waiting(draw: st.DrawFn) -> list[PendingJob]:
    return [job(f"j{n}", 1.0, draw(st.floats(0, 9000)), priority=draw(st.integers(-3, 3)), estimate_s=draw(st.floats(0, 9000)),
                deadline=draw(st.sampled_from((0.0, 3000.0, 9000.0)))) for n in range(draw(st.integers(2, 8)))]  # fmt: skip


@given(waiting(), st.floats(0, 20000), st.sampled_from((0.0, 0.5)))
@settings(max_examples=50, deadline=None)
def test_nobody_who_is_submitted_after_the_bound_comes_before(jobs: list[PendingJob], now: float, stretch: float) -> None:
    rules = Settings(stretch=stretch)
    order = sorted(jobs, key=lambda j: effective(j, now, rules))
    for before, after in ((a, b) for n, b in enumerate(order) for a in order[:n]):
        assert before.submitted <= overtaken_until(after, before.priority - after.priority, rules) + 1e-6


# ---- backfill: the first waits no longer for those that go ahead ----------------------------------------------------------


def earliest(cores: float, free: dict[str, float], ends: list[tuple[float, str, float]], now: float) -> float:
    """When `cores` are first free on one node, if nobody else starts."""
    left = dict(free)
    for time, gone in [(now, None), *(((end, (name, held))) for end, name, held in sorted(ends))]:
        if gone is not None:
            left[gone[0]] += gone[1]
        if max(left.values()) >= cores:
            return time
    return float("inf")


@st.composite
def busy(draw: st.DrawFn) -> tuple[ClusterState, dict[str, float], list[tuple[float, str, float]]]:
    """One to three nodes with jobs whose ends are known, a first job that needs all of a node, and others of any length."""
    free, ends, placed = {}, [], []
    for n in range(draw(st.integers(1, 3))):
        free[f"n{n}"] = float(CORES)
        for cores in draw(st.lists(st.sampled_from((1.0, 2.0)), min_size=1, max_size=3)):
            if cores <= free[f"n{n}"]:
                end = float(draw(st.integers(60, 400)))
                placed.append(running(f"p{len(placed)}", f"n{n}", cores, ends=end))
                ends.append((end, f"n{n}", cores))
                free[f"n{n}"] -= cores
    cores, lasts = st.sampled_from((1.0, 2.0, 3.0)), st.sampled_from((0.0, 30.0, 100.0, 300.0))
    others = [job(f"j{n}", draw(cores), 1.0 + n, estimate_s=draw(lasts)) for n in range(draw(st.integers(1, 8)))]
    nodes = tuple(node(name, CORES - cores) for name, cores in free.items())
    return ClusterState(1, 50.0, nodes, (job("first", CORES, 0.0, estimate_s=60.0), *others), tuple(placed)), free, ends


@given(busy())
@settings(max_examples=80, deadline=None)
def test_backfill_never_delays_the_first(drawn: tuple[ClusterState, dict[str, float], list[tuple[float, str, float]]]) -> None:
    state, free, ends = drawn
    alone = earliest(CORES, free, ends, state.now)
    jobs = {j.id: j for j in state.pending}
    decisions = {d.job: d for d in decide(state, RULES).decisions}
    assert decisions["first"].action == "wait"
    assert decisions["first"].starts == alone
    for d in decisions.values():
        if d.action == "place":
            free[d.node] -= jobs[d.job].request.cpu
            ends.append((state.now + jobs[d.job].estimate_s if jobs[d.job].estimate_s else 1e9, d.node, jobs[d.job].request.cpu))
    assert min(free.values()) >= 0
    assert earliest(CORES, free, ends, state.now) <= alone


# ---- quotas: what is lent comes back, and no more is lent than was said ---------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_an_owner_gets_all_that_is_its_own_back_and_takes_no_more(mine: int, theirs: int, wanted: int, kept: int) -> None:
    """`b` has borrowed all of `a`'s; round by round `a` gets its nominal quota, and `b` keeps its own."""
    tenants = (Tenant("a", nominal=Resources(mine, 99), cohort="c"), Tenant("b", nominal=Resources(theirs, 99), cohort="c"))
    cores = mine + theirs
    held = {f"b{n}": running(f"b{n}", "n", 1.0, tenant="b") for n in range(cores - min(kept, mine))}
    pending = {f"a{n}": job(f"a{n}", 1.0, 10.0 + n, tenant="a") for n in range(wanted)}
    for version in range(1, 2 * cores + 2):
        state = ClusterState(version, 1000.0 + version, (node("n", len(held), cores),), tuple(pending.values()),
                             tuple(held.values()), {}, tenants, (), ("preempt",))  # fmt: skip
        for d in decide(state, RULES).decisions:
            if d.action == "preempt":
                assert held.pop(d.job).tenant == "b"
            elif d.action == "place":
                held[d.job] = running(d.job, "n", 1.0, tenant=pending.pop(d.job).tenant, started=state.now)
        assert sum(j.tenant == "b" for j in held.values()) >= theirs
        assert len(held) <= cores
    assert sum(j.tenant == "a" for j in held.values()) >= min(wanted, mine)


@st.composite
def cohorts(draw: st.DrawFn) -> ClusterState:
    cores = st.integers(0, 6).map(float)
    limit = st.one_of(st.none(), cores.map(lambda c: Resources(c, 99)))
    tenants = tuple(Tenant(name, 1.0 + draw(st.integers(0, 2)), Resources(draw(cores), 99), draw(limit), draw(limit), "c")
                    for name in "abc")  # fmt: skip
    pending = tuple(job(f"j{n}", draw(st.sampled_from((0.5, 1.0, 2.0, 3.0))), float(n), tenant=draw(st.sampled_from("abc")))
                    for n in range(draw(st.integers(1, 14))))  # fmt: skip
    return ClusterState(1, 1000.0, (node("n", 0.0, 99.0),), pending, (), {}, tenants)


@given(cohorts())
@settings(max_examples=80, deadline=None)
def test_nobody_borrows_or_lends_more_than_was_said(state: ClusterState) -> None:
    jobs = {j.id: j for j in state.pending}
    placed = [jobs[d.job] for d in decide(state, RULES).decisions if d.action == "place"]
    held = {t.name: sum(j.request.cpu for j in placed if j.tenant == t.name) for t in state.tenants}
    borrowed = lent = 0.0
    for tenant in state.tenants:
        assert tenant.nominal is not None
        own = tenant.nominal.cpu
        if tenant.borrowing is not None:
            assert held[tenant.name] <= own + tenant.borrowing.cpu + 1e-6
        borrowed += max(held[tenant.name] - own, 0.0)
        idle = max(own - held[tenant.name], 0.0)
        lent += min(idle, tenant.lending.cpu) if tenant.lending is not None else idle
    assert borrowed <= lent + 1e-6
    left = [j for j in state.pending if j not in placed]  # and what is within a nominal quota never waits while others borrow
    for waits in left:
        own = next(t.nominal.cpu for t in state.tenants if t.name == waits.tenant and t.nominal)
        older = [j for j in state.pending if j.tenant == waits.tenant and j.submitted < waits.submitted]
        assert sum(j.request.cpu for j in older) + waits.request.cpu > own - 1e-6 or borrowed == 0.0


# ---- gangs ------------------------------------------------------------------------------------------------------------


ROOMS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4)  # of each node: free cores, free slots


@given(ROOMS, st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_gang_starts_whole_or_not_at_all(rooms: list[tuple[int, int]], gangs: list[int]) -> None:
    nodes = tuple(replace(node(f"n{n}", CORES - free), plugins={"t": slots}) for n, (free, slots) in enumerate(rooms))
    pending = tuple(job(f"j{n}", 1.0, float(n), members=members) for n, members in enumerate(gangs))
    left = {f"n{n}": min(room) for n, room in enumerate(rooms)}
    for d in decide(ClusterState(1, 10.0, nodes, pending), RULES).decisions:
        if d.action == "place":
            shares = d.allocation or (Share(d.node),)
            assert sum(s.members for s in shares) == gangs[int(d.job[1:])]
            assert len({s.node for s in shares}) == len(shares)
            for share in shares:
                left[share.node] -= share.members
    assert min(left.values()) >= 0


def test_a_gang_for_which_there_are_too_few_instances_keeps_nobody_else_out() -> None:
    """Three members, and one instance: it waits for instances, and room that was kept for it would be wasted."""
    gang, other = job("gang", 1.0, 0.0, members=3), replace(job("other", 3.0, 5.0), plugins=("u",))
    at_work = running("r", "n", 1.0)
    one = replace(node("n", 1.0), plugins={"t": 0, "u": 1})
    decisions = {d.job: d for d in decide(ClusterState(1, 1000.0, (one,), (gang, other), (at_work,)), RULES).decisions}
    assert decisions["other"].action == "place"
    assert decisions["gang"].reason == "waits: needs 3 instances of t at once, and there are 1"
    assert decisions["gang"].remedy == "start 2 more of t"
    three = replace(one, plugins={"t": 2, "u": 1})
    decisions = {d.job: d for d in decide(ClusterState(2, 1000.0, (three,), (gang, other), (at_work,)), RULES).decisions}
    assert [decisions[j].action for j in ("gang", "other")] == ["wait", "wait"]  # there are three: one of them is at work
    four = replace(one, plugins={"t": 3, "u": 1})
    decisions = {d.job: d for d in decide(ClusterState(3, 1000.0, (four,), (gang, other), (at_work,)), RULES).decisions}
    assert [decisions[j].action for j in ("gang", "other")] == ["place", "wait"]
