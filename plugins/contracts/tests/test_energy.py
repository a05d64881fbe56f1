"""Energy as Linux counts it, in a folder like /sys/class/powercap: this machine may have none."""

from pathlib import Path

import pytest

from kernelm_contracts.energy import Meter


def write(root: Path, zone: str, microjoules: int, most: int = 10_000_000) -> None:
    (root / zone).mkdir(exist_ok=True)
    (root / zone / "energy_uj").write_text(f"{microjoules}\n")
    (root / zone / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_are_summed_and_their_parts_are_not_counted_twice(tmp_path: Path) -> None:
    for zone, energy in (("intel-rapl:0", 1_000_000), ("intel-rapl:1", 5_000_000), ("intel-rapl:0:0", 500_000), ("dtpm", 7)):
        write(tmp_path, zone, energy)
    meter = Meter(tmp_path)
    write(tmp_path, "intel-rapl:0", 1_250_000)
    write(tmp_path, "intel-rapl:1", 5_500_000)
    write(tmp_path, "intel-rapl:0:0", 900_000)
    assert meter.joules() == 0.75
    assert meter.joules() == 0.0, "since the last question"


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    write(tmp_path, "intel-rapl:0", 9_900_000)
    meter = Meter(tmp_path)
    write(tmp_path, "intel-rapl:0", 400_000)
    assert meter.joules() == pytest.approx(0.5)


def test_where_it_can_not_be_read_nothing_is_said(tmp_path: Path) -> None:
    assert Meter(tmp_path / "none").joules() == 0.0
    write(tmp_path, "intel-rapl:0", 1)
    (tmp_path / "intel-rapl:1" / "energy_uj").mkdir(parents=True)  # no file that could be read
    meter = Meter(tmp_path)
    write(tmp_path, "intel-rapl:0", 1_000_001)
    assert meter.joules() == 0.0, "a part of the machine is not the machine"
