"""The handlers, over a context whose store is a folder."""

from pathlib import Path

import pytest

import kernelm_data
from kernelm_contracts.data import Data, DatasetPrepared, PrepareRequest
from kernelm_data.plugin import DataPlugin
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Call, Job, JobCancelled, find_manifests, implemented
from kernelm_sdk.system import ArtifactName


@pytest.fixture
def context(tmp_path, source, folder_context):
    context = folder_context(tmp_path / "scratch")
    context.folders["sha256:s"], context.kinds["sha256:s"] = source, "source"
    return context


async def test_prepare_stores_publishes_and_answers(context):
    plugin = DataPlugin(context, None)
    job = Job(context, "jobs", "j1", 1)
    prepared = await plugin.prepare(PrepareRequest("sha256:s", name="small"), job)
    assert context.kinds[prepared.dataset] == "dataset"
    assert context.lineage[prepared.dataset] == {"job": "j1", "source": "sha256:s"}
    assert context.events == [DatasetPrepared(name="small", dataset=prepared.dataset, documents=prepared.documents)]
    assert prepared.documents == sum(prepared.splits.values()) == 30
    assert job.latest.fraction == 1.0
    assert "documents_per_s" in job.latest.metrics
    assert await plugin.describe(ArtifactName(prepared.dataset), Call("someone")) == prepared.card


async def test_describe_refuses_another_kind(context):
    with pytest.raises(ClientFault, match="kind 'source'") as caught:
        await DataPlugin(context, None).describe(ArtifactName("sha256:s"), Call("someone"))
    assert caught.value.code == "not_a_dataset"


@pytest.mark.parametrize("content", [None, b"{", b'{"name": 3}'])
async def test_describe_refuses_a_dataset_without_a_valid_card(context, tmp_path, content):
    folder = tmp_path / "odd"
    folder.mkdir()
    if content is not None:
        (folder / "dataset.json").write_bytes(content)
    context.folders["sha256:o"], context.kinds["sha256:o"] = folder, "dataset"
    with pytest.raises(ClientFault, match=r"sha256:o: dataset\.json"):
        await DataPlugin(context, None).describe(ArtifactName("sha256:o"), Call("someone"))


async def test_cancelled_job_stores_nothing(context):
    job = Job(context, "jobs", "j1", 1)
    job.cancelled = "by its owner"
    with pytest.raises(JobCancelled):
        await DataPlugin(context, None).prepare(PrepareRequest("sha256:s"), job)
    assert list(context.kinds) == ["sha256:s"]
    assert not context.events


def test_manifest_and_methods(context):
    manifests, broken = find_manifests()
    assert "data" not in broken
    assert manifests["data"].contracts == (Data.id(),)
    methods = implemented(DataPlugin(context, None), manifests["data"].contracts)
    assert set(methods) == {"data.v1.prepare", "data.v1.describe", "data.v1.redact", "data.v1.redact-part"}
    assert Path(kernelm_data.__file__).with_name("kernelm-plugin.toml").is_file()


def test_an_idle_instance_loads_nothing_heavy():
    import subprocess
    import sys

    heavy = ("numpy", "pyarrow", "matplotlib", "tokenizers", "ftfy", "rensa", "re2", "phonenumbers", "spacy")
    code = f"import sys, kernelm_data.plugin; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
