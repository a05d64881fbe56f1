"""The policy: what it must never do (for any cluster), and what it does in cases that people can check by hand."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelm_contracts.scheduler import ClusterState, ModelState, NodeState, PendingJob, PlacedJob, Share
from kernelm_scheduler.amounts import CPU_TOLERANCE
from kernelm_scheduler.policy import Round, decide, order
from kernelm_scheduler.settings import Settings, Weights
from kernelm_sdk.system import Resources

DEFAULTS = Settings()
PLUGINS = ("data", "trainer", "encoder")
TENANTS = ("default", "acme")
cpus = st.sampled_from((0.0, 0.1, 0.25, 0.3, 0.5, 1.0, 2.0, 4.0, 9.0))
requests = st.builds(Resources, cpus, st.sampled_from((0, 64, 512, 4096, 70000)), st.sampled_from((0, 0, 0, 1, 9)))


def jobs(id: str) -> st.SearchStrategy[PendingJob]:
    def some(of: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, ...]]:
        return st.lists(of, max_size=2, unique=True).map(tuple)

    return st.builds(
        PendingJob, st.just(id), st.just(f"job {id}"), requests, some(st.sampled_from(PLUGINS)), st.integers(-2, 2),
        st.sampled_from(TENANTS), st.floats(0, 1000), st.integers(0, 2), some(st.sampled_from("xyz")),
        some(st.sampled_from(("n0", "n1"))),
    )  # fmt: skip


@st.composite
def clusters(draw: st.DrawFn) -> ClusterState:
    """Any consistent state: what is free is what the placed jobs left."""
    placed: list[PlacedJob] = []
    nodes: list[NodeState] = []
    for index in range(draw(st.integers(0, 4))):
        capacity = Resources(draw(st.sampled_from((1.0, 2.0, 8.0))), draw(st.sampled_from((1024, 24000))), draw(st.integers(0, 2)))
        free = capacity
        for request in draw(st.lists(requests, max_size=3)):
            if request.cpu <= free.cpu and request.memory_mb <= free.memory_mb and request.gpus <= free.gpus:
                free = Resources(free.cpu - request.cpu, free.memory_mb - request.memory_mb, free.gpus - request.gpus)
                placed.append(PlacedJob(f"p{len(placed)}", f"n{index}", request, tenant=draw(st.sampled_from(TENANTS))))
        slots = draw(st.dictionaries(st.sampled_from(PLUGINS), st.integers(0, 3)))
        nodes.append(NodeState(f"n{index}", capacity, free, slots, tuple(draw(st.lists(st.sampled_from("xyz"), max_size=2)))))
    pending = [draw(jobs(f"j{i}")) for i in range(draw(st.integers(0, 8)))]
    quotas = draw(st.dictionaries(st.sampled_from(TENANTS), requests))
    return ClusterState(draw(st.integers(0, 9)), 1000.0, tuple(nodes), tuple(pending), tuple(placed), quotas)


@given(clusters())
@settings(max_examples=300, deadline=None)
def test_what_never_happens(state: ClusterState) -> None:
    decisions = decide(state, DEFAULTS)
    assert decisions.version == state.version
    assert sorted(d.job for d in decisions.decisions) == sorted(j.id for j in state.pending)  # one for each
    assert all(d.reason for d in decisions.decisions)
    pending, nodes = {j.id: j for j in state.pending}, {n.name: n for n in state.nodes}
    starts = [(pending[d.job], d) for d in decisions.decisions if d.action == "place"]
    for name, node in nodes.items():
        here = [j.request for j, d in starts if d.node == name]
        assert not here or sum(r.cpu for r in here) <= node.free.cpu + CPU_TOLERANCE
        assert not here or sum(r.memory_mb for r in here) <= node.free.memory_mb
        assert not here or sum(r.gpus for r in here) <= node.free.gpus
        for plugin in PLUGINS:
            assert sum(d.node == name and d.plugin == plugin for _, d in starts) <= node.plugins.get(plugin, 0)
    assert all(d.plugin in j.plugins and d.node in nodes for j, d in starts)
    for tenant, quota in state.quotas.items():  # who asks for nothing of a resource is not held up by others' excess of it
        asked = [j.request for j, _ in starts if j.tenant == tenant]
        held = [j.request for j in state.placed if j.tenant == tenant]
        assert not any(r.cpu for r in asked) or sum(r.cpu for r in asked + held) <= quota.cpu + CPU_TOLERANCE
        assert not any(r.memory_mb for r in asked) or sum(r.memory_mb for r in asked + held) <= quota.memory_mb
        assert not any(r.gpus for r in asked) or sum(r.gpus for r in asked + held) <= quota.gpus


@given(clusters(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_same_state_gives_the_same_decisions(state: ClusterState, random) -> None:
    pending, nodes, placed = list(state.pending), list(state.nodes), list(state.placed)
    for items in (pending, nodes, placed):
        random.shuffle(items)
    shuffled = msgspec.structs.replace(state, pending=tuple(pending), nodes=tuple(nodes), placed=tuple(placed))
    assert {d.job: (d.action, d.node, d.plugin, d.score) for d in decide(state, DEFAULTS).decisions} \
        == {d.job: (d.action, d.node, d.plugin, d.score) for d in decide(shuffled, DEFAULTS).decisions}  # fmt: skip


@given(clusters())
@settings(max_examples=150, deadline=None)
def test_rejected_is_exactly_what_no_empty_cluster_could_run(state: ClusterState) -> None:
    rejected = {d.job for d in decide(state, DEFAULTS).decisions if d.action == "reject"}
    for job in state.pending:
        fits = any(job.request.cpu <= n.capacity.cpu and job.request.memory_mb <= n.capacity.memory_mb
                   and job.request.gpus <= n.capacity.gpus for n in state.nodes) or not state.nodes  # fmt: skip
        quota = state.quotas.get(job.tenant)
        allowed = quota is None or (job.request.cpu <= quota.cpu and job.request.memory_mb <= quota.memory_mb
                                    and job.request.gpus <= quota.gpus)  # fmt: skip
        assert (job.id in rejected) == (not (fits and allowed))


def node(name: str = "local", cpu: float = 2.0, free: float = 2.0, memory: int = 24000, **more) -> NodeState:
    return NodeState(name, Resources(cpu, memory), Resources(free, memory), **({"plugins": {"trainer": 4}} | more))


def job(id: str = "a", cpu: float = 1.0, **more) -> PendingJob:
    return PendingJob(id, id, Resources(cpu, 512), **({"plugins": ("trainer",), "submitted": 1000.0} | more))


def one(state: ClusterState, id: str = "a"):
    return next(d for d in decide(state, DEFAULTS).decisions if d.job == id)


@pytest.mark.parametrize(("state", "action", "reason"), [
    (ClusterState(1, 1000.0, (node(free=0.9),), (job(cpu=2.0),)), "wait", "waits: needs 2 cores, node local has 0.9 free"),
    (ClusterState(1, 1000.0, (node(),), (job(cpu=4.0),)), "reject", "can never run: needs 4 cores, node local has 2 in all"),
    (ClusterState(1, 1000.0, (), (job(cpu=4.0),)), "wait", "waits: no node has reported"),
    (ClusterState(1, 1000.0, (node(plugins={}),), (job(),)), "wait", "waits: plugin trainer is not ready on node local"),
    (ClusterState(1, 1000.0, (node(plugins={"trainer": 0}),), (job(),)), "wait",
     "waits: every instance of trainer on node local is at work"),
    (ClusterState(1, 1000.0, (node(),), (job(cpu=2.0),), quotas={"default": Resources(1.0, 9999)}), "reject",
     "can never run: needs 2 cores, the quota of tenant default has 1 in all"),
    (ClusterState(1, 1000.0, (node(),), (job(),), (PlacedJob("p", "local", Resources(1.0, 1)),), {"default": Resources(1.5, 9999)}),
     "wait", "waits: needs 1 core, the quota of tenant default has 0.5 left"),
    (ClusterState(1, 1000.0, (node(),), (job(cpu=-1.0),)), "reject", "asks for a negative amount: -1 cores and 512 MiB, 0 GPUs"),
])  # fmt: skip
def test_reasons_are_for_people(state: ClusterState, action: str, reason: str) -> None:
    decision = one(state)
    assert (decision.action, decision.reason) == (action, reason)


def test_who_is_not_ready_is_named_with_the_commands_that_say_why() -> None:
    bare = [node(name, plugins={}) for name in "abcd"]
    decision = one(ClusterState(1, 1000.0, tuple(bare[:1]), (job(plugins=("wide:trainer", "other")),)))
    assert decision.reason == "waits: plugin trainer or other is not ready on node a"
    for command in ("kernelm plugin list", "kernelm ps --all", "kernelm doctor"):
        assert f"`{command}`" in decision.remedy
    decision = one(ClusterState(1, 1000.0, tuple(bare), (job(plugins=("trainer/1",)),)))  # so where no plugin for it is known
    assert decision.reason == "waits: no plugin that implements trainer/1 is ready on any node that could hold it"
    assert decision.remedy.startswith("a plugin that implements trainer/1 gets ready there: `kernelm plugin list` says which do")


def served(name: str, cpu: float, replicas: int = 1, **more) -> ModelState:
    return ModelState(name, request=Resources(cpu, 100), replicas=replicas, allocation=(Share("local", replicas),), **more)


@pytest.mark.parametrize(("models", "free", "cpu", "remedy"), [
    ((), 0.5, 1.0, "jobs on node local end, or a node with room"),
    ((served("words", 0.5, 3),), 0.5, 1.0,
     "deployment words, with 1.5 cores on node local, is taken away (`kernelm model undeploy words`), or a node with room"),
    ((served("words", 0.5),), 0.5, 1.0,
     "jobs on node local end, or deployment words, with 0.5 cores on node local, is taken away (`kernelm model undeploy words`), "
     "or a node with room"),
    ((served("words", 0.5),), 0.5, 2.0, "jobs on node local end and deployment words, with 0.5 cores on node local, is taken away "
                                        "(`kernelm model undeploy words`), or a node with room"),
    ((served("words", 0.2),), 0.5, 1.0, "jobs on node local end, or a node with room"),  # the model alone would not do
    (tuple(served(name, 0.1 * (k + 1)) for k, name in enumerate("abcd")), 1.0, 2.0,
     "one or more of the deployments d, c, b and 1 more, with 1 core on node local, are taken away (`kernelm model undeploy`), "
     "or a node with room"),
])  # fmt: skip
def test_what_would_start_it_names_who_holds_them(models: tuple[ModelState, ...], free: float, cpu: float, remedy: str) -> None:
    decision = one(ClusterState(1, 1000.0, (node(free=free),), (job(cpu=cpu),), models=models))
    assert decision.reason == f"waits: needs {cpu:g} core{'s' * (cpu != 1)}, node local has {free:g} free"
    assert decision.remedy == remedy


def test_who_holds_cores_does_not_hold_memory() -> None:
    full = NodeState("local", Resources(2.0, 1000), Resources(1.0, 100), {"trainer": 4})
    decision = one(ClusterState(1, 1000.0, (full,), (job(),), models=(served("words", 1.0),)))
    assert decision.reason == "waits: needs 512 MiB, node local has 100 free"
    assert decision.remedy == "jobs on node local end, or a node with room"


@pytest.mark.parametrize(("models", "placed", "remedy"), [
    ((served("words", 0.5),), (), "deployment words of tenant default is taken away (`kernelm model undeploy words`), "),
    ((served("words", 0.5),), (PlacedJob("p", "local", Resources(0.25, 1)),),
     "jobs of tenant default end, or deployment words of tenant default is taken away (`kernelm model undeploy words`), "),
    ((served("words", 0.5, tenant="acme"),), (PlacedJob("p", "local", Resources(0.5, 1)),), "jobs of tenant default end, "),
])  # fmt: skip
def test_so_does_what_is_said_of_a_quota(models: tuple[ModelState, ...], placed: tuple[PlacedJob, ...], remedy: str) -> None:
    decision = one(ClusterState(1, 1000.0, (node(),), (job(cpu=0.5),), placed, {"default": Resources(0.75, 9999)}, models=models))
    assert decision.reason.startswith("waits: needs 0.5 cores, the quota of tenant default has 0")
    assert decision.remedy == f"{remedy}or a larger quota"


def test_a_tighter_node_is_preferred_and_the_reason_says_so() -> None:
    decision = one(ClusterState(1, 1000.0, (node("big", 8.0, 8.0), node("small", 2.0, 2.0)), (job(),)))
    assert (decision.action, decision.node, decision.plugin) == ("place", "small", "trainer")
    assert decision.reason.startswith("trainer on small, which has 2 cores and 24000 MiB free; packing ")


def test_a_node_with_the_dataset_is_preferred() -> None:
    nodes = (node("a"), node("b", artifacts=("sha256:d",)))
    assert one(ClusterState(1, 1000.0, nodes, (job(artifacts=("sha256:d",)),))).node == "b"


def test_a_tenant_s_jobs_spread() -> None:
    placed = (PlacedJob("p", "a", Resources(0.0, 0)),)
    assert one(ClusterState(1, 1000.0, (node("a"), node("b")), (job(),), placed)).node == "b"


def test_a_node_on_which_it_failed_is_avoided_unless_there_is_no_other() -> None:
    assert one(ClusterState(1, 1000.0, (node("a"), node("b")), (job(avoid=("a",)),))).node == "b"
    assert one(ClusterState(1, 1000.0, (node("a"), node("b", free=0.0)), (job(avoid=("a",)),))).action == "wait"
    assert one(ClusterState(1, 1000.0, (node("a"),), (job(avoid=("a",)),))).node == "a"
    assert one(ClusterState(1, 1000.0, (node("a"), node("b", plugins={})), (job(avoid=("a",)),))).node == "a"


def test_waiting_counts_as_priority() -> None:
    young, old = job("young", priority=1), job("old", submitted=1000.0 - 2 * DEFAULTS.aging_s)
    assert [j.id for j in order(ClusterState(1, 1000.0, (), (young, old)), DEFAULTS)] == ["old", "young"]
    slightly_older = job("old", submitted=1000.0 - 0.5 * DEFAULTS.aging_s)
    assert [j.id for j in order(ClusterState(1, 1000.0, (), (slightly_older, young)), DEFAULTS)] == ["young", "old"]


def simulate(reservations: int, seconds: int = 1000) -> float | None:
    """When a job of 2 cores starts on a node of 2 cores while a job of 1 core and 10 s comes every 5 s, at higher priority."""
    running: dict[str, float] = {}
    large = job("large", cpu=2.0, submitted=0.0)
    waiting: list[PendingJob] = [large]
    for now in range(0, seconds, 5):
        running = {id: end for id, end in running.items() if end > now}
        waiting.append(job(f"small-{now}", submitted=float(now), priority=1))
        state = ClusterState(now, float(now), (node(free=2.0 - len(running)),), tuple(waiting))
        for d in decide(state, Settings(reservations=reservations)).decisions:
            if d.action == "place":
                if d.job == "large":
                    return float(now)
                running[d.job] = now + 10.0
                waiting = [j for j in waiting if j.id != d.job]
    return None


def test_a_stream_of_small_jobs_does_not_starve_a_large_one() -> None:
    started = simulate(reservations=8)
    assert started is not None
    assert started <= DEFAULTS.aging_s + 10.0 + 5.0  # it has caught up with priority 1 by then; the last small ones end
    assert simulate(reservations=0) is None  # the reservation is what does it


def test_who_is_decided_on_is_gathered_once_a_round_and_not_for_each_waiting_job(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Round] = []
    decided = Round.decided
    monkeypatch.setattr(Round, "decided", lambda round: asked.append(round) or decided(round))
    waiting = tuple(job(f"j{n}", submitted=float(n)) for n in range(20))
    answer = decide(ClusterState(1, 1000.0, (node(),), waiting), DEFAULTS)
    assert [d.action for d in answer.decisions] == ["place"] * 2 + ["wait"] * 18
    assert len(asked) == 1


def test_settings_refuse_what_makes_no_sense() -> None:
    for bad in ({"aging_s": 0}, {"weights": {"packing": -1}}, {"wieghts": {}}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(bad, Settings)
    assert Settings(weights=Weights(0.0, 0.0, 0.0)).aging_s > 0
    assert one(ClusterState(1, 1000.0, (node(),), (job(),))).score > 0
