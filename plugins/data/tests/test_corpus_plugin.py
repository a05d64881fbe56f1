"""A corpus job in the plugin, over a context whose store is a folder."""

import pytest

from kernelm_contracts.data import Clean, Input, PrepareRequest, Private, Split, Store
from kernelm_data.corpus import pipeline
from kernelm_data.corpus.effects import FORMAT
from kernelm_data.corpus.store import Rows
from kernelm_data.plugin import DataPlugin
from kernelm_data.settings import DataSettings
from kernelm_sdk.checkpoints import mark
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Job


@pytest.fixture
def context(tmp_path, source, folder_context):
    context = folder_context(tmp_path / "scratch")
    context.folders["sha256:s"] = source
    return context


async def test_goes_on_from_its_checkpoints_and_redoes_nothing(context, monkeypatch):
    monkeypatch.setattr(pipeline, "SAVE_S", 0.0)
    request = PrepareRequest("sha256:s", "auto", split=Split(0, 0), store=Store(shard_mb=0.03))
    plugin = DataPlugin(context, DataSettings())
    job = Job(context, "jobs", "j1", 1)
    done = await plugin.prepare(request, job)
    assert done.documents == 30
    checkpoints = [digest for digest, kind in context.kinds.items() if kind == "checkpoint"]
    assert len(checkpoints) > 4
    assert job.checkpoint == checkpoints[-1]
    assert context.lineage[done.dataset] == {"job": "j1", "source": "sha256:s"}

    redone: list[int] = []
    run = pipeline.pool.Crew.run

    def watched(self, task, path, shards, *rest):
        redone.extend(shard[0] for shard in shards)
        return run(self, task, path, shards, *rest)

    monkeypatch.setattr(pipeline.pool.Crew, "run", watched)
    again = await plugin.prepare(request, Job(context, "jobs", "j1", 2, checkpoint=checkpoints[2]))
    assert again.card == done.card
    names = {p.relative_to(context.folders[done.dataset]) for p in context.folders[done.dataset].rglob("*.parquet")}
    assert all((context.folders[again.dataset] / n).read_bytes() == (context.folders[done.dataset] / n).read_bytes() for n in names)
    first_pass = redone[: redone.index(0)] if 0 in redone else redone
    assert len(first_pass) == len(checkpoints) // 2 - 3  # three of the shards were in the checkpoints


async def test_another_versions_checkpoint_is_left_alone_and_a_broken_one_is_named(context, tmp_path, caplog):
    folder = tmp_path / "checkpoint"
    (folder / "shard").mkdir(parents=True)
    (folder / "shard" / "book.json").write_text("nothing that this version would read")
    (folder / "chain.json").write_text('{"not": "a list"}')
    context.folders["sha256:old"] = folder
    request = PrepareRequest("sha256:s", "auto", split=Split(0, 0), store=Store(shard_mb=0.03))
    job = Job(context, "jobs", "j1", 2, checkpoint="sha256:old")
    assert (await DataPlugin(context, DataSettings()).prepare(request, job)).documents == 30
    assert "does not say its format" in caplog.text
    mark(folder, context.manifest, FORMAT)
    with pytest.raises(ClientFault, match=r"chain\.json") as caught:
        await DataPlugin(context, DataSettings()).prepare(request, Job(context, "jobs", "j1", 3, checkpoint="sha256:old"))
    assert caught.value.code == "invalid_checkpoint"


async def test_a_url_that_is_not_granted_is_refused(context, source):
    request = PrepareRequest("", "auto", inputs=(Input(url=str(source)),), split=Split(0, 0))
    with pytest.raises(ClientFault) as caught:
        await DataPlugin(context, DataSettings()).prepare(request, Job(context, "jobs", "j1", 1))
    assert caught.value.code == "not_granted"
    granted = DataPlugin(context, DataSettings(urls=(str(source.parent),)))
    assert (await granted.prepare(request, Job(context, "jobs", "j2", 1))).documents == 30


async def test_hashes_of_private_values_are_made_with_the_key_of_the_settings(context, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.shutil, "rmtree", lambda *_, **__: None)  # what lay in the work folder can be looked at
    folder = tmp_path / "letters"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.txt").write_text(f"Letter {n}: write to jane.roe@example.org about the {('harvest', 'rain', 'snow')[n]}.")
    context.folders["sha256:letters"] = folder
    request = PrepareRequest("sha256:letters", "auto", private=Private(style="hash"), clean=Clean(), split=Split(0, 0))
    found = []
    for key in (b"a key of sixteen bytes or more", b"another key of as many bytes.."):
        (tmp_path / "key").write_bytes(key)
        plugin = DataPlugin(context, DataSettings(str(tmp_path / "key")))
        job = Job(context, "jobs", f"h{len(found)}", 1)
        done = await plugin.prepare(request, job)
        rows = Rows(context.folders[done.dataset])
        placeholders = {rows[i]["text"].split()[4] for i in range(3)}
        assert len(placeholders) == 1
        found.append(placeholders.pop())
        holding = [path for path in context.folders[done.dataset].rglob("*") if path.is_file() and key in path.read_bytes()]
        assert holding == []
        plans = [path for path in job.scratch.rglob("*.msgpack") if key in path.read_bytes()]
        assert plans
        assert all(path.stat().st_mode & 0o077 == 0 for path in plans)
    assert found[0].startswith("[EMAIL:")
    assert found[0] != found[1]
