"""Capacity: this machine, control groups of both versions as the kernel writes them, and the overrides."""

import os
from pathlib import Path

import psutil
import pytest

from kernelm_node.resources import MB, Machine, Settings, read_settings
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Resources


def files(folder: Path, **contents: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_this_machine() -> None:
    machine = Machine(Settings())
    capacity, free = machine.capacity(), machine.free([])
    assert 0 < capacity.cpu <= os.cpu_count()
    assert 0 < free.memory_mb <= capacity.memory_mb <= psutil.virtual_memory().total // MB
    assert 0 <= free.cpu <= capacity.cpu


def test_limits_of_version_2_anywhere_above_count(tmp_path: Path) -> None:
    files(tmp_path, cgroup__controllers="cpu memory")
    files(tmp_path / "a", cpu__max="50000 100000", memory__max="max", memory__current="0", memory__stat="inactive_file 0")
    files(tmp_path / "a" / "b", cpu__max="max 100000", memory__max=str(100 * MB), memory__current=str(80 * MB),
          memory__stat=f"anon 5\ninactive_file {30 * MB}\n")  # fmt: skip
    machine = Machine(Settings(), tmp_path, "0::/a/b\n")
    assert machine.capacity() == Resources(0.5, 100, machine.capacity().gpus)
    assert machine.free([]).memory_mb == 50


def test_limits_of_version_1(tmp_path: Path) -> None:
    files(tmp_path / "cpu" / "x", **{"cpu__cfs_quota_us": "25000", "cpu__cfs_period_us": "100000"})
    files(tmp_path / "cpu", **{"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"})
    files(tmp_path / "memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="5",
          memory__stat="total_inactive_file 0")  # fmt: skip
    files(tmp_path / "memory" / "y", memory__limit_in_bytes=str(64 * MB), memory__usage_in_bytes=str(16 * MB),
          memory__stat="total_inactive_file 0")  # fmt: skip
    machine = Machine(Settings(), tmp_path, "4:memory:/y\n1:cpu:/x\n0::/\n")
    assert (machine.capacity().cpu, machine.capacity().memory_mb) == (0.25, 64)
    assert machine.free([]).memory_mb == 48


def test_overrides_win_and_gpus_are_counted(tmp_path: Path) -> None:
    environment = {"KERNELM_NODE_CPU": "1.5", "KERNELM_NODE_MEMORY_MB": "300", "KERNELM_NODE_GPUS": "4"}
    machine = Machine(read_settings(environment), tmp_path, "")
    assert machine.capacity() == Resources(1.5, 300, 4)
    free = machine.free([Resources(gpus=1), Resources(gpus=2)])
    assert free.gpus == 1
    assert free.memory_mb <= 300


@pytest.mark.parametrize(("name", "value"), [("CPU", "many"), ("CPU", "0"), ("CPU", "nan"), ("MEMORY_MB", "-5"), ("MEMORY", "5")])
def test_a_wrong_override_is_refused(name: str, value: str) -> None:
    with pytest.raises(ClientFault) as caught:
        read_settings({f"KERNELM_NODE_{name}": value})
    assert "KERNELM_NODE_" in caught.value.message
