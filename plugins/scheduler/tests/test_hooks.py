"""Scoring functions of third parties: they choose among nodes that fit, and a broken one does not count."""

from pathlib import Path

import pytest

from kernelm.testing.hooks import install
from kernelm_contracts.scheduler import ClusterDelta, ClusterState, NodeState, PendingJob
from kernelm_scheduler.hooks import GROUP, Scoring, installed
from kernelm_scheduler.index import Index
from kernelm_scheduler.plugin import SchedulerPlugin
from kernelm_scheduler.policy import decided
from kernelm_scheduler.settings import Settings
from kernelm_sdk.system import Resources

SETTINGS = Settings()
SIZE = Resources(4.0, 8000, 0)
NODES = tuple(NodeState(name, SIZE, SIZE, {"data": 4}) for name in ("a", "b", "c"))
LIKES = "import numpy as np\n@hookimpl\ndef score_nodes(nodes): return np.array([float(n == {!r}) for n in nodes])\n"
BROKEN = {
    "raises": ("@hookimpl\ndef score_nodes(nodes): raise OSError('no power meter')\n",
               "score_nodes raised OSError: no power meter"),
    "shape": ("@hookimpl\ndef score_nodes(nodes): return [1.0]\n", "an array of shape (1,) for 3 nodes"),
    "range": ("@hookimpl\ndef score_nodes(nodes): return [2.0] * len(nodes)\n", "not between 0 and 1"),
    "nan": ("@hookimpl\ndef score_nodes(nodes): return [float('nan')] * len(nodes)\n", "not between 0 and 1"),
    "words": ("@hookimpl\ndef score_nodes(nodes): return list(nodes)\n", "answered no numbers"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def placed(scoring: Scoring, *needs: Resources) -> list[str]:
    pending = tuple(PendingJob(f"j{i}", f"j{i}", need, ("data",)) for i, need in enumerate(needs))
    index = Index.of(ClusterState(1, 0.0, NODES, pending, (), {}), SETTINGS)
    index.scoring = scoring
    return [d.node for d in sorted(decided(index).decisions, key=lambda d: d.job)]


def test_a_function_chooses_among_nodes_that_fit(place: Path) -> None:
    small = Resources(1.0, 100, 0)
    assert placed(installed(SETTINGS.weights.hooks), small) == ["a"]
    install(place, GROUP, "sched-likes-c", LIKES.format("c"))
    scoring = installed(SETTINGS.weights.hooks)
    assert placed(scoring, small) == ["c"]
    assert placed(scoring, SIZE, SIZE) == ["c", "a"], "a node that is full is not chosen, however good it is"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_does_not_count_and_is_named(place: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    code, why = BROKEN[name]
    install(place, GROUP, f"sched-{name}", code)
    install(place, GROUP, f"sched-z-{name}", LIKES.format("b"))
    scoring = installed(SETTINGS.weights.hooks)
    assert placed(scoring, Resources(1.0, 100, 0)) == ["b"]
    assert scoring.weight == SETTINGS.weights.hooks
    assert f"hook sched-{name} of {GROUP} is left out" in caplog.text
    assert why in caplog.text


async def test_the_plugin_asks_them_for_snapshots_and_for_deltas(place: Path) -> None:
    install(place, GROUP, "sched-plugin-likes-b", LIKES.format("b"))
    plugin = SchedulerPlugin(None, SETTINGS)  # type: ignore[arg-type] # it calls nobody
    pending = (PendingJob("j", "j", Resources(1.0, 100, 0), ("data",)),)
    whole = await plugin.decide(ClusterState(1, 0.0, NODES, pending, (), {}), None)
    assert [d.node for d in whole.decisions] == ["b"]
    changes = ClusterDelta(base=0, version=1, now=0.0, nodes=NODES, pending=pending, source="jobs")
    assert [d.node for d in (await plugin.update(changes, None)).decisions] == ["b"]
