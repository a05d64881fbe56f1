"""What the machine has: cores and memory within the control groups' limits, or what the settings say.

Control groups: version 2 (Documentation/admin-guide/cgroup-v2.rst) and version 1 (cgroup-v1/memory.rst, scheduler/sched-bwc.rst).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import psutil

from kernelm_node.runtimes.oom import CGROUPS
from kernelm_sdk.errors import ClientFault, invalid
from kernelm_sdk.system import Resources

MB = 2**20


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From environment variables `KERNELM_NODE_<FIELD>`; what is left out is found out."""

    cpu: float | None = None  # cores to give away
    memory_mb: int | None = None  # memory to give away, 2**20 bytes
    gpus: int | None = None  # GPUs to give away
    logs_mb: int = 512  # kept of the logs of instances that have ended, 2**20 bytes; 0: all
    image: str = ""  # of containers that bring none (runtimes/container.py)


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings in `environment`; ClientFault "invalid" that names the variable."""
    given = {k.removeprefix("KERNELM_NODE_").lower(): v for k, v in environment.items() if k.startswith("KERNELM_NODE_")}
    try:
        settings = msgspec.convert(given, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise invalid("KERNELM_NODE_*", error, "known are KERNELM_NODE_CPU, _MEMORY_MB, _GPUS, _LOGS_MB and _IMAGE") from None
    for name, least in (("cpu", 0.01), ("memory_mb", 1), ("gpus", 0), ("logs_mb", 0)):
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ClientFault("invalid", f"KERNELM_NODE_{name.upper()} is {value}", f"it must be at least {least}")
    return settings


class Machine:
    """This machine. `root` is where control groups are mounted."""

    def __init__(self, settings: Settings, root: Path = CGROUPS, membership: str | None = None) -> None:
        self._settings, self._root = settings, root
        self._membership = Path("/proc/self/cgroup").read_text() if membership is None else membership
        psutil.cpu_percent()  # from now on each call gives the load since the one before

    def capacity(self) -> Resources:
        """What there is to give away."""
        given = self._settings
        cpu = float(len(os.sched_getaffinity(0)))
        cpu = min([cpu, *self._cpu_limits()]) if given.cpu is None else given.cpu
        memory = min([psutil.virtual_memory().total, *(limit for limit, _ in self._memory())])
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) if given.gpus is None else given.gpus
        return Resources(round(cpu, 2), memory // MB if given.memory_mb is None else given.memory_mb, gpus)

    def free(self, running: Iterable[Resources]) -> Resources:
        """What is left: idle cores since the last call, available memory, GPUs that no running instance asked for."""
        capacity = self.capacity()
        idle = (psutil.cpu_count() or 1) * (1 - psutil.cpu_percent() / 100)
        available = min([psutil.virtual_memory().available, *(limit - used for limit, used in self._memory())])
        gpus = capacity.gpus - sum(needs.gpus for needs in running)
        cpu, memory_mb = min(idle, capacity.cpu), min(available // MB, capacity.memory_mb)
        return Resources(round(max(cpu, 0.0), 2), max(memory_mb, 0), max(gpus, 0))

    def _groups(self, controller: str) -> Iterator[tuple[Path, bool]]:
        """Our control group for `controller` and all above it, with whether they are of version 2."""
        for line in self._membership.splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = self._root / controller if controllers else self._root
            if not controllers and not (top / "cgroup.controllers").exists():
                continue  # of a hybrid hierarchy the part without controllers
            group = top / path.strip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(top) and folder.is_dir():
                    yield folder, not controllers

    def _cpu_limits(self) -> Iterator[float]:
        for folder, second in self._groups("cpu"):
            with contextlib.suppress(OSError, ValueError):  # no such file at the root; "max"
                if second:
                    quota, period = (int(v) for v in (folder / "cpu.max").read_text().split())
                else:
                    quota, period = (int((folder / f"cpu.cfs_{n}_us").read_text()) for n in ("quota", "period"))
                if quota > 0:
                    yield quota / period

    def _memory(self) -> Iterator[tuple[int, int]]:
        """(limit, used without what can be dropped) of each group that has a limit, in bytes."""
        for folder, second in self._groups("memory"):
            names = ("memory.max", "memory.current", "inactive_file") if second else \
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")  # fmt: skip
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                if limit < 2**60:  # version 1 writes "none" as a number near 2**63
                    yield limit, max(used - int(statistics.get(names[2], 0)), 0)
