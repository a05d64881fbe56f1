"""Where an instance runs while it is checked: in a process of the kit's own, or in a runtime of the node service.

The kit's own process needs nothing but the plugin, and is the quickest. The node's runtimes (package `kernelm-node`) are
those that it runs in for real: forked from a warm parent, in an environment of its own, in a container, in the node's process.
"""

import asyncio
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernelm.testing.conformance.results import Failed, Skipped
from kernelm.testing.conformance.subject import Subject
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import MANIFEST, find_manifests, package_folder
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts, OpenArtifact, PutArtifact, StartInstance

IMAGE = "KERNELM_NODE_IMAGE"  # the node's setting: the id of the image that containers are made of
Stage = Callable[[Path, Path], object]  # (the plugin's folder, an empty one): copies what `kernelm plugin load` would store


class Body(ABC):
    """What one instance is while it runs."""

    @property
    @abstractmethod
    def code(self) -> int | None:
        """Its exit code (-N for signal N), None as long as it runs."""

    @abstractmethod
    def signal(self, number: int) -> None:
        """Send a signal, if it is still there; Skipped where it is no process that could be sent one."""

    @abstractmethod
    async def ended(self, timeout_s: float) -> int | None:
        """Its exit code, or None if it has not ended in time."""

    @abstractmethod
    async def end(self) -> None:
        """Kill it and all that it started."""


class Place(ABC):
    """A way to run instances."""

    runtime: str = "process"
    keeps_token = False  # the token's file is the node's to delete

    @abstractmethod
    async def start(self, subject: Subject, environment: dict[str, str], scratch: Path, log: Path) -> Body:
        """Start an instance; a Fault or Failed where it can't be."""

    async def close(self) -> None:  # noqa: B027 - none has to
        """All of its instances have ended."""


class OwnBody(Body):
    """A child of this process."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def ended(self, timeout_s: float) -> int | None:
        try:
            return await asyncio.to_thread(self._process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            return None

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self.ended(10)


class OwnProcess(Place):
    """Instances are processes that the kit starts itself, as kernel/PROTOCOL.md says."""

    async def start(self, subject: Subject, environment: dict[str, str], scratch: Path, log: Path) -> Body:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("KERNELM_")}
        path = os.pathsep.join([str(subject.root), *filter(None, [kept.get("PYTHONPATH")])])
        environment = kept | environment | {"KERNELM_MANIFEST": str(subject.file), "PYTHONPATH": path}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the author's folder stays as it is
        command = subject.command or (sys.executable, "-m", "kernelm_sdk.runner")
        try:
            with log.open("ab") as output:
                return OwnBody(subprocess.Popen(command, env=environment, cwd=subject.folder, stdin=subprocess.DEVNULL,
                                                stdout=output, stderr=output, start_new_session=True))  # fmt: skip
        except OSError as error:
            raise Failed(f"{command[0]} can't be started: {error.strerror}", remedy="install it, or correct `command`") from None


class NodeBody(Body):
    """A task of the node's. It is waited for from its beginning on, as the node does."""

    def __init__(self, runtime: Any, task: Any, handle: Any) -> None:
        self._runtime, self._task, self._handle = runtime, task, handle
        self._waiting = asyncio.create_task(self._wait())

    async def _wait(self) -> int:
        code = int((await self._task.wait()).code)
        await self._runtime.clear(self._handle)
        return code

    @property
    def code(self) -> int | None:
        return self._waiting.result() if self._waiting.done() else None

    def signal(self, number: int) -> None:
        if number == signal.SIGTERM:
            self._task.ask()
        elif not self._task.pid:
            raise Skipped("an instance in the node's own process can be sent no signal")
        elif self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._task.pid, number)

    async def ended(self, timeout_s: float) -> int | None:
        await asyncio.wait([self._waiting], timeout=timeout_s)
        return self.code

    async def end(self) -> None:
        if self.code is None:
            await self._task.kill()
        await self.ended(30)


class NodePlace(Place):
    """Instances run in one of the node's runtimes, started and watched as the node does it."""

    def __init__(self, runtime: Any, home: Path, source: Path | None, image: str = "") -> None:
        self._runtime, self._home, self._source, self._image = runtime, home, source, image
        self.runtime = runtime.name
        self.keeps_token = runtime.name == "container"

    async def start(self, subject: Subject, environment: dict[str, str], scratch: Path, log: Path) -> Body:
        from kernelm_node.runtimes.runtime import HANDLE_VERSION, Handle, Launch

        manifest, source = subject.manifest, self._source
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("KERNELM_")}
        if source is not None:  # as the node sets it for a plugin that comes as an artifact
            inherited["PYTHONPATH"] = os.pathsep.join([str(source), *filter(None, [inherited.get("PYTHONPATH")])])
            inherited["PYTHONPYCACHEPREFIX"] = str(self._home / "run" / "pycache")
        file = subject.file if source is None else source / MANIFEST
        environment = inherited | environment | {"KERNELM_MANIFEST": str(file), "KERNELM_HOME": str(self._home)}
        name, pool = environment["KERNELM_INSTANCE"], environment["KERNELM_POOL"]
        store = self._home / "artifacts" / "trees"  # a container may read it as a whole: which of it, is a pool's to say
        granted = (store,) if store.is_dir() else ()
        launch = Launch(name, manifest.name, pool, environment, scratch, log, manifest, manifest.needs, source, manifest.limits,
                        manifest.isolated, manifest.network, self._image, granted)  # fmt: skip
        handle = Handle(HANDLE_VERSION, self.runtime, name, manifest.name, pool, manifest.needs, time.time(), str(log), 0)
        return NodeBody(self._runtime, await self._runtime.start(launch), handle)

    async def close(self) -> None:
        await self._runtime.close()


async def place_of(runtime: str, subject: Subject, home: Path, bus: Bus, stage: Stage | None = None, image: str = "") -> Place:
    """Where `subject` runs in the node's runtime of this name; Skipped, with the reason, where it can't."""
    if runtime not in subject.manifest.runtimes:
        raise Skipped(f"its manifest does not name it: runtimes = {', '.join(subject.manifest.runtimes)}")
    if importlib.util.find_spec("kernelm_node") is None:
        raise Skipped("the node's runtimes are not installed: pip install kernelm-node")
    from kernelm_node.runtimes import Runtimes

    if runtime == "container" and not (image or os.environ.get(IMAGE)):
        raise Skipped(f"no image for containers: set {IMAGE} to what deploy/images/docker.sh prints, or give --image")
    m = subject.manifest
    wanted = StartInstance("checked", m.name, "checked", runtime, "", m.needs, "", m.limits, m.isolated, m.network, image)
    runtimes = Runtimes(home)
    try:
        await runtimes.find(runtime).probe()
        found = await runtimes.choose(wanted)
    except ClientFault as fault:
        raise Skipped(f"{fault.message}; {fault.remedy}") from None
    if runtime == "inproc":
        _require_installed(subject)
        return NodePlace(found, home, None)
    return NodePlace(found, home, await _stored(subject, home, bus, stage), image)


def _require_installed(subject: Subject) -> None:
    """`inproc` runs what is installed, from where it is installed."""
    from kernelm_node.runtimes.inproc import require_first_party

    try:
        require_first_party(subject.manifest.name)
    except ClientFault as fault:
        raise Skipped(f"{fault.message}; {fault.remedy}") from None
    folder = package_folder(subject.manifest.entry.partition(".")[0])
    installed = find_manifests()[0].get(subject.manifest.name)
    if installed is None or folder is None or not subject.file.is_relative_to(folder):
        raise Skipped(f"what is installed under its name is not what lies in {subject.folder}")


async def _stored(subject: Subject, home: Path, bus: Bus, stage: Stage | None) -> Path:
    """The plugin's files as the node gets them, from the artifact store. Skipped where that is not installed."""
    if importlib.util.find_spec("kernelm_artifacts") is None:
        raise Skipped("the artifact store, from which the node takes a plugin, is not installed: pip install kernelm-artifacts")
    if stage is None:
        raise Skipped("no way is known to put its files into the store: use `kernelm plugin check`")
    scratch = home / "scratch"
    scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        stage(subject.folder, Path(folder))
        stored: Artifact = await bus.call(Artifacts.put, PutArtifact(folder, "plugin"), timeout_s=60.0)
    opened: OpenArtifact = await bus.call(Artifacts.open, ArtifactName(stored.digest), timeout_s=60.0)
    return Path(opened.path)
