"""Runtime `process`: a process of its own, in a session of its own, so that it outlives the node and can be killed with
all its children. It is forked from a parent that has imported the plugin already (warm.py), or, where that is not to be had,
started as `python -m kernelm_sdk.runner`. A plugin in another language is its manifest's `command`, started in the plugin's
folder (commands.py). Limits are control groups' (groups.py). The same user owns all processes, so there
is no isolation; GPUs are shared out by the scheduler and not enforced."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import psutil

from kernelm_node.runtimes.commands import resolve
from kernelm_node.runtimes.groups import Groups, kill_all, remove
from kernelm_node.runtimes.oom import OomWitness
from kernelm_node.runtimes.pidfd import ended, exit_code, open_pidfd, started_at
from kernelm_node.runtimes.runtime import UNKNOWN_CODE, Exit, Handle, Launch, Runtime, Task
from kernelm_node.runtimes.warm import NotWarm, WarmStarts
from kernelm_sdk.errors import KernelFault

log = logging.getLogger("kernelm.node")
CLEAR_S = 5.0  # for what was killed to leave its control groups
# joins the control groups that it is given, then becomes the command: nothing of it runs outside of them
JOIN = """while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || exit 125; shift; done; shift; exec "$@" """


class ProcessTask(Task):
    """A process, our own child or adopted. One way of watching serves both: its pidfd. asyncio's own child watcher is
    not used, because it reaps at once."""

    def __init__(self, pid: int, started: str, descriptor: int, groups: list[Path], child: subprocess.Popen[bytes] | None = None,
                 warm: WarmStarts | None = None, parent: str = "") -> None:  # fmt: skip
        self._pid, self._started, self._descriptor, self._child = pid, started, descriptor, child
        self._groups, self._warm, self._parent = groups, warm, parent  # `parent` has forked it, and reaps it for us
        self._witness = OomWitness(pid, next((g for g in groups if (g / "memory.stat").exists()), None))
        self._exit: Exit | None = None
        self._killed = False

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"pid": self._pid, "started": self._started}
        if self._parent:
            state["parent"] = self._parent
        if self._groups:
            state["groups"] = [str(g) for g in self._groups]
        return state

    @property
    def pid(self) -> int:
        return self._pid

    async def wait(self) -> Exit:
        if self._exit is None:
            await ended(self._descriptor)
            self._signal_group(signal.SIGKILL)  # workers that it left behind; before the reaping frees the number
            kill_all(self._groups)
            code: int | None = None
            if self._child is not None:
                code = self._child.wait()
            elif self._parent and self._warm is not None:
                code = await self._warm.reap(self._parent, self._pid)
            if code is None:
                code = await asyncio.to_thread(exit_code, self._descriptor, self._pid, self._started)
            os.close(self._descriptor)
            self._descriptor = -1
            note = "killed by the node" if self._killed else self._witness.verdict() if code == -signal.SIGKILL else ""
            self._exit = Exit(UNKNOWN_CODE if code is None else code, note)
        return self._exit

    def ask(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGTERM)

    async def kill(self) -> None:
        self._killed = True
        for process in await asyncio.to_thread(_descendants, self._pid) if self._descriptor >= 0 else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # children in sessions of their own are not in the group
        if self._descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
            self._signal_group(signal.SIGKILL)
        kill_all(self._groups)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # empty; or all of it is another user's by now
            os.killpg(self._pid, number)


class ProcessRuntime(Runtime):
    """One process an instance."""

    name: ClassVar[str] = "process"
    command: ClassVar[tuple[str, ...]] = (sys.executable, "-m", "kernelm_sdk.runner")
    warm_command: ClassVar[tuple[str, ...]] = command  # what a fork stands in for; another command is started cold

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.can = ("kill",)
        self._groups = Groups(home)
        self._warm = WarmStarts(home)

    async def probe(self) -> None:
        self.can = ("kill", *await asyncio.to_thread(self._groups.probe))

    async def start(self, launch: Launch) -> Task:
        groups = self._groups.make(launch.instance, launch.limits)
        try:
            if launch.manifest.command:
                program, folder = await asyncio.to_thread(resolve, launch)
                return self.popen(launch, program, groups, folder)
            if self.command == self.warm_command:
                try:
                    pid, parent = await self._warm.fork(launch, groups)
                    return ProcessTask(pid, started_at(pid, True), os.pidfd_open(pid), groups, warm=self._warm, parent=parent)
                except NotWarm as reason:
                    log.info("%s starts cold: %s", launch.instance, reason)
            return self.popen(launch, self.command, groups)
        except BaseException:
            await self._remove(groups)
            raise

    def popen(self, launch: Launch, command: tuple[str, ...], groups: list[Path], folder: Path | None = None) -> Task:
        """`command` as a process of its own in `groups`, started in `folder` or the instance's scratch folder."""
        if shutil.which(command[0]) is None:  # told here also when a shell would be the one to find out
            raise KernelFault("can_not_start", f"{launch.instance}: {command[0]} is no program", "look at the path that is named")
        full = ("/bin/sh", "-c", JOIN, "kernelm-join", *(str(g) for g in groups), "--", *command) if groups else command
        try:
            with launch.log.open("ab") as output:
                child = subprocess.Popen(full, env=launch.environment, cwd=folder or launch.scratch, stdin=subprocess.DEVNULL,
                                         stdout=output, stderr=output, start_new_session=True)  # fmt: skip
        except OSError as error:
            raise KernelFault("can_not_start", f"{launch.instance}: {error}", "look at the path that the message names") from error
        return ProcessTask(child.pid, started_at(child.pid, True), os.pidfd_open(child.pid), groups, child)

    async def adopt(self, handle: Handle) -> Task | None:
        pid, started = int(handle.state.get("pid", 0)), str(handle.state.get("started", ""))
        parent = str(handle.state.get("parent", ""))
        if not pid:  # the node died between the start and its note of the number
            pid, parent = await self._warm.find(handle.instance)
            pid = pid or await asyncio.to_thread(_find, handle.instance)
            started = started_at(pid, bool(parent)) if pid else ""
        # one that ended meanwhile waits for somebody who asks its parent for its code
        descriptor = open_pidfd(pid, started, bool(parent)) if pid and started else -1
        if descriptor < 0:
            return None
        return ProcessTask(pid, started, descriptor, self._groups_of(handle), warm=self._warm, parent=parent)

    async def clear(self, handle: Handle) -> None:
        await self._remove(self._groups_of(handle))

    async def close(self) -> None:
        await self._warm.close()

    def _groups_of(self, handle: Handle) -> list[Path]:
        return [Path(g) for g in handle.state.get("groups", ())] or self._groups.of(handle.instance)

    async def _remove(self, groups: list[Path]) -> None:
        end = asyncio.get_running_loop().time() + CLEAR_S
        left = groups
        while left := [group for group in left if not remove(group)]:
            if asyncio.get_running_loop().time() > end:
                log.error("control groups %s stay: something in them does not end", ", ".join(str(g) for g in left))
                return
            kill_all(left)
            await asyncio.sleep(0.01)


def _find(instance: str) -> int:
    """The session leader among this user's processes that was started as `instance`; 0 for none."""
    wanted = f"KERNELM_INSTANCE={instance}".encode()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == pid and wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
    return 0


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
