"""The short subset of the fault matrix: one run of every kind of victim, on one system, seeded. `make bench-chaos` plays all.

The matrix runs in a process of its own: it declares a contract and an event that no other test should see.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FAULTS = ("kill: broker", "kill: kernel", "kill: node", "kill: jobs", "kill: gateway", "kill: artifacts",
          "kill: scheduler", "kill: plugin, mid-job", "pause: plugin, mid-job", "poison: job", "delivered twice, late",
          "bit flip: checkpoint")  # fmt: skip


@pytest.fixture(scope="module")
def played() -> dict[str, dict[str, Any]]:
    """fault -> its outcome, as `faultmatrix.matrix.Outcome`."""
    path = os.pathsep.join([str(HERE), str(HERE / "plugin"), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run([sys.executable, "-m", "faultmatrix"], env=os.environ | {"PYTHONPATH": path}, capture_output=True,
                            text=True, check=False, timeout=580)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return {outcome["fault"]: outcome for outcome in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_and_nothing_done_twice(played: dict[str, dict[str, Any]], fault: str) -> None:
    outcome = played[fault]
    if outcome["skipped"]:
        pytest.skip(outcome["skipped"])
    wrong = {k: outcome[k] for k in ("lost", "duplicated", "complaints") if outcome[k]}
    assert not wrong, json.dumps({**wrong, "note": outcome["note"], "seed": outcome["seed"]}, indent=1)
    assert outcome["promises"] > 20, outcome
    assert outcome["recovery_s"] is not None


def test_the_whole_subset_was_played(played: dict[str, dict[str, Any]]) -> None:
    assert set(played) == set(FAULTS)
