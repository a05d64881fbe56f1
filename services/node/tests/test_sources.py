"""What lies on this machine."""

import os
from pathlib import Path

from kernelm_node.sources import STORED, stored


def test_stored_artifacts_are_reported_the_latest_first(tmp_path: Path) -> None:
    assert stored(tmp_path) == ()
    trees = tmp_path / "artifacts" / "trees"
    for number, name in enumerate(("a" * 64, "b" * 64, "c" * 64)):
        (trees / name).mkdir(parents=True)
        os.utime(trees / name, (number, number))
    (trees / "incoming").mkdir()
    assert stored(tmp_path) == ("sha256:" + "c" * 64, "sha256:" + "b" * 64, "sha256:" + "a" * 64)
    for number in range(STORED):
        (trees / f"{number:064x}").mkdir()
    assert len(stored(tmp_path)) == STORED
