"""The kit on vLLM itself, in the runtime `venv`, as the node runs it."""

import shutil
from pathlib import Path

import pytest

from kernelm.testing.conformance import Stand, check_on, read
from kernelm.testing.conformance.places import place_of
from kernelm.testing.conformance.stand import Instance
from kernelm_cli import staging

PLUGIN = Path(__file__).parents[1]
SAMPLES = """
start_s = 400  # two engines start at a time
[artifacts]
model = "model"
[settings]
dtype = "float32"  # so that random weights give the same answer whatever else is in the batch
context = 256
max_tokens = 200
kv_cache_mb = 64
threads = 1
[settings.model]
name = "checked"
artifact = "@model"
generation = 3
[requests]
"server/1.generate" = { prompt = "The striker scored", max_tokens = 24, temperature = 0 }
"server/1.info" = {}
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def stage(folder: Path, into: Path) -> None:
    staging.stage(staging.find(folder), into)


async def test_it_conforms(tmp_path: Path, models: Path, venvs: Path) -> None:
    folder = tmp_path / "vllm"
    shutil.copytree(PLUGIN, folder, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    shutil.copytree(models / "llama", folder / "model")
    (folder / "conformance.toml").write_text(SAMPLES)
    subject = read(folder)
    async with Stand() as stand:
        (stand.system.home / "venvs").symlink_to(venvs)
        place = await place_of("venv", subject, stand.system.home, stand.bus(), stage)
        report = await check_on(stand, subject, place=place)
        logs = [instance.last_lines() for instance in stand.instances.values() if isinstance(instance, Instance)]
    assert report.good, [(r.check, r.message, r.exchange) for r in report.results if r.status == "failed"] or logs
    made = {r.check.removeprefix("server.") for r in report.results if r.status == "passed" and r.check.startswith("server.")}
    assert made >= {"stream", "counts", "greedy", "stops", "refusals", "info", "identity", "generation", "model"}
