"""A model that can't be loaded anywhere is tried once, and the record says which of its files is at fault; a machine that can't is
no reason to give up. A real node, real processes, and the real encoder."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from kernelm.testing.harness import System, until
from kernelm_contracts.jobs import Jobs, RunName, RunSpec, RunView
from kernelm_contracts.trainer import ModelCard
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import Artifacts, PoolSpec, PutArtifact

pytestmark = pytest.mark.slow
ENDLESS = 10**14  # tokens: a text of so many is more than any memory


@pytest.fixture
async def system() -> AsyncIterator[System]:
    installed, _ = find_manifests()
    manifests = {name: msgspec.structs.replace(installed[name], default=False) for name in ("scheduler", "encoder")}
    async with System(manifests=manifests) as system:
        for name in ("artifacts", "node", "jobs"):
            await system.service(name)
        await system.pool(PoolSpec("scheduler", "scheduler"))
        yield system


def model(folder: Path, max_tokens: int = 64) -> Path:
    """A linear model of two words."""
    folder.mkdir()
    tensors = {"idf": np.ones(2, np.float32), "weight": np.array([[4, -4], [-4, 4]], np.float32), "bias": np.zeros(2, np.float32)}
    save_file(tensors, folder / "linear.safetensors")
    (folder / "vocabulary.json").write_bytes(msgspec.json.encode({"goal": 0, "chip": 1}))
    card = ModelCard("model", "text-classification", "tfidf-linear", ("sports", "tech"), max_tokens, request={"ngrams": 1})
    (folder / "model.json").write_bytes(msgspec.json.encode(card))
    return folder


async def deployed(system: System, folder: Path, attempts: int = 3) -> RunView:
    artifact = await system.admin.call(Artifacts.put, PutArtifact(str(folder), "model"))
    stage = {"name": "deploy", "uses": "deploy", "with": {"name": "news", "model": artifact.digest}, "attempts": attempts,
             "resources": {"cpu": 0.2, "memory_mb": 200}}  # fmt: skip
    run = await system.admin.call(Jobs.submit_run, msgspec.convert({"name": "news", "stage": [stage]}, RunSpec))

    async def over() -> RunView | None:
        view: RunView = await system.admin.call(Jobs.get_run, RunName(run.id))
        return view if view.run.state != "running" else None

    view: RunView = await until(over, 120.0, "the deployment")
    return view


async def test_a_damaged_file_ends_the_deployment_at_once_and_is_named(system: System, tmp_path: Path) -> None:
    good = model(tmp_path / "good")
    bad = shutil.copytree(good, tmp_path / "bad")
    weights = bad / "linear.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    view = await deployed(system, bad)
    [job] = view.jobs
    assert (view.run.state, job.state, job.attempt, job.epoch) == ("failed", "dead", 1, 1)
    assert job.fault is not None
    assert (job.fault.whose, job.fault.code, job.fault.retriable) == ("client", "invalid_model", False)
    assert job.fault.message.startswith("linear.safetensors: ")
    assert job.fault.remedy
    assert job.why == job.fault.message
    assert "kernelm-fault" not in str(job.fault), "that line was for the node"
    pools = [p.pool for p in (await system.state()).pools if p.pool.startswith("news-")]
    assert not pools
    assert (await deployed(system, good)).run.state == "done", "the name is as good as before"


async def test_a_lack_of_memory_is_tried_again(system: System, tmp_path: Path) -> None:
    view = await deployed(system, model(tmp_path / "large", ENDLESS), attempts=2)
    [job] = view.jobs
    assert (job.state, job.attempt) == ("dead", 2)
    assert job.fault is not None
    assert (job.fault.whose, job.fault.code, job.fault.retriable) == ("plugin", "not_ready", True)
