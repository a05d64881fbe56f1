"""What a search or a compression does whose jobs wait for cores that others hold: against the `world` of conftest.py, and through
the real broker, kernel, scheduler, job table and store."""

import asyncio
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_contracts.data import DatasetCard
from kernelm_contracts.jobs import JobName, JobRecord, Jobs, JobSpec
from kernelm_contracts.optimizer import Candidate, CompressRequest, Dimension, OptimizeRequest, Search
from kernelm_contracts.server import Server
from kernelm_contracts.trainer import ModelCard, Trained, Trainer, TrainRequest
from kernelm_optimizer.children import Children
from kernelm_optimizer.compress import Compression
from kernelm_optimizer.plugin import OptimizerPlugin
from kernelm_optimizer.settings import Settings
from kernelm_scheduler.plugin import SchedulerPlugin
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.plugin import Job, Manifest, Plugin
from kernelm_sdk.system import Artifacts, PoolSpec, PutArtifact, Resources

WHY = "waits: it asks for 1.5 cores, and 0.5 are free (what would start it: scale down model 'news')"
TFIDF = TrainRequest("", structure="tfidf-linear")
BAD, GOOD = Candidate("bad", train=msgspec.structs.replace(TFIDF, epochs=1)), Candidate("good", train=TFIDF)
SEARCH = Search(TFIDF, (Dimension("epochs", values=(1, 2)),), sampler="grid", objectives=("accuracy", "size"))


def measures(spec: JobSpec) -> bool:
    return spec.uses == "server/1.measure"


def side_by_side(spec: JobSpec) -> bool:
    return measures(spec) and not spec.name.startswith("measure-trial")


async def test_a_search_whose_measurement_can_not_begin_ends_and_names_the_best_so_far(world):
    world.waits = measures
    with pytest.raises(ClientFault) as raised:
        await world.search(BAD, GOOD, budget_s=0.5)
    fault = raised.value
    assert (fault.code, WHY in fault.message) == ("budget_too_small", True)
    model = next(r.result["model"] for r in world.jobs.values() if r.spec.name == "train-good")
    assert re.search(rf"the best so far is 'good' \({model}, accuracy [01]\.\d+ by its training\)", fault.message)
    assert "scale down model 'news', or raise budget_s" in fault.remedy
    assert [record.state for record in world.jobs.values()] == ["done", "done", "cancelled"]


async def test_trials_that_were_measured_stand_though_they_can_not_be_compared(world):
    world.waits = side_by_side
    found = await world.search(search=SEARCH, budget_s=1.0)
    assert found.winner == next(row.name for row in found.rows if row.outcome == "winner")
    measured = {row.name: row.measurement for row in found.rows if row.measurement}
    assert set(measured) == {"trial-0", "trial-1"}
    int8 = found.rows[-1]
    assert (int8.precision, int8.outcome) == ("int8", f"not measured: its measurement did not begin: {WHY}")
    assert found.test is None
    assert [note[:24] for note in found.notes] == ["what is measured was mea", "the winner is not tested"]
    assert all(WHY in note for note in found.notes)
    report = (world.artifacts[found.report][1] / "report.md").read_text()
    assert all(f"Note: {note}." in report for note in found.notes)
    assert all(record.state == "cancelled" for record in world.jobs.values() if side_by_side(record.spec))


async def test_trainings_that_can_not_begin_are_given_up_with_their_reason(world, monkeypatch):
    clock = SimpleNamespace(late=0.0, monotonic=lambda: time.monotonic() + clock.late)
    for module in ("searching", "children", "trials"):
        monkeypatch.setattr(f"kernelm_optimizer.{module}.time", clock)
    monkeypatch.setattr("kernelm_optimizer.trials.WAIT_S", 0.1)
    world.waits = lambda spec: True
    searching = asyncio.create_task(world.search(GOOD, search=SEARCH, budget_s=3600.0))
    await until(lambda: len(world.jobs) == 3, 60.0)
    clock.late = 3600.0
    with pytest.raises(ClientFault) as raised:
        await searching
    assert raised.value.code == "budget_too_small"
    for name in ("good", "trial-0", "trial-1"):
        assert f"{name}: the budget of 3600 s was spent before it began: {WHY}" in raised.value.message
    assert all(record.state == "cancelled" for record in world.jobs.values())


async def test_without_the_scheduler_the_last_reason_on_record_is_told(world, monkeypatch):
    world.waits = lambda spec: True
    call = world.call

    async def away(method: Any, request: Any, **more: Any) -> Any:
        if method is Jobs.why:
            raise KernelFault("no_responders", "no scheduler answers", retriable=True)
        return await call(method, request, **more)

    monkeypatch.setattr(world, "call", away)
    with pytest.raises(ClientFault, match=r"before it began: waits: it asks for 1\.5 cores, and 0\.5 are free"):
        await world.search(GOOD, budget_s=0.1)


async def test_a_measurement_that_is_under_way_is_let_whatever_the_time(world):
    """One job waits and is given up, another runs past that moment to its end."""
    children = Children(world.job(), 0.02, 5.0)
    running = JobRecord("j0", JobSpec("measuring", "server/1.measure", {}), "key", "running", started=1.0)
    waiting = msgspec.structs.replace(running, id="j1", state="queued", started=0.0, why="waits")
    world.jobs |= {"j0": running, "j1": waiting}
    seen: list[str] = []

    async def look(records: Any) -> None:
        seen.append(records["b"].state)
        if seen[-1] == "cancelled":
            world.jobs["j0"] = msgspec.structs.replace(running, state="done")

    records = await children.ended({"a": "j0", "b": "j1"}, look, begin_by=0.0)
    assert {key: record.state for key, record in records.items()} == {"a": "done", "b": "cancelled"}
    assert list(children.waited) == ["j1"]


async def test_a_measurement_that_lost_its_instance_may_wait_again(world):
    """Long after the budget was spent it is in the queue once more, for a moment."""
    children = Children(world.job(), 0.01, 5.0)
    running = JobRecord("j0", JobSpec("measuring", "server/1.measure", {}), "key", "running", started=1.0)
    states = iter(["running", "queued", "queued", "queued", "running", "done"])

    async def look(records: Any) -> None:
        world.jobs["j0"] = msgspec.structs.replace(running, state=next(states, "done"))

    world.jobs["j0"] = running
    assert (await children.ended({"a": "j0"}, look, begin_by=0.0, wait_s=60.0))["a"].state == "done"
    assert not children.waited


async def test_a_compression_that_can_not_be_measured_names_the_model_that_it_made(world):
    world.waits = measures
    request = CompressRequest("sha256:before", "sha256:data", "distill", train=TrainRequest("", epochs=1), budget_s=0.1)
    plugin: Any = OptimizerPlugin(world, Settings(poll_max_s=0.02, patience_s=5.0, wait_s=0.1))
    compression = Compression(plugin, request, world.job())
    card = ModelCard("m", "text-classification", "encoder", ("a", "b"), 1)
    with pytest.raises(ClientFault, match=r"the model that was made \(sha256:after\) is not measured") as raised:
        await compression._measure(card, {"before": "sha256:before", "after": "sha256:after"}, Path())
    assert (raised.value.code, WHY in raised.value.message) == ("budget_too_small", True)
    assert [record.state for record in world.jobs.values()] == ["cancelled"]


class Holder(Plugin, Trainer):
    """A training that holds its cores until it is told to end, as a deployment would."""

    async def train(self, request: TrainRequest, job: Job) -> Trained:
        job.progress(0.1, "holding")
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")


class Idle(Plugin, Server):
    """A server that could measure, if it were asked."""

    async def measure(self, request: Any, job: Job) -> Any:
        raise AssertionError("its job has no cores")


def manifest(name: str, contract: str) -> Manifest:
    return Manifest(name, "1", "test", (contract,), "test_waiting:none", default=False, calls=("jobs/1", "artifacts/1"))


async def test_through_the_real_scheduler_the_reason_is_its_own(tmp_path: Path) -> None:
    plugins: dict[str, tuple[Manifest, type[Plugin]]] = {
        "scheduler": (manifest("scheduler", "scheduler/1"), SchedulerPlugin), "trainer": (manifest("trainer", "trainer/1"), Holder),
        "server": (manifest("server", "server/1"), Idle), "optimizer": (manifest("optimizer", "optimizer/1"), OptimizerPlugin),
    }  # fmt: skip
    async with System(manifests={name: made for name, (made, _) in plugins.items()}) as system:
        for service in ("artifacts", "jobs"):
            await system.service(service)
        node = await system.node(plugins)
        for name in plugins:
            settings = {"wait_s": 0.5, "measure": {"cpu": 1.0, "memory_mb": 1}} if name == "optimizer" else {}
            await system.pool(PoolSpec(name, name, settings=settings))

        async def stored(name: str, content: msgspec.Struct) -> str:
            folder = tmp_path / name
            folder.mkdir()
            (folder / f"{name}.json").write_bytes(msgspec.json.encode(content))
            return str((await system.admin.call(Artifacts.put, PutArtifact(str(folder), name))).digest)

        async def submitted(name: str, uses: str, request: msgspec.Struct, cpu: float) -> JobRecord:
            spec = JobSpec(name, uses, msgspec.to_builtins(request), Resources(cpu, 1))
            return await system.admin.call(Jobs.submit, spec)  # type: ignore[no-any-return]

        async def record(job: JobRecord, *states: str) -> JobRecord:
            async def there() -> JobRecord | None:
                now = await system.admin.call(Jobs.get, JobName(job.id))
                return now if now.state in states else None

            return await until(there, 60.0, f"{job.spec.name} to be {states}")

        dataset = await stored("dataset", DatasetCard("d", ("a", "b"), (), {}, 1))
        model = await stored("model", ModelCard("m", "text-classification", "tfidf-linear", ("a", "b"), 1))
        holder = await submitted("holder", "trainer/1.train", TrainRequest(dataset), node.capacity.cpu - 0.5)
        await record(holder, "running")
        search = await submitted("search", "optimizer/1.optimize", OptimizeRequest(dataset, (Candidate("given", model=model),),
                                                                                   budget_s=0.0), 0.0)  # fmt: skip
        ended = await record(search, "dead", "done")
        assert ended.fault is not None
        assert (ended.fault.code, "its measurement did not begin: waits: " in ended.fault.message) == ("budget_too_small", True)
        assert f"'given' ({model})" in ended.fault.message
        assert (await record(holder, "running")).state == "running"
