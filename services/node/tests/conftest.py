"""What the tests of the node need of the machine, and a system whose instances run in containers."""

import asyncio
import functools
import os
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import docker
import pytest
import pytest_asyncio
from docker.errors import DockerException

from kernelm.testing.harness import System
from kernelm.testing.parts import absent
from kernelm_authority.identity import Grant
from kernelm_node.diagnosis import last_lines
from kernelm_node.runtimes.container import IMAGE, ContainerRuntime, ContainerTask
from kernelm_node.runtimes.runtime import HANDLE_VERSION, Handle, Launch
from kernelm_node.runtimes.template import HOME_LABEL, container_name
from kernelm_sdk.plugin import read_manifest
from kernelm_sdk.system import Limits

IMAGES = Path(__file__).parents[3] / "deploy" / "images" / "docker.sh"


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[docker.DockerClient]:
    """A Docker engine that answers, with the runner image of this checkout, which KERNELM_NODE_IMAGE names meanwhile.
    Containers that a failed test leaves are removed. Without an engine: skipped, or with KERNELM_REQUIRE_ALL=1 failed."""
    try:
        engine = docker.from_env(timeout=60)
        before = {c.id for c in engine.containers.list(all=True)}
    except DockerException as error:
        absent(f"no Docker engine ({error}): {IMAGES.name} engine starts one")
    built = subprocess.run([IMAGES, "runner"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    was = os.environ.get(IMAGE)
    os.environ[IMAGE] = built.stdout.strip()
    yield engine
    os.environ.pop(IMAGE) if was is None else os.environ.update({IMAGE: was})
    for left in engine.containers.list(all=True, filters={"label": HOME_LABEL}):
        if left.id not in before and not Path(left.labels[HOME_LABEL]).exists():  # not of a system that runs elsewhere
            left.remove(force=True)
    engine.close()


MANIFEST = """
name = "intruder"
version = "0.0.1"
summary = "runs what it is told, for tests"
contracts = ["intruder/1"]
entry = "intruder:Intruder"
runtimes = ["container"]
default = false
"""
PLUGIN = """
import asyncio, subprocess, sys
import msgspec
from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.plugin import Plugin

class Program(msgspec.Struct):
    text: str
    here: bool = False  # in the plugin's own process

class Told(msgspec.Struct):
    text: str

class Doing(Contract, name="intruder", major=1):
    @unary
    async def do(self, request: Program, call) -> Told: ...

class Intruder(Plugin, Doing):
    async def do(self, request, call):
        if request.here:
            exec(request.text, {})
            return Told("done")
        command = [sys.executable, "-c", request.text]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=100)
        return Told(done.stdout + done.stderr)
"""

@functools.cache
def doing() -> ModuleType:
    """The plugin's module, for its contract, which can be declared once only."""
    module = ModuleType("intruder")
    exec(PLUGIN, module.__dict__)
    return module


class House:
    """A system whose instances are started by a container runtime in this process."""

    def __init__(self, system: System, engine: docker.DockerClient) -> None:
        self.system, self.engine = system, engine
        self.runtime = ContainerRuntime(system.home)
        self.source = self.plugin("source", PLUGIN)
        self.granted = closed_folder(system.home / "artifacts" / "granted", data="mine")
        self.foreign = closed_folder(system.home / "artifacts" / "foreign", data="another tenant's")
        self.tasks: list[ContainerTask] = []

    def plugin(self, name: str, text: str) -> Path:
        """The folder of a plugin `intruder` that is `text`."""
        files = {"kernelm-plugin.toml": MANIFEST, "intruder.py": text}
        return closed_folder(self.system.home / "artifacts" / name, **files)

    def launch(self, source: Path | None = None, **more: Any) -> Launch:
        """An instance with a fresh name, scratch folder and token, as the node makes them."""
        name, home = f"intruder-{secrets.token_hex(4)}", self.system.home
        scratch, secret = home / "scratch" / name, home / "run" / "tokens" / name
        for needed in (scratch, secret.parent, home / "logs"):
            needed.mkdir(parents=True, exist_ok=True)
        secret.write_text(self.system.authority.token(name, Grant("plugin", name, "intruder", "intruder")))
        environment = os.environ | {
            "KERNELM_URL": self.system.broker.url, "KERNELM_HOME": str(home), "KERNELM_INSTANCE": name,
            "KERNELM_PLUGIN": "intruder", "KERNELM_POOL": "intruder", "KERNELM_SCRATCH": str(scratch),
            "KERNELM_TOKEN_FILE": str(secret), "A_SECRET": "of the node's",
        }  # fmt: skip
        manifest = read_manifest(self.source / "kernelm-plugin.toml")
        return Launch(name, "intruder", "intruder", environment, scratch, home / "logs" / f"{name}.log", manifest,
                      source=source or self.source, **more)  # fmt: skip

    async def start(self, launch: Launch) -> ContainerTask:
        task = await self.runtime.start(launch)
        assert isinstance(task, ContainerTask)
        self.tasks.append(task)
        return task

    async def ready(self, launch: Launch) -> ContainerTask:
        task = await self.start(launch)
        try:
            await self.system.ready(launch.instance, 60)
        except AssertionError as error:
            now = [i for i in (await self.system.state()).instances if i.id == launch.instance]
            raise AssertionError(f"{error}: {now}, {last_lines(launch.log)}") from None
        return task

    async def do(self, launch: Launch, program: str, here: bool = False, timeout_s: float = 120) -> str:
        """What `program` prints inside."""
        told = await self.system.admin.call(doing().Doing.do, doing().Program(program, here), instance=launch.instance,
                                            timeout_s=timeout_s, patience_s=20)  # fmt: skip
        return str(told.text)

    def inspect(self, launch: Launch) -> dict[str, Any]:
        return dict(self.engine.containers.get(container_name(self.system.home, launch.instance)).attrs)

    def handle(self, launch: Launch, state: dict[str, Any], log_offset: int = 0) -> Handle:
        return Handle(HANDLE_VERSION, "container", launch.instance, "intruder", "intruder", launch.needs, time.time(),
                      str(launch.log), log_offset, state)  # fmt: skip


def closed_folder(path: Path, **files: str) -> Path:
    """A folder like an opened artifact's: readable, closed."""
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
        (path / name).chmod(0o444)
    path.chmod(0o555)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(docker_engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    source = closed_folder(tmp_path_factory.mktemp("manifest") / "source", **{"kernelm-plugin.toml": MANIFEST})
    async with System(manifests={"intruder": read_manifest(source / "kernelm-plugin.toml")}) as system:
        house = House(system, docker_engine)
        await house.runtime.probe()
        yield house
        for task in house.tasks:
            await task.kill()
            await asyncio.wait_for(task.wait(), 60)
        await house.runtime.close()
        for left in docker_engine.containers.list(all=True, filters={"label": f"kernelm.home={system.home}"}):
            left.remove(force=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def inside(house: House) -> Launch:
    """An instance that the tests share: it is not to be harmed by what is tried in it."""
    launch = house.launch(limits=Limits(cpu=0.5, memory_mb=512, pids=40), artifacts=(house.granted,))
    await house.ready(launch)
    return launch
