"""The seam behind which a process, a task and (later) a container are the same thing (after Nomad's `runner.go`)."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from kernelm_sdk.system import Resources

HANDLE_VERSION = 1
UNKNOWN_CODE = 255  # the exit code of what ended unobserved


class Launch(msgspec.Struct, frozen=True):
    """What to start: the same for every runtime."""

    instance: str
    plugin: str
    pool: str
    environment: dict[str, str]  # of the runner: the KERNELM_ variables and what it inherits
    scratch: Path  # the instance's own folder, which exists
    log: Path  # where its output is appended
    needs: Resources = Resources()


class Handle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node writes down so that its successor finds the instance again. `state` is the runtime's own."""

    version: int
    runtime: str
    instance: str
    plugin: str
    pool: str
    needs: Resources
    started: float  # Unix seconds
    log: str  # its path
    log_offset: int  # where in the log this start begins, bytes
    state: dict[str, Any] = {}
    exit: "Exit | None" = None  # it ended, and the kernel has not been told yet


class Exit(msgspec.Struct, frozen=True):
    """How an instance ended. `code` is the exit status, -N for signal N, UNKNOWN_CODE when nobody could see it."""

    code: int
    note: str = ""  # what the runtime knows beyond the code: "killed by the kernel: out of memory"


class Task(ABC):
    """One running instance."""

    @property
    @abstractmethod
    def state(self) -> dict[str, Any]:
        """For the handle: what `Runtime.adopt` needs."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """The process id; 0 where the instance has no process of its own."""

    @abstractmethod
    async def wait(self) -> Exit:
        """Wait for the end, however it comes. May be awaited by one waiter at a time."""

    @abstractmethod
    def ask(self) -> None:
        """Ask it to stop; it takes the time it needs."""

    @abstractmethod
    async def kill(self) -> None:
        """End it and all that it started, now."""


class Runtime(ABC):
    """A way to run instances."""

    name: ClassVar[str]
    can: ClassVar[tuple[str, ...]]  # of kill, cpu_limit, memory_limit, gpu_limit, isolation: only what is enforced

    @abstractmethod
    async def start(self, launch: Launch) -> Task:
        """Start it. ClientFault when this runtime may not run it, KernelFault "can_not_start" when it can't."""

    @abstractmethod
    async def adopt(self, handle: Handle) -> Task | None:
        """The instance that an earlier node process started, if it still runs."""
