"""A second machine: a node and a mirror with a home of their own, sharing no folder with the first. Real plugins work there."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_contracts.jobs import JobName, JobRecord, Jobs, JobSpec
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts, OpenArtifact, PoolSpec, PutArtifact, Resources

WORKERS = ("data", "trainer")


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    installed, _ = find_manifests()
    manifests = {name: msgspec.structs.replace(installed[name], default=False) for name in ("scheduler", *WORKERS)}
    async with System(manifests=manifests) as system:
        for service in ("artifacts", "node", "jobs"):
            await system.service(service)
        await system.machine("second", tmp_path / "second")
        await system.pool(PoolSpec("scheduler", "scheduler", node="local", runtime="process"))
        for plugin in WORKERS:
            await system.pool(PoolSpec(plugin, plugin, node="second", runtime="process"))
        yield system


async def done(system: System, spec: JobSpec) -> JobRecord:
    job: JobRecord = await system.admin.call(Jobs.submit, spec)

    async def ended() -> JobRecord | None:
        record: JobRecord = await system.admin.call(Jobs.get, JobName(job.id))
        return record if record.state in ("done", "dead", "cancelled") else None

    record: JobRecord = await until(ended, 120.0, f"job {spec.name}")
    assert record.state == "done", record.fault
    return record


async def test_a_model_is_trained_where_neither_its_data_nor_its_store_lie(system: System, tmp_path: Path) -> None:
    texts = {"sports": "the striker scored a goal and the match was won", "business": "shares of the bank fell with its profit"}
    for label, text in texts.items():
        (tmp_path / "source" / label).mkdir(parents=True)
        for n in range(30):
            (tmp_path / "source" / label / f"{n:02}.txt").write_text(f"{text} on day {n}, {'again ' * (n % 5)}so they said {n * 7}")
    source: Artifact = await system.admin.call(Artifacts.put, PutArtifact(str(tmp_path / "source"), "source"))
    prepare = {"source": source.digest, "name": "days"}
    prepared = await done(system, JobSpec("prepare", "data/1.prepare", prepare, Resources(0.1, 256)))
    request = {"dataset": prepared.result["dataset"], "structure": "tfidf-linear", "algorithm": "liblinear", "ngrams": 1}
    trained = await done(system, JobSpec("train", "trainer/1.train", request, Resources(0.1, 512)))
    nodes: dict[str, Any] = {i.id: i.node for i in (await system.state()).instances}
    assert {nodes[prepared.instance], nodes[trained.instance]} == {"second"}
    opened: OpenArtifact = await system.admin.call(Artifacts.open, ArtifactName(trained.result["model"]))
    assert Path(opened.path).is_relative_to(system.home), "in the store, on the first machine"
    assert opened.artifact.lineage["job"] == trained.id
    assert not (tmp_path / "second" / "artifacts").exists()
