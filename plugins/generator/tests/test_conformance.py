"""The plugin passes `kernelm plugin check`, that is what holds of every server of generated text, from outside over NATS."""

import shutil
from pathlib import Path

from kernelm.testing.conformance import check_plugin

FOLDER = Path(__file__).parents[1]


async def test_it_passes_check(deep: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "generator"
    shutil.copytree(FOLDER, plugin, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    deep.rename(tmp_path / "model")  # where conformance.toml looks for it
    report = await check_plugin(plugin)
    assert report.good, [(r.check, r.message, r.exchange) for r in report.results if r.status == "failed"]
    made = {r.check.removeprefix("server.") for r in report.results if r.status == "passed" and r.check.startswith("server.")}
    assert made >= {
        "stream",
        "counts",
        "greedy",
        "stops",
        "refusals",
        "info",
        "gone",
        "identity",
        "generation",
        "model",
        "embeddings",
    }
