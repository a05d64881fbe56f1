"""Placement by a real Ray cluster of two nodes. Ray listens on all interfaces: the cases run in their own network namespace."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from kernelm.testing.parts import absent
from kernelm_contracts.scheduler import ClusterState, Decision, ModelState, NodeState, PendingJob, PlacedJob, Share, Tenant
from kernelm_jobs.checks import check
from kernelm_sdk.errors import PluginFault
from kernelm_sdk.system import Resources

INSIDE = os.environ.get("KERNELM_RAY_NAMESPACE") == "1"
inside = pytest.mark.skipif(not INSIDE, reason="runs in a network namespace: test_in_a_namespace_of_their_own does that")
CORES, MEMORY_MB = 4.0, 1024


def missing() -> str:
    """What these tests need and this machine has not; "" for nothing."""
    for program in ("unshare", "ip"):
        if shutil.which(program) is None:
            return f"there is no {program} (util-linux, iproute2)"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        return "this user may not make a network namespace"
    try:
        import ray  # noqa: F401

        import kernelm_rayscheduler  # noqa: F401
    except ImportError:
        return "the plugin and Ray are not installed: pip install -e plugins/rayscheduler"
    return ""


@pytest.mark.skipif(INSIDE, reason="is inside")
@pytest.mark.timeout(300)
def test_in_a_namespace_of_their_own() -> None:
    if why := missing():
        absent(why)
    pytest_ = [sys.executable, "-m", "pytest", "-qx", __file__]
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', *pytest_]
    done = subprocess.run(command, env={**os.environ, "KERNELM_RAY_NAMESPACE": "1"}, cwd=Path(__file__).parents[3], text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


class Cluster:
    """Two nodes, as kernelm and as Ray have them, and jobs on them."""

    def __init__(self, address: str) -> None:
        from kernelm_rayscheduler.plugin import RayScheduler
        from kernelm_rayscheduler.settings import Settings

        self.make = lambda: RayScheduler(SimpleNamespace(scratch=Path.cwd()), Settings(address=address))  # type: ignore[arg-type]
        self.plugin = self.make()
        self.pending: dict[str, PendingJob] = {}
        self.placed: dict[str, PlacedJob] = {}
        self.models: tuple[ModelState, ...] = ()
        self.tenants: tuple[Tenant, ...] = ()
        self.version = 0

    def submit(self, id: str, cpu: float, **more: Any) -> None:
        self.pending[id] = PendingJob(id, id, Resources(cpu, 10), ("t",), submitted=float(len(self.pending)), **more)

    def state(self) -> ClusterState:
        self.version += 1
        free = dict.fromkeys("ab", CORES)
        for held in (*self.placed.values(), *self.models):
            for share in held.allocation:
                free[share.node] -= share.members * held.request.cpu
        nodes = tuple(NodeState(n, Resources(CORES, MEMORY_MB), Resources(f, MEMORY_MB // 2), {"t": 99}) for n, f in free.items())
        pending, placed = tuple(self.pending.values()), tuple(self.placed.values())
        return ClusterState(self.version, 1000.0, nodes, pending, placed, {}, self.tenants, self.models, ("scale",))

    async def decided(self) -> dict[str, Decision]:
        """The decisions, none of which the job table would refuse."""
        state = self.state()
        answer = await self.plugin.decide(state, None)
        assert check(state, answer).refused == {}
        return {d.job: d for d in answer.decisions}

    async def round(self) -> dict[str, Decision]:
        """Decide, and carry it out."""
        decisions = await self.decided()
        for d in decisions.values():
            if d.action == "place":
                job = self.pending.pop(d.job)
                self.placed[d.job] = PlacedJob(job.id, d.node, job.request, tenant=job.tenant, plugins=("t",), members=job.members,
                                               allocation=d.allocation or (Share(d.node),))  # fmt: skip
        return decisions


def started() -> Any:
    """Two nodes that name themselves, and a head without cores. Ray gives each 30 s to start, whatever the load: again then."""
    from ray.cluster_utils import Cluster as RayCluster

    for last in (False, False, True):
        cluster = RayCluster()
        try:
            cluster.add_node(num_cpus=0, include_dashboard=False, node_ip_address="127.0.0.1")
            for name in "ab":
                labels = {"kernelm-node": name}
                cluster.add_node(num_cpus=CORES, memory=MEMORY_MB * 2**20, labels=labels, node_ip_address="127.0.0.1")
            break
        except Exception as error:
            cluster.shutdown()
            if last or "timed out during startup" not in str(error):
                raise
    return cluster


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    cluster = started()
    yield cluster
    cluster.shutdown()


@pytest.fixture
async def cluster(ray_cluster: Any) -> Any:
    from kernelm_rayscheduler.mapping import Group

    made = Cluster(ray_cluster.address)
    await made.plugin.on_start()
    yield made
    made.pending, made.placed, made.models = {}, {}, ()
    await made.decided()  # gives all groups up
    left: dict[str, Group] = made.plugin._groups.table()
    await made.plugin.on_stop()
    assert left == {}


@inside
async def test_ray_places_gangs_whole_and_says_why_others_wait(cluster: Cluster) -> None:
    cluster.submit("gang", 2.0, members=3)  # over both nodes
    cluster.submit("small", 1.0)
    cluster.submit("late", 3.0)
    cluster.submit("never", 5.0)
    first = await cluster.round()
    assert [first[id].action for id in ("gang", "small", "late", "never")] == ["place", "place", "wait", "wait"]
    assert sum(share.members for share in first["gang"].allocation) == 3
    assert "Ray has no room" in first["late"].reason
    assert "no nodes of Ray could hold it" in first["never"].reason
    del cluster.placed["gang"]
    assert (await cluster.round())["late"].action == "place"


@inside
async def test_members_stay_together_where_they_must_and_away_from_where_they_failed(cluster: Cluster) -> None:
    cluster.submit("other", 2.0, avoid=("b",))
    cluster.submit("pair", 2.0, members=2, within="node", priority=-1)
    decisions = await cluster.round()
    assert decisions["other"].node == "a"
    assert decisions["pair"].allocation == (Share("b", 2),)


@inside
async def test_the_highest_priority_is_first_in_rays_queue_whenever_it_came(cluster: Cluster) -> None:
    cluster.submit("both", 4.0, members=2)
    await cluster.round()
    cluster.submit("low", 4.0, members=2)
    await cluster.round()
    cluster.submit("high", 4.0, members=2, priority=1)
    await cluster.round()
    del cluster.placed["both"]
    decisions = await cluster.round()
    assert (decisions["high"].action, decisions["low"].action) == ("place", "wait")


@inside
async def test_what_runs_without_a_group_is_counted_by_ray_and_a_restart_finds_all_again(cluster: Cluster) -> None:
    """Placed by another scheduler before, and a served model: its replicas stay, and nobody gets their cores."""
    cluster.placed["old"] = PlacedJob("old", "a", Resources(4.0, 10), plugins=("t",), allocation=(Share("a"),))
    cluster.models = (ModelState("m", request=Resources(3.0, 10), replicas=1, allocation=(Share("b"),)),)
    cluster.submit("one", 1.0)
    cluster.submit("two", 1.0)
    decisions = await cluster.round()
    assert (decisions["one"].node, decisions["two"].action) == ("b", "wait")
    await cluster.plugin.on_stop()
    cluster.plugin = cluster.make()
    await cluster.plugin.on_start()
    found = {id: len(group.nodes) for id, group in cluster.plugin._groups.table().items()}
    assert found == {"old": 1, "model m": 1, "one": 1, "two": 0}
    cluster.models = ()
    assert (await cluster.round())["two"].node == "b"


@inside
async def test_a_model_that_has_gone_to_zero_wakes_when_it_is_called_before_any_job(cluster: Cluster) -> None:
    model = ModelState("m", request=Resources(2.0, 10), plugins=("t",), maximum=3)
    cluster.models = (model,)
    assert "m" not in await cluster.decided()
    for n in range(8):
        cluster.submit(f"j{n}", 1.0)
    cluster.models = (replace(model, queue=1),)
    decision = (await cluster.decided())["m"]
    assert (decision.action, [share.members for share in decision.allocation]) == ("scale", [1])
    cluster.models = (replace(model, replicas=1, allocation=decision.allocation),)
    decisions = await cluster.round()
    assert "m" not in decisions
    assert sum(d.action == "place" for d in decisions.values()) == 6


@inside
async def test_a_model_that_lost_a_node_gets_as_many_replicas_again_where_there_is_room_before_any_job(cluster: Cluster) -> None:
    model = ModelState("m", request=Resources(2.0, 10), plugins=("t",), replicas=1, allocation=(Share("a"),), minimum=4, maximum=4)
    cluster.models = (model,)
    cluster.placed["old"] = PlacedJob("old", "b", Resources(2.0, 10), plugins=("t",), allocation=(Share("b"),))
    for n in range(3):
        cluster.submit(f"j{n}", 1.0)
    decision = (await cluster.decided())["m"]
    assert (decision.action, decision.allocation) == ("scale", (Share("a", 2), Share("b")))  # of three that it lacks, two have room
    cluster.models = (replace(model, replicas=3, allocation=decision.allocation),)
    waits = await cluster.round()
    assert (waits["m"].action, waits["m"].reason) == ("wait", "waits: Ray has no room for it now")
    assert all(waits[f"j{n}"].action == "wait" for n in range(3))
    del cluster.placed["old"]
    decisions = await cluster.round()
    assert decisions["m"].allocation == (Share("a", 2), Share("b", 2))
    found = {id: len(group.nodes) for id, group in cluster.plugin._groups.table().items() if group.nodes}
    assert found == {"model m": 3, "model m 4": 1}
    cluster.models = (replace(model, replicas=4, allocation=decisions["m"].allocation),)
    await cluster.round()
    assert {id for id in cluster.plugin._groups.table() if id.startswith("model")} == {"model m"}


@inside
async def test_quotas_are_kept_which_ray_does_not_know(cluster: Cluster) -> None:
    cluster.tenants = (Tenant("acme", nominal=Resources(2.0, 999), cohort="c"),)
    for n in range(3):
        cluster.submit(f"j{n}", 1.0, tenant="acme")
    decisions = await cluster.round()
    assert [d.action for d in decisions.values()] == ["place", "place", "wait"]
    assert decisions["j2"].reason == "waits: tenant acme would hold more than its 2 cores"


@inside
async def test_a_placement_that_was_not_carried_out_is_said_again(cluster: Cluster) -> None:
    cluster.submit("j", 2.0)
    first = (await cluster.decided())["j"]
    assert (await cluster.decided())["j"] == first
    cluster.pending["j"] = replace(cluster.pending["j"], avoid=(first.node,))  # it has failed there meanwhile
    assert (await cluster.decided())["j"].node != first.node


@inside
async def test_through_any_sequence_nothing_is_refused_or_lost(cluster: Cluster) -> None:
    rng, submitted, done = random.Random(7), 0, 0
    for step in range(60):
        if step < 40:
            cluster.submit(f"j{step}", rng.choice((0.5, 1.0, 2.0, 4.0)), members=rng.choice((1, 1, 2)), priority=rng.randint(0, 2))
            submitted += 1
        await cluster.round()
        for id in [id for id in cluster.placed if rng.random() < 0.4]:
            del cluster.placed[id]
            done += 1
        assert len(cluster.pending) + len(cluster.placed) + done == submitted
    assert not cluster.pending


@inside
async def test_without_ray_the_plugin_says_so_and_does_not_start() -> None:
    from kernelm_rayscheduler.plugin import RayScheduler
    from kernelm_rayscheduler.settings import Settings

    plugin = RayScheduler(SimpleNamespace(scratch=Path.cwd()), Settings(address="127.0.0.1:1"))  # type: ignore[arg-type]
    with pytest.raises(PluginFault, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        await plugin.on_start()
