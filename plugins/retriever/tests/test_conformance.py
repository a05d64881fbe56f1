"""The plugin passes `kernelm plugin check`, from outside over NATS, with an index that it serves."""

import shutil
from pathlib import Path

import numpy as np

from kernelm.testing.conformance import check_plugin
from kernelm_contracts.retriever import IndexCard
from kernelm_retriever.index import write
from kernelm_retriever.passages import Passage

FOLDER = Path(__file__).parents[1]


async def test_it_passes_check(tmp_path: Path) -> None:
    plugin, index = tmp_path / "retriever", tmp_path / "index"  # where conformance.toml looks for it
    shutil.copytree(FOLDER, plugin, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    index.mkdir()
    parts = [Passage(name, f"Title of {name}", "A passage.", "") for name in "abc"]
    card = IndexCard("checked", 3, 3, 3, "vectors", "sha256:m", "sha256:d", 120)
    write(index, card, parts, np.eye(3, dtype=np.float32))
    report = await check_plugin(plugin)
    assert report.good, [(r.check, r.message, r.exchange) for r in report.results if r.status == "failed"]
    assert {r.check for r in report.results if r.status == "passed"} >= {"samples.good", "calls.valid", "life.drain"}
