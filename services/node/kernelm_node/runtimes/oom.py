"""Was it the out-of-memory killer? A SIGKILL does not say who sent it; the control group's counter and the kernel's log do."""

import os
import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
KMSG = Path("/dev/kmsg")


def memory_group(pid: int | str = "self") -> Path | None:
    """The folder of the memory control group of `pid`: version 1 (".../memory/...") or 2; None where there is none."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = CGROUPS / "memory" if "memory" in controllers.split(",") else CGROUPS if controllers == "" else None
        if root is None or (controllers == "" and not (root / "cgroup.controllers").exists()):
            continue
        # inside a container the path is the host's, and the mount shows the container's own group at its root
        return next((p for p in (root / path.strip("/"), root) if p.is_dir()), None)
    return None


def oom_kills(group: Path | None) -> int:
    """How many processes of the group the kernel has killed for want of memory."""
    for name in ("memory.events", "memory.oom_control"):
        try:
            found = re.search(r"^oom_kill (\d+)$", (group / name).read_text(), re.MULTILINE) if group else None
        except OSError:
            continue
        if found:
            return int(found[1])
    return 0


class OomWitness:
    """Knows the counter from before; `verdict()` is asked after a SIGKILL that nobody here sent."""

    def __init__(self, pid: int, group: Path | None = None) -> None:
        """`group`: the memory control group of the process, where it is known without asking (it may not be in it yet)."""
        self._pid, self._group = pid, group or memory_group(pid)
        self._before = oom_kills(self._group)

    def verdict(self) -> str:
        """"out of memory: ..." if it was that, as far as one can see; else ""."""
        if line := self._in_kernel_log():
            return f"out of memory: the kernel says {line!r}"
        if oom_kills(self._group) > self._before:
            return "out of memory: the kernel killed a process of this control group since the start"
        return ""

    def _in_kernel_log(self) -> str:
        """The line about our process. Reading needs CAP_SYSLOG or kernel.dmesg_restrict=0."""
        try:
            descriptor = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return ""
        found = ""
        try:
            while True:
                try:
                    record = os.read(descriptor, 8192).decode(errors="replace").partition(";")[2]
                except BlockingIOError:
                    return found
                except BrokenPipeError:  # overtaken by the writer: go on at the oldest record
                    continue
                if re.search(rf"Killed process {self._pid}\b", record):
                    found = record.splitlines()[0]
        except OSError:
            return found
        finally:
            os.close(descriptor)
