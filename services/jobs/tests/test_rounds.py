"""A round as pure functions: what the scheduler sees, and which of its decisions are refused."""

import msgspec
import pytest

from kernelm_contracts.deployments import Avoided, Deployment, DeployRequest
from kernelm_contracts.jobs import JobRecord, JobSpec
from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, ModelState, NodeState, PendingJob, PlacedJob, Share
from kernelm_jobs.checks import check
from kernelm_jobs.deployment import pool_spec
from kernelm_jobs.holdings import holdings, missed, stranded
from kernelm_jobs.placing import fits, on_its_nodes
from kernelm_jobs.rounds import (
    Crews,
    Free,
    Shown,
    choose,
    cluster_state,
    deadlock,
    loaded_models,
    pending_jobs,
    plugins_for,
    workers,
)
from kernelm_sdk.system import Destination, Instance, NodeReport, PoolSpec, Resources, Route, SystemState


def instance(id: str, plugin: str = "trainer", state: str = "ready", pool: str = "", contract: str = "trainer/1") -> Instance:
    return Instance(id, plugin, "1", pool or plugin, "local", state, (contract,))


MODEL, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
SERVING = "news-g1-aaaaaaaa"
MODEL_POOL = pool_spec(DeployRequest("news", MODEL), 1, {"local": 1})
SYSTEM = SystemState(
    (instance("t-1"), instance("t-2"), instance("t-3", state="draining"), instance("e-1", "encoder", contract="server/1"),
     instance("e-2", "encoder", pool=SERVING, contract="server/1"), instance("x-1", "other", pool="other")),
    (PoolSpec("trainer", "trainer"), PoolSpec("encoder", "encoder"), MODEL_POOL),
    (Route("trainer/1", "svc", (Destination("trainer", 100),)),), 1,
)  # fmt: skip
REPORT = NodeReport("local", Resources(2.0, 8000), Resources(1.0, 4000), (), {"trainer": "1", "encoder": "1"})


def job(id: str, state: str = "queued", cpu: float = 1.0, **more) -> JobRecord:
    fields = {k: more.pop(k) for k in ("node", "instance") if k in more}
    values = {"uses": "trainer/1.train", "request": {"dataset": "sha256:" + "d" * 64}, "resources": Resources(cpu, 512)} | more
    return JobRecord(id, JobSpec(id, **values), "key", state, **fields)


def test_the_scheduler_sees_what_jobs_left() -> None:
    jobs = [job("a"), job("b", "running", 0.5, node="local", instance="t-1"), job("c", "done", node="local", instance="t-2"),
            job("d", uses="deploy", request={"name": "news", "model": MODEL})]  # fmt: skip
    ready = workers(SYSTEM, jobs, {"encoder": 2})
    assert {w.instance: w.free for w in ready} == {"t-1": 0, "t-2": 1, "e-1": 2, "x-1": 1}  # no draining one, none that serves
    assert {w.instance for w in workers(SYSTEM, jobs, {}, {"t-2"})} == {"t-1", "e-1", "x-1"}
    pending = pending_jobs([j for j in jobs if j.state == "queued"], SYSTEM, {}, {}, Shown())
    state = cluster_state(7, 100.0, holdings(jobs, {}, SYSTEM), pending, [REPORT], ready, {"default": Resources(9.0, 9)})
    slots = {"trainer": 1, "encoder": 2, "other": 1, "pool:encoder": 1}
    assert state.nodes == (NodeState("local", Resources(2.0, 8000), Resources(1.5, 7488), slots),)
    assert [(p.id, p.plugins, p.artifacts) for p in state.pending] == [("a", ("trainer",), ("sha256:" + "d" * 64,)),
                                                                      ("d", ("pool:encoder",), (MODEL,))]  # fmt: skip
    assert [(p.id, p.node) for p in state.placed] == [("b", "local")]


def test_the_scheduler_is_told_what_lies_where_as_far_as_it_is_asked_for() -> None:
    report = msgspec.structs.replace(REPORT, artifacts=(MODEL, OTHER, "sha256:" + "d" * 64))
    assert loaded_models(SYSTEM) == {"local": (MODEL,)}
    wanted = pending_jobs([job("a", request={"base": MODEL, "dataset": "sha256:" + "d" * 64})], SYSTEM, {}, {}, Shown())
    state = cluster_state(7, 100.0, [], wanted, [report], [], {}, loaded=loaded_models(SYSTEM))
    assert state.nodes[0].artifacts == (MODEL, "sha256:" + "d" * 64)
    assert state.nodes[0].models == (MODEL,)
    bare = cluster_state(7, 100.0, [], [], [report], [], {}, loaded=loaded_models(SYSTEM))
    assert (bare.nodes[0].artifacts, bare.nodes[0].models) == ((), ())


def test_what_a_deployment_holds_follows_its_instances() -> None:
    served = job("d", "running", 0.5, uses="deploy", request={"name": "news", "model": MODEL}, node="local")
    served = msgspec.structs.replace(served, result={"model": "news", "pool": SERVING})
    record = Deployment("news", 1, MODEL, SERVING, "encoder", "d", replicas=3, node="local")
    [held] = holdings([served], {"news": record}, SYSTEM)
    assert (held.model, held.shares, held.on("local")) == ("news", (Share("local", 3),), Resources(1.5, 1536))
    [asleep] = holdings([served], {"news": msgspec.structs.replace(record, replicas=0)}, SYSTEM)
    assert asleep.shares == (Share("local", 1),)  # its instance still ends
    gone = msgspec.structs.replace(SYSTEM, instances=())
    [none] = holdings([served], {"news": msgspec.structs.replace(record, replicas=0)}, gone)
    assert (none.model, none.shares) == ("news", ())
    model = ModelState("news", replicas=0, maximum=2, plugins=("model:news",))
    state = cluster_state(7, 100.0, [none], [], [REPORT], [], {}, models=[model])
    assert (state.placed, state.nodes[0].plugins, state.nodes[0].free) == ((), {"model:news": 2}, Resources(2.0, 8000))


def test_a_deployment_whose_node_is_gone_holds_nothing_and_what_lives_elsewhere_is_counted_there() -> None:
    served = job("d", "running", 0.5, uses="deploy", request={"name": "news", "model": MODEL}, node="far")
    served = msgspec.structs.replace(served, result={"model": "news", "pool": SERVING})
    record = Deployment("news", 1, MODEL, SERVING, "encoder", "d", replicas=2, node="far")
    node = Instance("node-far", "node", "", "node", "", "ready", ("node/1",))
    here = Instance("e-2", "encoder", "1", SERVING, "far", "ready", ("server/1",))
    lost = msgspec.structs.replace(node, state="lost", reason="no sign of life for 5 s")

    def system(*instances: Instance) -> SystemState:
        return msgspec.structs.replace(SYSTEM, instances=instances)

    def shares(*instances: Instance, of: Deployment = record) -> tuple[Share, ...]:
        [held] = holdings([served], {"news": of}, system(*instances))
        return held.shares

    gone = msgspec.structs.replace(here, state="lost")
    assert shares(node, gone) == (Share("far", 2),), "it starts them again"
    assert shares(lost, here) == (Share("far", 2),), "an instance may outlive the node's process, which is started again"
    assert shares(lost, gone) == () == shares(gone)
    assert stranded(record, ["far"], system(lost, gone)) == "node far is lost: no sign of life for 5 s"
    assert stranded(msgspec.structs.replace(record, replicas=0), [], system(lost, gone)) == ""
    moved = msgspec.structs.replace(record, node="local")
    assert shares(lost, gone, msgspec.structs.replace(node, id="node-local"), of=moved) == (Share("local", 2),)
    assert shares(here, msgspec.structs.replace(node, id="node-local"), of=moved) == (Share("far", 1), Share("local", 2))
    both = msgspec.structs.replace(record, places={"far": 1, "local": 1})
    near = msgspec.structs.replace(node, id="node-local")
    assert shares(lost, gone, near, of=both) == (Share("local", 1),), "that on the other node is still there"
    assert missed(both, both.spread, system(lost, gone, near)) == {"far": "node far is lost: no sign of life for 5 s"}
    assert stranded(both, both.spread, system(lost, gone, near)) == ""
    assert stranded(both, both.spread, system(lost, gone)) == "node far is lost: no sign of life for 5 s; node local is not there"
    superseded = msgspec.structs.replace(record, job="another")
    assert holdings([served], {"news": superseded}, system(lost, gone)) == []


def test_a_pool_fits_that_has_on_each_node_what_was_decided_and_none_where_it_was_given_up() -> None:
    record = Deployment("news", 1, MODEL, SERVING, "encoder", "d", replicas=3, node="a", places={"a": 2, "b": 1})
    pool = PoolSpec(SERVING, "encoder", 3, node="a", places={"a": 2, "b": 1})
    assert on_its_nodes(pool, record)
    assert fits(pool, record)
    other = msgspec.structs.replace(pool, places={"a": 1, "b": 2})
    assert on_its_nodes(other, record)
    assert not fits(other, record)
    assert not on_its_nodes(msgspec.structs.replace(pool, places={}), record)
    empty = msgspec.structs.replace(pool, instances=0, places={})
    assert not fits(empty, record)
    gone = msgspec.structs.replace(record, avoid=dict.fromkeys(("a", "b"), Avoided(1.0, "it crashes")))
    assert on_its_nodes(empty, gone)
    assert fits(empty, gone), "nothing is left to do"
    assert not fits(pool, gone)


@pytest.mark.parametrize(("shares", "refused"), [
    ((Share("local", 2),), {}), ((Share("local", 1),), {}),  # as many as there is room for
    ((), {"news": "the scheduler gave it 0 replicas, not 2 to 2"}),
    ((Share("local", 3),), {"news": "the scheduler gave it 3 replicas, not 2 to 2"}),
])  # fmt: skip
def test_a_model_that_has_too_few_replicas_may_get_some_of_them(shares: tuple[Share, ...], refused: dict[str, str]) -> None:
    node = NodeState("local", Resources(4.0, 8000), Resources(4.0, 8000), {"model:news": 9})
    model = ModelState("news", request=Resources(1.0, 1), plugins=("model:news",), minimum=2, maximum=2)
    state = ClusterState(3, 100.0, (node,), (), models=(model,), actions=("scale",))
    assert check(state, Decisions(3, (Decision("news", "scale", "local", "model:news", "r", 0.0, shares),))).refused == refused
    assert not check(state, Decisions(3, (Decision("news", "wait", reason="no room"),))).refused


def test_replicas_are_carried_out_as_far_as_there_is_room_now() -> None:
    node = NodeState("a", Resources(4.0, 8000), Resources(1.0, 8000), {"model:news": 9})
    nodes = (node, msgspec.structs.replace(node, name="b", free=Resources(4.0, 8000)))
    model = ModelState("news", request=Resources(1.0, 1), plugins=("model:news",), minimum=2, maximum=4)
    state = ClusterState(3, 100.0, nodes, (), models=(model,), actions=("scale",))
    decision = Decision("news", "scale", "a", "model:news", "r", 0.0, (Share("a", 1), Share("b", 2)))
    assert Free(state).scale(decision, state).allocation == (Share("a", 1), Share("b", 2))
    serving = msgspec.structs.replace(model, replicas=1, allocation=(Share("a", 1),))
    state = msgspec.structs.replace(state, models=(serving,))
    more = msgspec.structs.replace(decision, allocation=(Share("a", 3), Share("b", 1)))
    assert Free(state).scale(more, state).allocation == (Share("a", 2), Share("b", 1))
    apart = msgspec.structs.replace(decision, allocation=(Share("a", 1), Share("a", 1), Share("a", 1)))  # a share for each
    assert Free(state).scale(apart, state).allocation == (Share("a", 2),)


def test_the_plugin_is_the_user_s_choice_then_the_route_s() -> None:
    installed = {"mock": ("data/1",)}
    assert plugins_for("trainer/1", "other", SYSTEM, installed) == ("other",)
    assert plugins_for("trainer/1", "", SYSTEM, installed) == ("trainer",)  # `other` is ready too, but not routed to
    assert plugins_for("server/1", "", SYSTEM, installed) == ("encoder",)
    assert plugins_for("data/1", "", SYSTEM, installed) == ("mock",)
    asked = pending_jobs([job("a", uses="optimizer/1.optimize")], SYSTEM, installed, {}, Shown())
    assert asked[0].plugins == ("optimizer/1",)


STATE = ClusterState(
    3, 100.0, (NodeState("local", Resources(2.0, 8000), Resources(1.5, 8000), {"trainer": 2}),),
    tuple(PendingJob(id, id, Resources(cpu, 512), ("trainer",), tenant=tenant)
          for id, cpu, tenant in (("a", 1.0, "default"), ("b", 0.5, "default"), ("c", 0.25, "acme"), ("d", 0.25, "acme"))),
    (PlacedJob("p", "local", Resources(0.5, 0), tenant="acme"),), {"acme": Resources(0.8, 9000)},
)  # fmt: skip


def place(id: str, node: str = "local", plugin: str = "trainer") -> Decision:
    return Decision(id, "place", node, plugin, "because")


def wait(*ids: str) -> list[Decision]:
    return [Decision(id, "wait", reason="waits") for id in ids]


@pytest.mark.parametrize(("decisions", "refused"), [
    ([place("a"), place("b"), *wait("c", "d")], {}),
    ([place("a"), place("a"), *wait("b", "c", "d")], {"a": "the scheduler decided on it twice"}),
    ([place("a", "mars"), *wait("b", "c", "d")], {"a": "the scheduler placed it on 'mars', which is no node"}),
    ([place("a", plugin="data"), *wait("b", "c", "d")], {"a": "the scheduler gave it to plugin 'data', which can't do it"}),
    ([place("b"), place("c"), place("a"), *wait("d")], {"a": "the scheduler gave it to trainer on local, which has no free slot"}),
    ([place("c"), place("d"), *wait("a", "b")], {"d": "the scheduler broke the quota of tenant acme"}),
    ([*wait("a", "b", "c")], {"d": "the scheduler gave no decision"}),
    ([*wait("a", "b", "c", "d", "z")], {"z": "the scheduler decided on a job that does not wait"}),
    ([Decision("a", "wait"), *wait("b", "c", "d")], {"a": "the scheduler gave no reason to wait"}),
])  # fmt: skip
def test_bad_decisions_are_refused_and_the_others_stand(decisions: list[Decision], refused: dict[str, str]) -> None:
    checked = check(STATE, Decisions(3, tuple(decisions)))
    assert checked.refused.keys() == refused.keys()
    assert all(checked.refused[id].startswith(text) for id, text in refused.items())
    assert len(checked.accepted) == len(decisions) - len(refused.keys() & {d.job for d in decisions})


def test_oversubscription_is_refused() -> None:
    greedy = msgspec.structs.replace(STATE.pending[1], request=Resources(0.6, 1))
    state = msgspec.structs.replace(STATE, pending=(STATE.pending[0], greedy))
    checked = check(state, Decisions(3, (place("a"), place("b"))))
    assert checked.refused["b"].startswith("the scheduler oversubscribed node local")
    assert [d.job for d in checked.accepted] == ["a"]


def test_decisions_on_another_version_are_all_refused() -> None:
    checked = check(STATE, Decisions(2, (place("a"),)))
    assert checked.accepted == []
    assert set(checked.refused) == {"a", "b", "c", "d"}


def test_the_instance_with_the_most_room_is_chosen() -> None:
    ready = workers(SYSTEM, [job("b", "running", node="local", instance="t-1")], {"trainer": 2})
    chosen = choose("local", "trainer", "trainer/1", Crews(ready))
    assert chosen is not None
    assert chosen.instance == "t-2"
    assert choose("local", "encoder", "trainer/1", Crews(ready)) is None
    crews = Crews(ready)
    for instance in ("t-2", "t-1", "t-2"):
        again = choose("local", "trainer", "trainer/1", crews)
        assert again is not None
        assert again.instance == instance
        crews.took(instance)
    assert choose("local", "trainer", "trainer/1", crews) is None


def test_a_child_that_can_never_run_beside_its_parent_is_found() -> None:
    nodes = [NodeState("local", Resources(2.0, 8000), Resources(0.0, 0))]
    jobs = {j.id: j for j in (job("parent", "running", 1.5, node="local"), job("child", cpu=1.0, parent="parent"),
                              job("small", cpu=0.5, parent="parent"), job("stranger", cpu=1.0))}  # fmt: skip
    assert "parent holds 1.5 cores" in deadlock(jobs["child"], jobs, nodes)
    assert deadlock(jobs["small"], jobs, nodes) == ""
    assert deadlock(jobs["stranger"], jobs, nodes) == ""
    assert deadlock(jobs["child"], jobs, [*nodes, NodeState("second", Resources(1.0, 600), Resources(0.0, 0))]) == ""


def test_what_has_not_changed_is_shown_as_the_same_object() -> None:
    shown, ready = Shown(), workers(SYSTEM, [], {})
    waiting, running = job("a"), msgspec.structs.replace(job("b", "running", node="local", instance="t-1"), started=90.0)

    def state(now: float, *jobs: JobRecord) -> ClusterState:
        shown.again()
        queued = [j for j in jobs if j.state == "queued"]
        pending = pending_jobs(queued, SYSTEM, {}, {}, shown)
        return cluster_state(1, now, holdings(jobs, {}, SYSTEM), pending, [REPORT], ready, {}, shown=shown)

    first = state(100.0, waiting, running)
    asked = pending_jobs([waiting], SYSTEM, {}, {}, Shown())
    assert first == cluster_state(1, 100.0, holdings([running], {}, SYSTEM), asked, [REPORT], ready, {})
    again = state(101.0, waiting, running)
    assert (again.pending[0] is first.pending[0], again.placed[0] is first.placed[0]) == (True, True)
    later = state(121.0, msgspec.structs.replace(waiting, attempt=1), running)
    assert (later.pending[0].attempt, later.placed[0].served_s) == (1, 30.0)
