"""Runtime `container`: a container of the Docker engine, made by the fixed template in `template.py`. Of the whole system
only the node holds the engine's socket.

A container has no network unless one was granted. It reaches the broker through a Unix socket that is mounted into it, from
which a process relays (`relay.py`): so there is no bridge over which it could try the host's other ports or its neighbours.
Relays outlive the node, like containers.

Output: the engine keeps all of it until the container is removed, in one order. A watcher copies it to the instance's log,
and after an adoption skips as many bytes as the log has from this start: neither gaps nor duplicates.
"""

import asyncio
import contextlib
import logging
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from requests import RequestException
from urllib3.exceptions import HTTPError

from kernelm_node.runtimes import relay
from kernelm_node.runtimes.containers import read_containers
from kernelm_node.runtimes.oom import OomWitness
from kernelm_node.runtimes.runtime import UNKNOWN_CODE, Exit, Handle, Launch, Runtime, Task
from kernelm_node.runtimes.template import (
    HOME_LABEL,
    INSTANCE_LABEL,
    checked,
    container,
    container_name,
    group,
    pinned,
    sockets,
    user,
)
from kernelm_sdk.errors import ClientFault, KernelFault

log = logging.getLogger("kernelm.node")
ENGINE_S = 30.0  # for an answer of the engine
AGAIN_S = 1.0  # between attempts to reach an engine that went away
TAIL_BYTES = 4096
ENGINE_ERRORS = (APIError, DockerException, RequestException, HTTPError, OSError)
IMAGE = "KERNELM_NODE_IMAGE"


class ContainerTask(Task):
    """A container that was started, by this node or an earlier one; `pid` is that of its main process, 0 for unknown. A
    thread of its own watches it: calls of the SDK block, and as many as there are instances would use up the event loop's
    threads."""

    def __init__(self, name: str, pid: int, output: Path, offset: int) -> None:
        self._name, self._pid, self._output, self._offset = name, pid, output, offset
        self._witness = OomWitness(pid) if pid else None
        self._killed = False
        self._tail = b""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Exit] = self._loop.create_future()
        self._asking: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._watch, name=f"watch-{name}", daemon=True).start()

    @property
    def state(self) -> dict[str, Any]:
        return {"container": self._name, "pid": self._pid}

    @property
    def pid(self) -> int:
        return self._pid

    async def wait(self) -> Exit:
        return await asyncio.shield(self._ended)

    def ask(self) -> None:
        task = asyncio.create_task(self._signal(signal.SIGTERM))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def kill(self) -> None:
        self._killed = True
        await self._signal(signal.SIGKILL)

    async def _signal(self, number: signal.Signals) -> None:
        def send() -> None:
            with contextlib.closing(docker.from_env(timeout=ENGINE_S)) as engine:
                engine.api.kill(self._name, number.name)

        try:
            await asyncio.to_thread(send)
        except ENGINE_ERRORS as error:  # the node kills what does not stop, and says so when that fails too
            if not (isinstance(error, APIError) and error.status_code in (404, 409)):  # gone, or ended: there is nobody to tell
                log.error("%s can't be sent %s: %s", self._name, number.name, error)

    # ---- in the thread ----

    def _watch(self) -> None:
        exit = self._until_the_end()
        with contextlib.suppress(RuntimeError):  # the loop is closed: the node is gone
            self._loop.call_soon_threadsafe(lambda: self._ended.done() or self._ended.set_result(exit))

    def _until_the_end(self) -> Exit:
        away = False
        while True:
            try:
                with contextlib.closing(docker.from_env(timeout=None)) as engine:  # it may be silent for long
                    found = engine.containers.get(self._name)
                    away = False
                    if found.status == "created":
                        return Exit(UNKNOWN_CODE, "its node died before its container was started")
                    self._copy_output(found)
                    found.wait()
                    found.reload()
                    return self._exit(found.attrs)
            except NotFound:
                return Exit(UNKNOWN_CODE, "its container was removed by another hand than the node's")
            except ENGINE_ERRORS as error:
                if not away:
                    log.error("the engine of %s went away, trying until it is back: %s", self._name, error)
                away = True
                threading.Event().wait(AGAIN_S)

    def _copy_output(self, found: Container) -> None:
        """All that is not in the log yet, until the container ends."""
        have = self._output.stat().st_size - self._offset if self._output.exists() else 0
        with self._output.open("ab", buffering=0) as sink:
            full = False
            for chunk in found.logs(stdout=True, stderr=True, stream=True, follow=True):
                fresh = chunk[have:] if have > 0 else chunk
                have -= len(chunk)
                self._tail = (self._tail + chunk)[-TAIL_BYTES:]
                try:
                    if fresh:
                        sink.write(fresh)
                        full = False
                except OSError as error:  # a full disk is no reason to lose sight of the instance
                    if not full:
                        log.error("output of %s is lost: %s", self._name, error)
                    full = True

    def _exit(self, attributes: dict[str, Any]) -> Exit:
        state, limit = attributes["State"], attributes["HostConfig"]["Memory"]
        code = int(state["ExitCode"])
        if 128 < code <= 128 + signal.SIGRTMAX:  # how the engine writes the end by a signal
            code = 128 - code
        if self._killed:
            return Exit(code, "killed by the node")
        if state["OOMKilled"] or (code == -signal.SIGKILL and self._witness and self._witness.verdict()):
            return Exit(code, f"out of memory: the kernel killed it at the container's limit of {limit >> 20} MB")
        if state.get("Error"):
            return Exit(code, state["Error"])
        if code != 0 and re.search(rb"^ModuleNotFoundError", self._tail, re.MULTILINE):
            return Exit(code, f"what a plugin imports must be in its image, and {attributes['Image'][:19]} lacks a module: "
                              "build one with it (deploy/images/README.md) and give its id as `image`")  # fmt: skip
        return Exit(code)


class ContainerRuntime(Runtime):
    """One container an instance."""

    name: ClassVar[str] = "container"

    def __init__(self, home: Path) -> None:
        super().__init__(home.absolute())
        self._engine: Any = None
        self._info: dict[str, Any] = {}
        self._broker = os.environ.get("KERNELM_URL", "")

    async def probe(self) -> None:
        """Ask the engine what it can enforce."""
        try:
            self._info = await asyncio.to_thread(self._look)
        except ENGINE_ERRORS as error:
            self.can, self._engine = (), None
            self.missing = f"no Docker engine answers at {os.environ.get('DOCKER_HOST', 'its usual socket')} ({error}): " \
                           "start dockerd, or set DOCKER_HOST, and see that the node's user may use it"  # fmt: skip
            return
        self.missing, self.can = "", abilities(self._info)

    def _look(self) -> dict[str, Any]:
        if self._engine is None:
            self._engine = docker.from_env(timeout=ENGINE_S)
            self._sweep()
        return dict(self._engine.info())

    def _sweep(self) -> None:
        """Remove ended containers whose instances nobody waits for: their handles are gone."""
        for found in self._engine.containers.list(all=True, filters={"label": f"{HOME_LABEL}={self.home}", "status": "exited"}):
            instance = found.labels.get(INSTANCE_LABEL, "")
            if not (self.home / "run" / "instances" / f"{instance}.json").exists():
                _remove(found)

    def _relay(self, instance: str) -> None:
        """One for each instance: who opens too many connections shuts out nobody else."""
        if not relay.goes_on(folder := sockets(self.home, instance), self._broker):
            relay.begin(folder, self._broker, user(), self.home / "logs" / "relay.log")

    async def start(self, launch: Launch) -> Task:
        if self._engine is None:
            raise KernelFault("can_not_start", f"{launch.instance}: {self.missing or 'the engine was not asked yet'}", "see there")
        ours = read_containers(self.home)
        installed = ours.images.get(launch.plugin, "")
        image = await asyncio.to_thread(self._image, launch.image or installed)
        if launch.needs.gpus and "gpu_limit" not in self.can:
            raise ClientFault("unsupported", f"{launch.instance} needs {launch.needs.gpus} GPUs: the engine has no NVIDIA runtime",
                              "install nvidia-container-toolkit, or run it as a process")  # fmt: skip
        self._broker = launch.environment["KERNELM_URL"]
        await asyncio.to_thread(self._relay, launch.instance)
        own = bool(installed) and launch.source is None and not launch.image
        arguments = container(launch, self.home, image, self._info, own=own, readable=ours.readable, volumes=ours.volumes)
        _give(launch.scratch, 0o700)
        _give(Path(launch.environment["KERNELM_TOKEN_FILE"]), 0o400)
        offset = launch.log.stat().st_size if launch.log.exists() else 0
        found = await self._asked(launch.instance, lambda: self._start(arguments))
        return ContainerTask(found.name, found.attrs["State"]["Pid"], launch.log, offset)

    def _image(self, wanted: str) -> str:
        """The id of the image `wanted`, or of the node's own for ""."""
        name = pinned(wanted) if wanted else os.environ.get(IMAGE, "")
        if not name:
            raise ClientFault("no_image", "this node has no image for containers, and none was asked for",
                              f"set {IMAGE} to what deploy/images/docker.sh prints, or give `image`")  # fmt: skip
        try:
            return checked(self._engine.images.get(name).attrs)
        except ImageNotFound:
            remedy = f"docker pull {name}" if "/" in name or "@" in name else "load it there, or run deploy/images/docker.sh"
            raise ClientFault("no_image", f"image {name} is not on this node", remedy) from None
        except ENGINE_ERRORS as error:
            raise KernelFault("can_not_start", f"the Docker engine: {error}", "see its log", retriable=True) from error

    def _start(self, arguments: dict[str, Any]) -> Container:
        try:
            found = self._engine.containers.create(**arguments)
        except APIError as error:
            if error.status_code != 409:
                raise
            _remove(self._engine.containers.get(arguments["name"]))  # left by a start whose end nobody saw
            found = self._engine.containers.create(**arguments)
        try:
            found.start()
            found.reload()
        except BaseException:
            _remove(found)
            raise
        return found

    async def _asked(self, instance: str, question: Callable[[], Any]) -> Any:
        try:
            return await asyncio.to_thread(question)
        except ENGINE_ERRORS as error:
            text = (error.explanation if isinstance(error, APIError) else "") or str(error)
            remedy = "an image needs `python` with kernelm-sdk: see deploy/images/README.md" if "executable file" in text \
                else "the engine's own words; `journalctl -u docker`, or its log, may say more"  # fmt: skip
            raise KernelFault("can_not_start", f"{instance}: the Docker engine: {text}", remedy) from error

    async def adopt(self, handle: Handle) -> Task | None:
        """Also when it has ended meanwhile: its container still tells how. Found by its name, since the node may have died
        before it wrote anything down."""
        await asyncio.to_thread(self._relay, handle.instance)
        name, pid = container_name(self.home, handle.instance), int(handle.state.get("pid", 0))
        try:
            found = await asyncio.to_thread(self._find, name)
        except ENGINE_ERRORS as error:  # it may run on behind an engine that is away, and must not be given up
            log.error("%s is adopted without being seen: %s", name, error)
            return ContainerTask(name, pid, Path(handle.log), handle.log_offset)
        if found is None or found.status == "created":
            return None
        return ContainerTask(name, found.attrs["State"]["Pid"], Path(handle.log), handle.log_offset)

    def _find(self, name: str) -> Container | None:
        if self._engine is None:
            raise DockerException(self.missing or "the engine was not asked yet")
        try:
            return self._engine.containers.get(name)
        except NotFound:
            return None

    async def clear(self, handle: Handle) -> None:
        await asyncio.to_thread(relay.end, sockets(self.home, handle.instance))
        try:
            if found := await asyncio.to_thread(self._find, container_name(self.home, handle.instance)):
                await asyncio.to_thread(_remove, found)
        except ENGINE_ERRORS as error:  # the exit report is more urgent; the next node sweeps
            log.error("the container of %s stays for now: %s", handle.instance, error)

    async def close(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
            self._engine = None


def abilities(info: dict[str, Any]) -> tuple[str, ...]:
    """What the engine enforces, by its own account (`docker info`)."""
    enforced = {"kill": True, "cpu_limit": info.get("CpuCfsQuota"), "memory_limit": info.get("MemoryLimit"),
                "pids_limit": info.get("PidsLimit"), "gpu_limit": "nvidia" in (info.get("Runtimes") or {}),
                "isolation": any("seccomp" in option for option in info.get("SecurityOptions") or ())}  # fmt: skip
    return tuple(name for name, does in enforced.items() if does)


def _give(path: Path, mode: int) -> None:
    """To the containers' user; the node itself is it, or root."""
    path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(path, user(), group())


def _remove(found: Container) -> None:
    try:
        found.remove(force=True, v=True)
    except NotFound:
        pass
    except APIError as error:
        if error.status_code != 409:  # its removal is under way
            log.error("container %s can't be removed: %s", found.name, error.explanation)
