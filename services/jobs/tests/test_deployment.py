"""A deployment as pure functions: which generation, what the kernel is asked for, how a swap shows and ends."""

from typing import Any

import msgspec
import pytest

from kernelm_contracts.deployments import Deployment, DeployRequest
from kernelm_jobs.deployment import (
    Attempt,
    already_serves,
    check,
    follows,
    next_generation,
    outdated_pools,
    pool_of,
    pool_spec,
    progress_of,
    raise_if_over,
    source_of,
    swap_request,
)
from kernelm_sdk.errors import ClientFault, FaultBody, PluginFault
from kernelm_sdk.system import Bounds, Destination, Instance, PoolSpec, Route, Swap, SystemState

MODEL, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
SERVING = "news-g1-aaaaaaaa"
MODEL_POOL = pool_spec(DeployRequest("news", MODEL), 1, {"local": 1})
SERVER = Instance("e-2", "encoder", "1", SERVING, "local", "ready", ("server/1",))
SYSTEM = SystemState((SERVER,), (PoolSpec("encoder", "encoder"), MODEL_POOL), (), 1)


def test_deployments() -> None:
    record = Deployment("news", 1, MODEL, SERVING, "encoder", "j")
    assert MODEL_POOL.settings == {"model": {"name": "news", "artifact": MODEL, "generation": 1}}
    asked = DeployRequest("news", MODEL)
    assert already_serves(asked, record, asked, SYSTEM)
    assert not already_serves(msgspec.structs.replace(asked, maximum=2), record, asked, SYSTEM)  # scaled in another way
    assert not already_serves(DeployRequest("news", OTHER), record, asked, SYSTEM)
    assert not already_serves(msgspec.structs.replace(asked, settings={"threads": 2}), record, asked, SYSTEM)
    empty = msgspec.structs.replace(SYSTEM, instances=())
    assert not already_serves(asked, record, asked, empty)
    assert already_serves(asked, msgspec.structs.replace(record, replicas=0), asked, empty)  # it has none until a call comes
    assert outdated_pools(record, SYSTEM) == []
    assert outdated_pools(Deployment("news", 2, OTHER, "news-g2-bbbbbbbb", "encoder", "j"), SYSTEM) == [SERVING]
    assert outdated_pools(Deployment("news", 1, OTHER, "news-g1-bbbbbbbb", "encoder", "j"), SYSTEM) == [SERVING]
    starting = msgspec.structs.replace(SYSTEM, pools=(*SYSTEM.pools, pool_spec(DeployRequest("news", OTHER), 2, {"local": 1})))
    assert outdated_pools(record, starting) == []  # the next generation is none of the current one's business


def test_a_generation_is_never_given_out_twice() -> None:
    record = Deployment("news", 1, MODEL, SERVING, "encoder", "j")
    assert next_generation("news", None, None, SystemState((), (), (), 1)) == 1
    assert next_generation("news", record, None, SYSTEM) == 2
    assert next_generation("news", record, Attempt("news", 4, "news-g4-bbbbbbbb", "k", 1), SYSTEM) == 5  # 2 to 4 went back
    routed = msgspec.structs.replace(SYSTEM, routes=(Route("news", "model", (Destination(SERVING, 100),), 6),))
    assert next_generation("news", record, None, routed) == 7
    assert pool_of(DeployRequest("news", OTHER), 7).startswith("news-g7-")


def test_a_plugin_that_came_as_an_artifact_brings_its_files_along() -> None:
    loaded, older = PoolSpec("mine", "mine", source=OTHER), PoolSpec("chat-g1-x", "mine", source=MODEL, contracts=False)
    system = msgspec.structs.replace(SYSTEM, pools=(*SYSTEM.pools, loaded, older))
    assert [source_of(name, system) for name in ("mine", "encoder", "absent")] == [OTHER, "", ""]
    parked = msgspec.structs.replace(system, pools=(msgspec.structs.replace(loaded, parked=True), older))
    assert source_of("mine", parked) == MODEL
    request = DeployRequest("chat", MODEL, plugin="mine")
    assert swap_request(request, pool_spec(request, 2, {"local": 1}), 2, "j", 5.0, system).to.source == OTHER


def test_what_the_kernel_is_asked_for() -> None:
    careful = DeployRequest("news", OTHER, canary=5, watch_s=10.0, error_rate=0.02)
    spec = pool_spec(careful, 2, {"local": 1})
    first = swap_request(careful, spec, 2, "j", 60.0, SystemState((), (), (), 1))
    assert (first.before, first.canary, first.bounds.watch_s) == ("", 0, 0.0)  # nothing to share with, nor to go back to
    routes = (Route("news", "model", (Destination(SERVING, 100),), 1), Route("news", "svc", (Destination("data", 100),), 1))
    second = swap_request(careful, spec, 2, "j", 60.0, msgspec.structs.replace(SYSTEM, routes=routes))
    assert (second.before, second.canary, second.routes, second.generation) == (SERVING, 5, ("news",), 2)
    assert (second.bounds.watch_s, second.bounds.error_rate, second.bounds.ready_s) == (10.0, 0.02, 60.0)
    assert (second.artifact, second.why) == (OTHER, "deployed by j")


@pytest.mark.parametrize(("fields", "says"), [
    ({"canary": 100}, "`canary` is 100"), ({"canary": 5}, "`watch_s` is 0"), ({"watch_s": -1.0}, "`watch_s` is -1"),
    ({"error_rate": 2.0}, "`error_rate` is 2"), ({"min_calls": 0}, "must be above 0"),
])  # fmt: skip
def test_bounds_of_a_deployment_that_can_not_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check(DeployRequest("news", MODEL, **fields))


def test_a_swap_shows_how_far_it_is_and_ends_in_a_clear_fault() -> None:
    swap = Swap("s", SERVING, "old", ("news",), "watching", "jobs", "", 0.0, canary=5, bounds=Bounds(watch_s=20.0), generation=2,
                since=100.0)  # fmt: skip
    progress = progress_of(swap, SYSTEM, 105.0)
    assert (progress.fraction, progress.phase) == (0.25, "watching")
    assert progress.message == f"5 % of the calls go to {SERVING}, watched for 5 of 20 s"
    raise_if_over(swap, "news", SYSTEM)
    back = msgspec.structs.replace(swap, phase="rolled_back", outcome="9.0% of 100 calls failed")
    with pytest.raises(PluginFault, match=r"went back from .* to old, which goes on serving: 9.0% of 100 calls failed") as caught:
        raise_if_over(back, "news", SYSTEM)
    assert (caught.value.code, caught.value.retriable, caught.value.details["generation"]) == ("rolled_back", False, 2)
    with pytest.raises(PluginFault, match="does not serve news: no such file") as caught:
        raise_if_over(msgspec.structs.replace(swap, phase="failed", outcome="no such file"), "news", SYSTEM)
    assert (caught.value.code, caught.value.retriable) == ("not_ready", True)


def test_a_start_that_failed_is_told_once_in_one_line_with_its_own_remedy() -> None:
    why = "ended with code 1; config.json is missing (invalid_model) -> import the whole folder\n  | loading\n  | 3 files"
    instance = Instance("e-1", "encoder", "1", SERVING, "local", "failed", reason=why)
    swap = Swap("s", SERVING, "", ("news",), "starting", "jobs", "", 0.0)
    assert progress_of(swap, msgspec.structs.replace(SYSTEM, instances=(instance,)), 1.0).message == (
        "e-1 is failed: ended with code 1; config.json is missing (invalid_model) -> import the whole folder")
    with pytest.raises(PluginFault) as caught:
        raise_if_over(msgspec.structs.replace(swap, phase="failed", outcome=f"pool {SERVING} did not start: {why}"), "news", SYSTEM)
    fault = caught.value
    assert fault.message == (f"pool {SERVING} does not serve news: it did not start: ended with code 1; config.json is missing "
                             "(invalid_model)")  # fmt: skip
    assert (fault.remedy, fault.details["log"]) == ("import the whole folder", "loading\n3 files")


def test_what_the_plugin_says_of_the_model_ends_the_deployment_and_what_it_says_of_else_does_not() -> None:
    swap = Swap("s", SERVING, "", ("news",), "failed", "jobs", "", 0.0, generation=2, outcome="it ended\n  | loading")
    body = FaultBody("client", "invalid_model", "config.json: it is missing", "import the whole folder")

    def system(pool: str, fault: FaultBody | None) -> SystemState:
        dead = [Instance(f"e-{k}", "encoder", "1", pool, "local", "exited", fault=f) for k, f in enumerate((None, fault))]
        return msgspec.structs.replace(SYSTEM, instances=tuple(dead))

    with pytest.raises(ClientFault) as caught:
        raise_if_over(swap, "news", system(SERVING, body))
    details = {"generation": 2, "pool": SERVING, "log": "loading"}
    assert caught.value.body() == msgspec.structs.replace(body, details=details)
    later = msgspec.structs.replace(body, retriable=True)
    for other in (system("news-g1-cccccccc", body), system(SERVING, later), system(SERVING, FaultBody("plugin", "no_gpu", "none"))):
        with pytest.raises(PluginFault) as again:
            raise_if_over(swap, "news", other)
        assert (again.value.code, again.value.retriable) == ("not_ready", True)


def test_a_deployment_remembers_what_served_before() -> None:
    old = Deployment("news", 1, MODEL, SERVING, "encoder", "j", when=1.0)
    new = follows(Deployment("news", 3, OTHER, "news-g3-bbbbbbbb", "encoder", "k", when=2.0), old)
    assert [(p.generation, p.artifact, p.pool, p.until) for p in new.history] == [(1, MODEL, SERVING, 2.0)]
    assert follows(msgspec.structs.replace(new, history=()), new) == new  # written again after a crash


def test_a_deployment_s_settings_are_those_of_its_plugin_and_never_name_another_model() -> None:
    asked = DeployRequest("news", MODEL, settings={"threads": 2, "model": {"name": "other", "artifact": OTHER, "generation": 9}})
    served = {"name": "news", "artifact": MODEL, "generation": 3}
    assert pool_spec(asked, 3, {"local": 1}).settings == {"threads": 2, "model": served}
