"""Runtime `process`: a process of its own, `python -m kernelm_sdk.runner`, in a session of its own, so that it outlives
the node and can be killed with all its children. It declares `kill` and nothing else: a limit at an instance's `needs`
would be wrong, since its jobs bring requests of their own, and the same user owns all processes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import psutil

from kernelm_node.runtimes.oom import OomWitness
from kernelm_node.runtimes.pidfd import ended, exit_code, open_pidfd, started_at
from kernelm_node.runtimes.runtime import UNKNOWN_CODE, Exit, Handle, Launch, Runtime, Task
from kernelm_sdk.errors import KernelFault


class ProcessTask(Task):
    """A process, our own child or adopted. One way of watching serves both: its pidfd. asyncio's own child watcher is
    not used, because it reaps at once."""

    def __init__(self, pid: int, started: str, descriptor: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self._pid, self._started, self._descriptor, self._child = pid, started, descriptor, child
        self._witness = OomWitness(pid)
        self._exit: Exit | None = None
        self._killed = False

    @property
    def state(self) -> dict[str, Any]:
        return {"pid": self._pid, "started": self._started}

    @property
    def pid(self) -> int:
        return self._pid

    async def wait(self) -> Exit:
        if self._exit is None:
            await ended(self._descriptor)
            self._signal_group(signal.SIGKILL)  # workers that it left behind; before the reaping frees the number
            if self._child is not None:
                code: int | None = self._child.wait()
            else:
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

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # empty; or all of it is another user's by now
            os.killpg(self._pid, number)


class ProcessRuntime(Runtime):
    """One process an instance."""

    name: ClassVar[str] = "process"
    can: ClassVar[tuple[str, ...]] = ("kill",)
    command: ClassVar[tuple[str, ...]] = (sys.executable, "-m", "kernelm_sdk.runner")

    async def start(self, launch: Launch) -> Task:
        try:
            with launch.log.open("ab") as log:
                child = subprocess.Popen(self.command, env=launch.environment, cwd=launch.scratch, stdin=subprocess.DEVNULL,
                                         stdout=log, stderr=log, start_new_session=True)  # fmt: skip
        except OSError as error:
            raise KernelFault("can_not_start", f"{launch.instance}: {error}", "look at the path that the message names") from error
        return ProcessTask(child.pid, started_at(child.pid), os.pidfd_open(child.pid), child)

    async def adopt(self, handle: Handle) -> Task | None:
        pid, started = int(handle.state.get("pid", 0)), str(handle.state.get("started", ""))
        if not pid:  # the node died between the start and its note of the number
            pid = await asyncio.to_thread(_find, handle.instance)
            started = started_at(pid) if pid else ""
        descriptor = open_pidfd(pid, started) if pid and started else -1
        return ProcessTask(pid, started, descriptor) if descriptor >= 0 else None


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
