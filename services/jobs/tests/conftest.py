"""A whole system with the job table as a process of its own, and plugins that do what a test tells them."""

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import psutil
import pytest

from kernelm.testing.harness import System, until
from kernelm.testing.node import InlineNode
from kernelm_cli.home import UpFile, write_up
from kernelm_contracts.data import Data, DatasetCard, Prepared, PrepareRequest
from kernelm_contracts.deployments import WAITS, Deployment
from kernelm_contracts.jobs import JobName, JobRecord, Jobs, RunName, RunRecord, RunSpec, RunView
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Label, ServedModel, Server
from kernelm_contracts.trainer import Scores, Trained, Trainer, TrainRequest
from kernelm_scheduler.plugin import SchedulerPlugin
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.plugin import Call, Job, Manifest, Plugin
from kernelm_sdk.system import PoolSpec, Resources

SETTINGS = "watch_every_s = 0.2\nprobe_every_s = 0.4\ndeploy_s = 10.0\nround_every_s = 0.5\n"
NONE = Resources(0.25, 8000)  # no room for a deployment, and some for the scheduler
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
        if artifact == digest("unfit"):
            raise ClientFault("invalid_model", "weights.safetensors: too short", "store it again")
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

    # ---- deployments on a node that a test takes away ----

    async def start(self) -> InlineNode:
        """The scheduler, and another node, which has all deployments, as the first one has no room."""
        await self.system.pool(PoolSpec("scheduler", "scheduler", node="local"))
        self.node.capacity = NONE
        return await self.second()

    async def second(self, name: str = "other") -> InlineNode:
        """Another node, with the server plugin alone."""
        plugins = {"encoder": (MANIFESTS["encoder"], FACTORIES["encoder"])}
        node: InlineNode = await self.system.node(plugins, f"node-{name}")
        return node

    async def die(self, node: InlineNode) -> None:
        """As a machine that loses its power: nothing of it says a word."""
        [entry] = [e for e in self.system._members if e[0].name == node.bus.user]
        self.system._members.remove(entry)
        entry[1].cancel()
        await asyncio.wait([entry[1]])
        await node.bus._client.close()
        for instance in list(node.members):
            await node.kill(instance)

    async def deployed(self, **more: Any) -> JobRecord:
        """A deployment that serves."""
        view = await self.end((await self.submit(self.deploy(**more), name=more.get("name", "news"))).id)
        assert view.run.state == "done", view.run.fault
        return view.jobs[0]

    async def deployment(self, name: str = "news") -> Deployment:
        found, _ = await self.bus.bucket("deployments", Deployment).get(f"model.{name}")
        assert found is not None
        return found

    async def where(self, pool: str) -> list[str]:
        """The nodes of the pool's instances that live."""
        instances = (await self.system.state()).instances
        return sorted(i.node for i in instances if i.pool == pool and i.state not in ("exited", "lost"))

    async def is_on(self, pool: str, *nodes: str) -> bool:
        """Whether the pool's instances that live are on these nodes, one for each name."""
        return sorted(nodes) == await self.where(pool)

    async def waiting(self, job: str) -> JobRecord:
        return await self.job(job, lambda j: j.why.startswith(WAITS), 60.0)

    async def ask(self, model: str = "news", patience_s: float = 0.0) -> ClassifyReply:
        request = ClassifyRequest(("text",))
        reply: ClassifyReply = await self.bus.call(Server.classify, request, model=model, patience_s=patience_s)
        return reply

    async def told(self, model: str = "news") -> Fault | None:
        """What a caller is told that gets no answer; None where it gets one."""
        try:
            await self.ask(model)
        except Fault as fault:
            return fault
        return None

    async def kernelm(self, *arguments: str) -> str:
        """What the command prints, in one line."""
        me = psutil.Process()
        write_up(self.system.home, UpFile(me.pid, me.create_time(), self.system.broker.url, "", "", time.time()))
        command = (sys.executable, "-m", "kernelm_cli", *arguments, "--home", str(self.system.home))
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, env=os.environ | {"COLUMNS": "300"})
        text, _ = await process.communicate()
        assert process.returncode == 0
        return " ".join(text.decode().replace("│", " ").split())  # a long cell of a table has several lines

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
