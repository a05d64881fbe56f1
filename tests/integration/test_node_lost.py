"""A machine that serves a model is lost, by the death of all its processes or since it hangs: the model answers again from another
one, and what comes back of the first serves nothing. Real nodes, with a home of their own each, and the real encoder."""

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import AsyncIterator, Collection
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from kernelm.testing.harness import System, until
from kernelm_contracts.deployments import Deployment
from kernelm_contracts.jobs import Jobs, RunName, RunSpec, RunView
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Server
from kernelm_contracts.trainer import ModelCard
from kernelm_sdk.errors import Fault
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import Artifacts, Empty, Instance, Node, NodeReport, PoolSpec, PutArtifact

pytestmark = pytest.mark.slow


class Machines:
    """The first machine has all services, the second one a mirror and a node, which the scheduler takes first, for its name."""

    def __init__(self, system: System, home: Path) -> None:
        self.system, self.home = system, home
        self.members: tuple[str, ...] = ()  # of the second

    async def start_second(self) -> None:
        self.members = await self.system.machine("away", self.home)

    def processes(self) -> list[psutil.Process]:
        """All of the second machine."""
        mine = [psutil.Process(self.system.processes[name].pid) for name in self.members]
        return [*mine, *(child for process in mine for child in process.children(recursive=True))]

    async def instances(self) -> list[Instance]:
        """Those that serve the model."""
        return [i for i in (await self.system.state()).instances if i.pool.startswith("news-") and i.state == "ready"]

    async def serves_on(self, node: str, instances: int = 2) -> bool:
        return [i.node for i in await self.instances()] == [node] * instances

    async def deploy(self, folder: Path) -> RunView:
        artifact = await self.system.admin.call(Artifacts.put, PutArtifact(str(folder), "model"))
        stage = {"name": "deploy", "uses": "deploy", "with": {"name": "news", "model": artifact.digest, "instances": 2},
                 "resources": {"cpu": 0.2, "memory_mb": 200}, "attempts": 1}  # fmt: skip
        run = await self.system.admin.call(Jobs.submit_run, msgspec.convert({"name": "news", "stage": [stage]}, RunSpec))

        async def over() -> RunView | None:
            view: RunView = await self.system.admin.call(Jobs.get_run, RunName(run.id))
            return view if view.run.state != "running" else None

        view: RunView = await until(over, 120.0, "the deployment")
        assert view.run.state == "done", view.run.fault
        return view


@pytest.fixture
async def machines(tmp_path: Path) -> AsyncIterator[Machines]:
    installed, _ = find_manifests()
    manifests = {name: msgspec.structs.replace(installed[name], default=False) for name in ("scheduler", "encoder")}
    async with System(manifests=manifests) as system:
        for service in ("artifacts", "node", "jobs"):
            await system.service(service)
        machines = Machines(system, tmp_path / "second")
        await machines.start_second()
        await system.pool(PoolSpec("scheduler", "scheduler", node="local"))
        yield machines


def model(folder: Path) -> Path:
    """A linear model of two words."""
    folder.mkdir()
    tensors = {"idf": np.ones(2, np.float32), "weight": np.array([[4, -4], [-4, 4]], np.float32), "bias": np.zeros(2, np.float32)}
    save_file(tensors, folder / "linear.safetensors")
    (folder / "vocabulary.json").write_bytes(msgspec.json.encode({"goal": 0, "chip": 1}))
    card = ModelCard("model", "text-classification", "tfidf-linear", ("sports", "tech"), 64, request={"ngrams": 1})
    (folder / "model.json").write_bytes(msgspec.json.encode(card))
    return folder


async def classify(system: System, patience_s: float = 0.0) -> ClassifyReply:
    request = ClassifyRequest(("a late goal",))
    reply: ClassifyReply = await system.admin.call(Server.classify, request, model="news", timeout_s=10.0, patience_s=patience_s)
    return reply


class Load:
    """Calls one after the other while it is entered."""

    def __init__(self, system: System) -> None:
        self.system, self.answers, self.faults = system, Counter[int](), Counter[str]()

    async def __aenter__(self) -> "Load":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            try:
                self.answers[(await classify(self.system)).generation] += 1
            except Fault as fault:
                self.faults[fault.code] += 1
            await asyncio.sleep(0.02)


async def report(system: System, node: str) -> NodeReport:
    found: NodeReport = await system.admin.call(Node.report, Empty(), instance=f"node-{node}", timeout_s=5.0)
    return found


async def moved(machines: Machines, pool: str) -> Deployment:
    """Until it serves on the first machine, with what it had; its record."""
    await until(lambda: machines.serves_on("local"), 90.0, "two instances on the first machine")
    reply = await classify(machines.system, patience_s=30.0)
    assert (reply.generation, reply.results[0][0].label) == (1, "sports")
    record, _ = await machines.system.admin.bucket("deployments", Deployment).get("model.news")
    assert record is not None
    assert (record.node, record.replicas, record.generation, record.pool) == ("local", 2, 1, pool)
    return record


async def test_a_machine_that_is_killed_and_comes_back(machines: Machines, tmp_path: Path) -> None:
    pool = (await machines.deploy(model(tmp_path / "model"))).jobs[0].result["pool"]
    assert await machines.serves_on("away")
    serving = {running.instance: running.pid for running in (await report(machines.system, "away")).running}
    killed = machines.processes()
    assert {process.pid for process in killed} > set(serving.values())
    async with Load(machines.system) as load:
        await until(lambda: load.answers[1] > 20, 20.0, "answers")
        for process in killed:
            process.kill()
        record = await moved(machines, pool)
        before = load.answers[1]
        await until(lambda: load.answers[1] > before + 20, 20.0, "answers again")
        assert record.why.startswith("node away is lost: no sign of life for 5 s; at least 2 replicas")
        for name in machines.members:
            machines.system.processes[name].wait()
        await machines.start_second()
        await until(lambda: ended(machines, serving), 30.0, "it told what had ended")
        faults = load.faults.copy()
        before = load.answers[1]
        await until(lambda: load.answers[1] > before + 50, 20.0, "answers while both are there")
    assert set(load.answers) == {1}
    assert set(faults) <= {"no_responders", "starting", "timeout"}, faults
    assert load.faults == faults, "none after the machine was back"
    assert await machines.serves_on("local")
    assert not (await report(machines.system, "away")).running


async def ended(machines: Machines, instances: Collection[str]) -> bool:
    """Whether the node has told of their ends: before, they were lost."""
    states = {i.id: i.state for i in (await machines.system.state()).instances}
    return {states[id] for id in instances} == {"exited"}


async def test_a_machine_that_hangs_and_goes_on_later_serves_nothing(machines: Machines, tmp_path: Path) -> None:
    pool = (await machines.deploy(model(tmp_path / "model"))).jobs[0].result["pool"]
    assert await machines.serves_on("away")
    frozen = machines.processes()
    members = [machines.system.processes[name].pid for name in machines.members]
    members += [running.pid for running in (await report(machines.system, "away")).running]  # not what they are forked from
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    try:
        await moved(machines, pool)
    finally:
        for process in frozen:
            process.send_signal(signal.SIGCONT)
    async with Load(machines.system) as load:
        await until(lambda: not any(running(p) for p in frozen if p.pid in members), 60.0, "all that was shut out has ended")
        await until(lambda: load.answers[1] > 50, 20.0, "answers")
        await machines.start_second()
        before = load.answers[1]
        await until(lambda: load.answers[1] > before + 50, 20.0, "answers while both are there")
    assert not load.faults
    assert await machines.serves_on("local")
    assert not (await report(machines.system, "away")).running


def running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
