"""Control groups: the real ones of this machine, and version 2 as far as files can show it."""

import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernelm_node.runtimes.groups import Groups, kill_all, members, remove
from kernelm_node.runtimes.pidfd import started_at
from kernelm_sdk.errors import KernelFault
from kernelm_sdk.system import Limits


def able(home: Path) -> Groups:
    groups = Groups(home)
    if set(groups.probe()) != {"cpu_limit", "memory_limit", "pids_limit"}:
        pytest.skip("needs to be root where control groups can be written")
    return groups


def test_probing_leaves_nothing_and_a_group_has_its_limits(tmp_path: Path) -> None:
    groups = able(tmp_path)
    made = groups.make("p-1", Limits(cpu=0.5, memory_mb=64, pids=20))
    try:
        assert groups.of("p-1") == made
        values = {f.name: f.read_text().strip() for g in made for f in g.iterdir()
                  if f.name in ("pids.max", "cpu.cfs_quota_us", "cpu.max", "memory.max", "memory.limit_in_bytes")}  # fmt: skip
        assert values["pids.max"] == "20"
        assert (values.get("cpu.cfs_quota_us") or values["cpu.max"].split()[0]) == "50000"
        assert int(values.get("memory.limit_in_bytes") or values["memory.max"]) == 64 * 2**20
        assert not [p for g in made for p in g.parent.iterdir() if "trial" in p.name and g.name[:16] in p.name]
    finally:
        assert all(remove(g) for g in made)
    assert groups.of("p-1") == []
    assert all(remove(g) for g in made), "a second time is harmless"


def test_kill_all_takes_those_that_left_parent_and_session(tmp_path: Path) -> None:
    groups = able(tmp_path)
    made = groups.make("p-1", Limits())
    assert len(made) == 1, "only what counts processes is made where there is no limit"
    program = """if True:
        import os, sys, time
        open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                print(os.getpid(), flush=True)
                time.sleep(600)
            os._exit(0)
        os.wait()"""
    child = subprocess.Popen([sys.executable, "-c", program, str(made[0])], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    orphan = int(child.stdout.readline())
    assert child.wait() == 0
    assert members(made[0]) == [orphan]
    pidfd = os.pidfd_open(orphan)
    kill_all(made)
    assert select.select([pidfd], [], [], 10)[0], "the orphan ends"
    os.close(pidfd)
    assert not started_at(orphan)
    while not remove(made[0]):
        pass


def test_a_limit_that_the_kernel_refuses_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    groups = able(tmp_path)
    with pytest.raises(KernelFault) as caught:
        groups.make("p-1", Limits(pids=2**40))
    assert caught.value.code == "can_not_limit"
    assert groups.of("p-1") == []


def tree(root: Path, controllers: str, procs: str) -> Path:
    """What a mount of version 2 looks like."""
    group = root / "system.slice" / "node.service"
    group.mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu memory pids io")
    for name, text in (("cgroup.controllers", controllers), ("cgroup.subtree_control", ""), ("cgroup.procs", procs)):
        (group / name).write_text(text)
    return group


def test_version_2_writes_one_group_with_all_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tree(tmp_path / "cgroup", "cpu memory pids", f"{os.getpid()}\n")
    monkeypatch.setattr(Path, "rmdir", lambda self: shutil.rmtree(self))  # in a real group the files go with the folder
    write = Path.write_text

    def control(self: Path, text: str) -> int:
        return write(self, text.replace("+", "") if self.name == "cgroup.subtree_control" else text)

    monkeypatch.setattr(Path, "write_text", control)
    groups = Groups(tmp_path, tmp_path / "cgroup", "0::/system.slice/node.service\n")
    assert groups.probe() == ("cpu_limit", "memory_limit", "pids_limit")
    made = groups.make("p-1", Limits(cpu=1.5, memory_mb=100, pids=7))
    assert [g.parent for g in made] == [group]
    assert {f.name: f.read_text() for f in made[0].iterdir()} == {
        "cpu.max": "150000 100000", "memory.max": str(100 * 2**20), "memory.swap.max": "0", "pids.max": "7"}  # fmt: skip


def test_nothing_is_claimed_where_no_group_can_be_made(tmp_path: Path) -> None:
    tree(tmp_path / "cgroup", "", "1\n")
    assert Groups(tmp_path, tmp_path / "cgroup", "0::/system.slice/node.service\n").probe() == ()
    assert Groups(tmp_path, tmp_path / "none", "4:memory:/a\n3:pids:/\n0::/\n").probe() == ()
