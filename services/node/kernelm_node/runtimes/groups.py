"""Control groups: one a limited instance and hierarchy, made before its first instruction, removed after its end.

Version 1 has a hierarchy for each controller (cgroup-v1/memory.rst, pids.rst, scheduler/sched-bwc.rst), version 2 one for
all (cgroup-v2.rst). There a group with processes can't hand controllers down, so a node that is alone in its group (a
systemd unit with `Delegate=yes`) first moves itself into a group below it. What is enforced is found out by trying."""

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import signal
from pathlib import Path

from kernelm_node.runtimes.oom import CGROUPS
from kernelm_sdk.errors import KernelFault
from kernelm_sdk.system import Limits

log = logging.getLogger("kernelm.node")
CONTROLLERS = {"cpu": "cpu_limit", "memory": "memory_limit", "pids": "pids_limit"}
PERIOD_US = 100_000  # over which the share of the processor is kept; the kernel's own default
NODE_LEAF = "kernelm-node"


class Groups:
    """The control groups of one node's instances: `kernelm-<node>-<instance>` below the node's own."""

    def __init__(self, home: Path, root: Path = CGROUPS, membership: str | None = None) -> None:
        self._prefix = f"kernelm-{hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]}-"
        self._root = root
        self._membership = Path("/proc/self/cgroup").read_text() if membership is None else membership
        self._parents: dict[str, Path] = {}  # controller -> the group below which ours are made
        self.second = False  # version 2

    def probe(self) -> tuple[str, ...]:
        """What can be limited here: a group is made with each limit, and removed."""
        self._parents = {}
        for controller, parent in self._candidates().items():
            trial = parent / f"{self._prefix}trial-{secrets.token_hex(3)}"
            try:
                trial.mkdir()
                try:
                    self._limit(trial, controller, 1)
                finally:
                    trial.rmdir()
            except OSError as error:
                log.info("no %s here: %s", CONTROLLERS[controller], error)
                continue
            self._parents[controller] = parent
        return tuple(CONTROLLERS[c] for c in self._parents)

    def make(self, instance: str, limits: Limits) -> list[Path]:
        """The groups for `instance`, with its limits; one that counts processes also where there is no limit, since it
        knows them all. KernelFault "can_not_limit" when one can't be made."""
        values = {"cpu": limits.cpu, "memory": limits.memory_mb * 2**20, "pids": limits.pids}
        made: list[Path] = []
        try:
            for controller, parent in self._parents.items():
                value = values[controller]
                if not value and controller != "pids":
                    continue
                group = parent / f"{self._prefix}{instance}"
                if group not in made:
                    group.mkdir(exist_ok=True)
                    made.append(group)
                if value:
                    self._limit(group, controller, value)
        except OSError as error:
            for group in made:
                remove(group)
            raise KernelFault("can_not_limit", f"{instance}: {error}", "look at the control groups of the node's process "
                              "(/proc/self/cgroup), or start it without limits") from error  # fmt: skip
        return made

    def of(self, instance: str) -> list[Path]:
        """The groups of `instance` that there are."""
        found = dict.fromkeys(parent / f"{self._prefix}{instance}" for parent in self._parents.values())
        return [group for group in found if group.is_dir()]

    def _limit(self, group: Path, controller: str, value: float) -> None:
        number = str(int(value))
        if controller == "pids":
            (group / "pids.max").write_text(number)
        elif controller == "cpu":
            quota = str(max(int(value * PERIOD_US), 1000))  # the least that the kernel takes
            if self.second:
                (group / "cpu.max").write_text(f"{quota} {PERIOD_US}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(quota)
        elif self.second:
            (group / "memory.max").write_text(str(max(int(value), 2**20)))
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap
                (group / "memory.swap.max").write_text("0")
        else:
            (group / "memory.limit_in_bytes").write_text(str(max(int(value), 2**20)))
            with contextlib.suppress(FileNotFoundError):  # swap is not counted on this machine
                (group / "memory.memsw.limit_in_bytes").write_text(str(max(int(value), 2**20)))

    def _candidates(self) -> dict[str, Path]:
        """Controller -> the node's own group, or where that is not to be seen (in a container) the mount's root."""
        found: dict[str, Path] = {}
        unified: Path | None = None
        for line in self._membership.splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                top = self._root
                unified = next((p for p in (top / path.strip("/"), top) if (p / "cgroup.controllers").exists()), None)
            for controller in CONTROLLERS.keys() & set(controllers.split(",")):
                top = self._root / controller
                group = next((p for p in (top / path.strip("/"), top) if p.is_dir()), None)
                if group:
                    found[controller] = group
        self.second = not found and unified is not None
        if self.second and unified is not None:
            if unified.name == NODE_LEAF:
                unified = unified.parent
            _hand_down(unified)
            given = (unified / "cgroup.subtree_control").read_text().split()
            found = {c: unified for c in CONTROLLERS if c in given}
        return {c: found[c] for c in CONTROLLERS if c in found}


def _hand_down(group: Path) -> None:
    """Let the groups below `group` (version 2) have the controllers that it has, if that is for us to say."""
    have = (group / "cgroup.controllers").read_text().split()
    wanted = " ".join(f"+{c}" for c in CONTROLLERS if c in have)
    control = group / "cgroup.subtree_control"
    try:
        try:
            control.write_text(wanted)
        except OSError as error:
            if error.errno != errno.EBUSY or members(group) != [os.getpid()]:
                raise
            leaf = group / NODE_LEAF
            leaf.mkdir(exist_ok=True)
            (leaf / "cgroup.procs").write_text(str(os.getpid()))
            control.write_text(wanted)
    except OSError as error:
        log.info("control group %s hands nothing down: %s; run the node in a group of its own (Delegate=yes)", group, error)


def members(group: Path) -> list[int]:
    """The processes in `group` itself; none where there is no such group."""
    try:
        return [int(p) for p in (group / "cgroup.procs").read_text().split()]
    except (FileNotFoundError, OSError) as error:
        if isinstance(error, FileNotFoundError) or error.errno == errno.ENODEV:  # removed meanwhile
            return []
        raise


def kill_all(groups: list[Path]) -> None:
    """SIGKILL to all in the groups, until they make no new ones: also those that left their session and their parent."""
    for group in groups:
        for _ in range(100):
            living = [pid for pid in members(group) if pid > 0]
            if not living:
                break
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def remove(group: Path) -> bool:
    """Remove an empty group; False while something is still ending in it."""
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            log.warning("control group %s stays: %s", group, error)
            return True
        return False
    return True

