"""A whole system with the job table as a process of its own, and plugins that do what a test tells them."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm.testing.node import InlineNode
from kernelm_contracts.data import Data, DatasetCard, Prepared, PrepareRequest
from kernelm_contracts.jobs import JobName, JobRecord, Jobs, RunName, RunRecord, RunSpec, RunView
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Label, ServedModel, Server
from kernelm_contracts.trainer import Scores, Trained, Trainer, TrainRequest
from kernelm_scheduler.plugin import SchedulerPlugin
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Call, Job, Manifest, Plugin
from kernelm_sdk.system import PoolSpec

SETTINGS = "watch_every_s = 0.2\nprobe_every_s = 0.4\ndeploy_s = 10.0\nround_every_s = 0.5\n"
Act = Callable[[TrainRequest, Job], Awaitable[Trained]]


def digest(model: str) -> str:
    return "sha256:" + hashlib.sha256(model.encode()).hexdigest()


def trained(model: str = "m", accuracy: float = 0.9) -> Trained:
    return Trained(model, "encoder", "adamw", 1, Scores("validation", 1, accuracy, accuracy, accuracy))


class ScriptedData(Plugin, Data):
    async def prepare(self, request: PrepareRequest, job: Job) -> Prepared:
        return Prepared("d", 3, ("a", "b"), {"train": 3}, DatasetCard(request.name, ("a", "b"), (), {}, 256))


class ScriptedTrainer(Plugin, Trainer):
    """Does what `acts` says for the job's name, and counts."""

    acts: dict[str, Act] = {}
    done: list[tuple[str, int, str]] = []  # job's name, attempt, checkpoint

    async def train(self, request: TrainRequest, job: Job) -> Trained:
        self.done.append((job.name, job.attempt, job.checkpoint))
        act = self.acts.get(job.name)
        return await act(request, job) if act else trained(f"model of {request.dataset}")


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: ServedModel | None = None


class ScriptedServer(Plugin, Server):
    Settings = ServerSettings
    loaded = asyncio.Event()  # when the model "held" is

    async def on_start(self) -> None:
        artifact = self.settings.model.artifact if self.settings.model else ""
        if artifact == digest("broken"):
            raise RuntimeError("no such model")
        if artifact == digest("held"):
            await self.loaded.wait()
        if artifact == digest("slow"):
            await asyncio.sleep(60.0)

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,) if self.settings.model else ()

    async def classify(self, request: ClassifyRequest, call: Call) -> ClassifyReply:
        served = self.settings.model
        assert served is not None
        if served.artifact == digest("failing"):
            raise RuntimeError("this model fails at every call")
        if served.generation < request.at_least:
            raise ClientFault("stale_generation", f"{served.name} is at {served.generation}", retriable=True,
                              generation=served.generation, pool=self.context.pool)  # fmt: skip
        label = Label("bright" if served.artifact != digest("dull") else "dull", 1.0)
        return ClassifyReply(served.name, served.generation, served.artifact, ((label,),) * len(request.input), 0, 0.0)


FACTORIES: dict[str, type[Plugin]] = {
    "data": ScriptedData, "trainer": ScriptedTrainer, "encoder": ScriptedServer, "scheduler": SchedulerPlugin,
}  # fmt: skip


def _manifest(name: str, contract: str, **more: Any) -> Manifest:
    return Manifest(name, "1", "scripted", (contract,), "conftest:Scripted", default=False, calls=("jobs/1",), **more)


MANIFESTS = {"data": _manifest("data", "data/1"), "trainer": _manifest("trainer", "trainer/1"),
             "encoder": _manifest("encoder", "server/1"), "scheduler": _manifest("scheduler", "scheduler/1")}  # fmt: skip


class Kit:
    """What a test of the job table needs."""

    trained, digest = staticmethod(trained), staticmethod(digest)

    def __init__(self, system: System, node: InlineNode) -> None:
        self.system, self.node, self.acts, self.done = system, node, ScriptedTrainer.acts, ScriptedTrainer.done
        self.loaded, self.factories = ScriptedServer.loaded, node.factories
        self.bus = system.admin

    async def pools(self, *names: str) -> None:
        await asyncio.gather(*(self.system.pool(PoolSpec(name, name)) for name in names))

    @staticmethod
    def pool(name: str, plugin: str, **more: Any) -> PoolSpec:
        return PoolSpec(name, plugin, **more)

    @staticmethod
    def deploy(model: str = "m1", **more: Any) -> dict[str, Any]:
        """A stage that deploys `model`, as "news" unless told otherwise."""
        return {"uses": "deploy", "name": "deploy", "resources": {"cpu": 0.5},
                "with": {"name": "news", "model": digest(model)} | more}  # fmt: skip

    async def submit(self, *stages: dict[str, Any], name: str = "news") -> RunRecord:
        spec = {"name": name, "stage": [{"name": s["uses"].rpartition(".")[2]} | s for s in stages]}
        run: RunRecord = await self.bus.call(Jobs.submit_run, msgspec.convert(spec, RunSpec))
        return run

    async def view(self, run: str) -> RunView:
        view: RunView = await self.bus.call(Jobs.get_run, RunName(run))
        return view

    async def end(self, run: str, timeout_s: float = 20.0) -> RunView:
        async def over() -> RunView | None:
            view = await self.view(run)
            return view if view.run.state != "running" else None

        view: RunView = await until(over, timeout_s, f"the end of {run}")
        return view

    async def job(self, id: str, wanted: Callable[[JobRecord], Any], timeout_s: float = 20.0) -> JobRecord:
        async def there() -> JobRecord | None:
            with contextlib.suppress(Exception):
                job: JobRecord = await self.bus.call(Jobs.get, JobName(id), timeout_s=2.0)
                return job if wanted(job) else None
            return None

        job: JobRecord = await until(there, timeout_s, f"job {id}")
        return job

    async def restart_jobs(self) -> None:
        """`kill -9` of the service, and a new one."""
        self.system.processes["jobs"].kill()
        await asyncio.to_thread(self.system.processes["jobs"].wait)
        await self.system.service("jobs")


@pytest.fixture
async def kit() -> AsyncIterator[Kit]:
    ScriptedTrainer.acts, ScriptedTrainer.done, ScriptedServer.loaded = {}, [], asyncio.Event()
    async with System(manifests=dict(MANIFESTS)) as system:
        (system.home / "jobs.toml").write_text(SETTINGS)
        node = await system.node({name: (manifest, FACTORIES[name]) for name, manifest in MANIFESTS.items()}, "node-local")
        await system.service("jobs")
        yield Kit(system, node)
