"""The runtime suite: one plugin, unchanged, under every runtime of a real node in a real system. What a runtime declares
(`can`) has a test here that fails if it is not enforced; what it does not declare is refused."""

import contextlib
import importlib.util
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio

from kernelm.testing.harness import System, until
from kernelm_authority.identity import Grant
from kernelm_node.runtimes import RUNTIMES
from kernelm_node.runtimes.pidfd import started_at
from kernelm_node.runtimes.runtime import ABILITIES
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.plugin import MANIFEST, read_manifest
from kernelm_sdk.system import (
    Artifacts,
    Empty,
    Instance,
    InstanceName,
    Kernel,
    Limits,
    Manifest,
    Node,
    NodeReport,
    PoolName,
    PoolSpec,
    PutArtifact,
    Resources,
    Running,
    StartInstance,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
ALL = ["process", "venv", "container", "inproc"]
BUILD_S = 180.0  # for the first environment: pip may have to fetch
CRASH_S = 1.0  # for the answer that never comes
BOUNDED = {"cpu_limit": Limits(cpu=0.2), "memory_limit": Limits(memory_mb=160), "pids_limit": Limits(pids=40)}


TINY = Path(__file__).parent / "tiny"  # as the folder of an artifact


def installed(folder: Path) -> Path:
    """`folder` with the same plugin installed in it, as pip would lay it out."""
    package, info = folder / "kernelm_tiny", folder / "kernelm_tiny-0.0.1.dist-info"
    shutil.copytree(TINY / "kernelm_tiny", package)
    shutil.copy(TINY / MANIFEST, package)
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernelm-tiny\nVersion: 0.0.1\nRequires-Dist: kernelm-sdk\n")
    (info / "entry_points.txt").write_text("[kernelm.plugins]\ntiny = kernelm_tiny\n")
    return folder


def contract() -> Any:
    """The plugin's module, with its contract `Doing` and the message `Ask`."""
    spec = importlib.util.spec_from_file_location("tiny_contract", TINY / "kernelm_tiny" / "plugin.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class House:
    """A system with a node and an artifact service, in which `tiny` is installed as well as stored."""

    def __init__(self, system: System, folder: Path) -> None:
        self.system, self.folder = system, folder
        self.files = contract()
        self.path = {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    async def begin(self) -> None:
        await self.system.service("artifacts")
        await self.system.service("node", **self.path)

    async def source(self, runtime: str, manifest: Manifest) -> str:
        """Where the kernel and the node find the plugin with this manifest: an artifact, or for `inproc` the installed one,
        since strangers' code has no place in the node's process."""
        assert self.system.kernel is not None
        if runtime == "inproc":
            self.system.kernel.catalog.installed["tiny"] = manifest
            return ""
        folder = self.folder / secrets.token_hex(4)
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("__pycache__"))
        limits = "".join(f"{k} = {v}\n" for k, v in msgspec.structs.asdict(manifest.limits).items())
        text = f"isolated = {str(manifest.isolated).lower()}\n{(TINY / MANIFEST).read_text()}\n[limits]\n{limits}"
        (folder / MANIFEST).write_text(text)
        digest = (await self.system.admin.call(Artifacts.put, PutArtifact(str(folder), "plugin"), patience_s=10)).digest
        await self.system.kernel.catalog.add(text, digest)
        return digest

    async def do(self, instance: str, what: str, amount: float = 0, text: str = "", timeout_s: float = 60.0) -> Any:
        ask = self.files.Ask(what, amount, text)
        return await self.system.admin.call(self.files.Doing.do, ask, instance=instance, timeout_s=timeout_s, patience_s=10.0)

    async def start(self, runtime: str, limits: Limits = Limits(), isolated: bool = False) -> Running:
        """One instance in a pool of its own, started by the kernel; it is ready when this returns."""
        pool = f"tiny-{secrets.token_hex(4)}"
        manifest = msgspec.structs.replace(read_manifest(TINY / MANIFEST), limits=limits, isolated=isolated)
        spec = PoolSpec(pool, "tiny", runtime=runtime, source=await self.source(runtime, manifest))
        await self.system.admin.call(Kernel.start_pool, spec)

        async def ready() -> Instance | None:
            mine = [i for i in (await self.system.state()).instances if i.pool == pool]
            assert not [i.reason for i in mine if i.state in ("exited", "lost")]
            return next((i for i in mine if i.state == "ready"), None)

        name = (await until(ready, BUILD_S, f"{pool} ready")).id
        return next(r for r in (await self.report()).running if r.instance == name)

    async def stop(self, instance: str, grace_s: float = 5.0) -> None:
        await self.system.admin.call(Node.stop, InstanceName(instance, grace_s), instance="node-local", timeout_s=30.0)

    async def report(self) -> NodeReport:
        return await self.system.admin.call(Node.report, Empty(), instance="node-local", patience_s=10)

    async def can(self, runtime: str) -> tuple[str, ...]:
        return (await self.report()).runtimes[runtime]

    async def ended(self, instance: str) -> Instance:
        async def told() -> Instance | None:
            found = next((i for i in (await self.system.state()).instances if i.id == instance), None)
            return found if found and found.state == "exited" else None

        return await until(told, 30, f"the exit report of {instance}")

    def log(self, instance: str) -> str:
        return (self.system.home / "logs" / f"{instance}.log").read_text()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    with contextlib.suppress(pytest.skip.Exception):  # the node must know the image from its start; without an engine
        request.getfixturevalue("docker_engine")  # only what needs one is skipped
    folder = tmp_path_factory.mktemp("runtimes")
    installed(folder / "site")
    manifests = {"tiny": read_manifest(TINY / MANIFEST)}
    async with System(manifests=manifests) as system:
        house = House(system, folder)
        await house.begin()
        yield house


@pytest.fixture(params=ALL)
def runtime(request: pytest.FixtureRequest) -> str:
    if request.param == "container":
        request.getfixturevalue("docker_engine")
    return str(request.param)


async def test_the_suite_knows_every_runtime() -> None:
    assert {r.name for r in RUNTIMES} == set(ALL)


async def test_the_same_plugin_is_started_by_the_kernel_answers_and_is_stopped(house: House, runtime: str) -> None:
    running = await house.start(runtime)
    instance = running.instance
    assert (await house.do(instance, "say", text="hello")).text == "hello"
    prefix, file, name = (await house.do(instance, "where")).text.split("|")
    assert name == instance
    assert (str(house.system.home / "venvs") in prefix) == (runtime == "venv")
    assert (str(house.folder / "site") in file) == (runtime == "inproc")
    await house.system.admin.call(Kernel.stop_pool, PoolName(running.pool))
    assert (await house.ended(instance)).reason.startswith("stopped as requested")
    assert runtime == "inproc" or "stopped politely" in house.log(instance)


async def test_a_crash_is_told_with_its_code_and_last_words(house: House, runtime: str) -> None:
    if runtime == "inproc":
        pytest.skip("os._exit would end the node itself: that is why inproc is for kernelm's own plugins")
    instance = (await house.start(runtime)).instance
    with pytest.raises(KernelFault):
        await house.do(instance, "crash", 7, "for the test", CRASH_S)
    reason = (await house.ended(instance)).reason
    assert "ended with code 7" in reason
    assert "about to crash for the test" in reason


async def test_kill_takes_all_its_children(house: House, runtime: str) -> None:
    if "kill" not in await house.can(runtime):
        pytest.skip(f"{runtime} does not declare it")
    running = await house.start(runtime)
    mark = f"child-of-{running.instance}"
    assert (await house.do(running.instance, "children", 3, mark)).number == 3
    await until(lambda: len(marked(mark)) == 3, 20, "three children")
    os.kill(running.pid, 19)  # SIGSTOP: it can't listen to the polite request
    await house.stop(running.instance, 0.2)
    assert not started_at(running.pid)
    await until(lambda: not marked(mark), 10, "the end of its children")


def marked(mark: str) -> list[int]:
    """The processes whose command line has `mark`; also those in containers."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if mark in (process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


async def test_the_memory_limit_kills_and_is_diagnosed(house: House, runtime: str) -> None:
    if "memory_limit" not in await house.can(runtime):
        await refused(house, runtime, "memory_limit", limits=BOUNDED["memory_limit"])
        return
    instance = (await house.start(runtime, BOUNDED["memory_limit"])).instance
    with pytest.raises(KernelFault):
        await house.do(instance, "eat", 1000, timeout_s=3.0)
    reason = (await house.ended(instance)).reason
    assert "out of memory" in reason, reason
    assert "memory_mb" in reason


async def test_the_cpu_limit_throttles(house: House, runtime: str) -> None:
    if "cpu_limit" not in await house.can(runtime):
        await refused(house, runtime, "cpu_limit", limits=BOUNDED["cpu_limit"])
        return
    instance = (await house.start(runtime, BOUNDED["cpu_limit"])).instance
    share = (await house.do(instance, "burn", 3.0)).number
    assert share < 0.35, "0.2 of a core were allowed"
    await house.stop(instance)


async def test_the_pids_limit_refuses_more_processes(house: House, runtime: str) -> None:
    if "pids_limit" not in await house.can(runtime):
        await refused(house, runtime, "pids_limit", limits=BOUNDED["pids_limit"])
        return
    instance = (await house.start(runtime, BOUNDED["pids_limit"])).instance
    told = await house.do(instance, "children", 60)
    assert 0 < told.number < 40
    assert "temporarily unavailable" in told.text
    await house.stop(instance)


async def test_isolation_hides_its_neighbours_or_is_refused(house: House, runtime: str) -> None:
    if "isolation" not in await house.can(runtime):
        await refused(house, runtime, "isolation", isolated=True)
        return
    running = await house.start(runtime, isolated=True)  # all that it keeps away is in test_container.py
    assert (await house.do(running.instance, "where")).number < 50, "it sees a process number of its own name space"
    assert Path(f"/proc/{running.pid}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink()
    await house.stop(running.instance)


async def test_gpus_are_refused_where_they_are_not_enforced(house: House, runtime: str) -> None:
    if "gpu_limit" not in await house.can(runtime):
        await refused(house, runtime, "gpu_limit", needs=Resources(0.0, 64, 1))


async def refused(house: House, runtime: str, ability: str, **more: Any) -> None:
    with pytest.raises(ClientFault) as caught:
        await house.system.admin.call(Node.start, StartInstance("tiny-x", "tiny", "x", runtime, "", **more), instance="node-local")
    assert caught.value.code == "unsupported_runtime"
    assert ability in caught.value.message
    assert caught.value.remedy


async def test_nothing_is_left_of_those_that_ended(house: House, runtime: str) -> None:
    running = await house.start(runtime, Limits(pids=100) if "pids_limit" in await house.can(runtime) else Limits())
    assert groups(running.instance) or runtime == "inproc"
    await house.stop(running.instance)
    await house.ended(running.instance)
    assert groups(running.instance) == []
    home = house.system.home

    def left() -> list[str]:  # its handle goes when the kernel has taken the report
        return [str(p) for p in (*home.glob("run/*/*"), *home.glob("scratch/*")) if running.instance in p.name]

    await until(lambda: not left(), 10, "nothing left")


def groups(instance: str) -> list[str]:
    """Control groups of an instance that the node made, or the engine made for its container (named by the container)."""
    made = [str(p) for p in Path("/sys/fs/cgroup").glob(f"**/*{instance}*")]
    containers = [p.pid for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("KERNELM_INSTANCE") == instance]
    return made + [str(p) for p in containers]


async def test_an_instance_outlives_the_node_and_is_adopted_or_lost_with_it(house: House, runtime: str) -> None:
    limits = Limits(pids=100) if "pids_limit" in await house.can(runtime) else Limits()
    running = await house.start(runtime, limits)
    node = house.system.processes["node"]
    node.kill()
    node.wait()
    if runtime != "inproc":
        assert (await house.do(running.instance, "say", text="without a node")).text == "without a node"
    await house.system.service("node", **house.path)
    if runtime == "inproc":  # it was a part of the node
        assert "no node was watching" in (await house.ended(running.instance)).reason
        return
    assert running in (await house.report()).running
    assert (await house.do(running.instance, "say", text="adopted")).text == "adopted"
    with pytest.raises(KernelFault):
        await house.do(running.instance, "crash", 9, timeout_s=CRASH_S)
    assert "ended with code 9" in (await house.ended(running.instance)).reason
    await until(lambda: groups(running.instance) == [], 10, "the end of its control groups")


@pytest.mark.parametrize(("change", "code"), [
    (('name = "tiny"', 'name = "other"'), "manifest_mismatch"),
    (('version = "0.0.1"', ""), "invalid_manifest"),
    (('"process", "venv"', '"venv"'), "unsupported_runtime"),
])  # fmt: skip
async def test_an_artifact_that_is_not_what_was_asked_for_is_refused(house: House, tmp_path: Path, change: tuple[str, str],
                                                                    code: str) -> None:  # fmt: skip
    folder = tmp_path / "changed"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("__pycache__"))
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace(*change))
    digest = (await house.system.admin.call(Artifacts.put, PutArtifact(str(folder), "plugin"))).digest
    with pytest.raises(ClientFault) as caught:
        await house.system.admin.call(Node.start, StartInstance("tiny-x", "tiny", "x", "process", "", source=digest),
                                      instance="node-local")  # fmt: skip
    assert caught.value.code == code
    with pytest.raises(ClientFault) as caught:
        await house.system.admin.call(Node.start, StartInstance("tiny-x", "tiny", "x", "process", "", source="sha256:" + "0" * 64),
                                      instance="node-local")  # fmt: skip
    assert caught.value.code == "not_found"


async def test_an_entry_that_is_not_there_is_explained(house: House, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("__pycache__"))
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace("kernelm_tiny.plugin:", "kernelm_tiny.misspelt:"))
    digest = (await house.system.admin.call(Artifacts.put, PutArtifact(str(folder), "plugin"))).digest
    token = house.system.authority.token("tiny-entry", Grant("plugin", "tiny-entry", "entry", "tiny"))
    await house.system.admin.call(Node.start, StartInstance("tiny-entry", "tiny", "entry", "process", token, source=digest),
                                  instance="node-local", timeout_s=60.0)  # fmt: skip
    handles = house.system.home / "run" / "instances"
    await until(lambda: "invalid_entry" in house.log("tiny-entry") and not list(handles.glob("tiny-entry*")), 30, "its end")
    advice = (await house.system.admin.call(Node.diagnose, InstanceName("tiny-entry"), instance="node-local")).advice
    assert "kernelm_tiny.misspelt" in advice
    assert "correct `entry`" in advice


async def test_abilities_are_those_of_the_contract() -> None:
    assert set(BOUNDED) < set(ABILITIES)
