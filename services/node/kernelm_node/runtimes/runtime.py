"""The seam behind which a process, a task and a container are the same thing (after Nomad's `runner.go`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from kernelm_sdk.plugin import Manifest
from kernelm_sdk.system import Limits, Resources

HANDLE_VERSION = 1
UNKNOWN_CODE = 255  # the exit code of what ended unobserved
ABILITIES = ("kill", "cpu_limit", "memory_limit", "pids_limit", "gpu_limit", "isolation")


class Launch(msgspec.Struct, frozen=True):
    """What to start: the same for every runtime."""

    instance: str
    plugin: str
    pool: str
    environment: dict[str, str]  # of the runner: the KERNELM_ variables and what it inherits
    scratch: Path  # the instance's own folder, which exists
    log: Path  # where its output is appended
    manifest: Manifest
    needs: Resources = Resources()
    source: Path | None = None  # read-only folder with the plugin's files and manifest; None: it is installed on this node
    limits: Limits = Limits()
    isolated: bool = False
    network: bool = False  # more than the way to the broker
    image: str = ""  # of a container: id or digest; "" for the node's own runner image
    artifacts: tuple[Path, ...] = ()  # read-only folders that a container may see


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

    changed: Callable[[], None] = staticmethod(lambda: None)  # set by the node: `state` is another now, write it down

    @property
    @abstractmethod
    def state(self) -> dict[str, Any]:
        """For the handle: what `Runtime.adopt` needs."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """The process id; 0 where the instance has no process of its own, or none yet."""

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
    """A way to run instances on this node; one object for all of them."""

    name: ClassVar[str]

    def __init__(self, home: Path) -> None:
        self.home = home
        self.can: tuple[str, ...] = ()  # of ABILITIES: only what is enforced on this node, as `probe` found out
        self.missing = ""  # why it can't be used on this node at all, and what to do about it; "" when it can

    async def probe(self) -> None:  # noqa: B027 - none has to
        """Find out `can` and `missing`. Called when the node starts, and again before a start is refused for the lack of
        something: what is missing may have come since."""

    @abstractmethod
    async def start(self, launch: Launch) -> Task:
        """Start it. ClientFault when this runtime may not run it, KernelFault "can_not_start" when it can't. What takes
        longer than a few seconds goes on behind the task that is returned (`preparing.PreparedTask`)."""

    @abstractmethod
    async def adopt(self, handle: Handle) -> Task | None:
        """The instance that an earlier node process started, if it still runs."""

    async def clear(self, handle: Handle) -> None:  # noqa: B027 - none has to
        """Remove what is left of an instance that has ended (control groups, a container). May be called twice."""

    async def close(self) -> None:  # noqa: B027 - none has to
        """The node stops; its instances have ended."""
