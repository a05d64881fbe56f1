"""Searches and compressions through the real broker, kernel, job table and store, while what takes part is killed."""

import asyncio
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from kernelm.testing.harness import System, until
from kernelm_contracts.data import DatasetCard, SplitCard
from kernelm_contracts.jobs import JobName, JobQuery, JobRecord, Jobs, JobSpec
from kernelm_contracts.optimizer import Compressed, CompressRequest, Dimension, Optimized, OptimizeRequest, Prune, Search
from kernelm_contracts.server import Measured, Measurement, MeasureRequest, Server
from kernelm_contracts.trainer import ModelCard, Scores, Trained, Trainer, TrainRequest
from kernelm_encoder.plugin import EncoderPlugin
from kernelm_optimizer.folder import read_card
from kernelm_optimizer.integers import integers
from kernelm_optimizer.plugin import OptimizerPlugin
from kernelm_scheduler.plugin import SchedulerPlugin
from kernelm_sdk.plugin import Job, Manifest, Plugin, find_manifests
from kernelm_sdk.system import (
    ArtifactName,
    ArtifactQuery,
    Artifacts,
    Empty,
    Node,
    PoolSpec,
    PutArtifact,
    Resources,
)
from kernelm_trainer.plugin import TrainerPlugin

LABELS = ("a", "b")
FREE = {"cpu": 0.0, "memory_mb": 1, "gpus": 0}
TRIALS, TOKENS = 24, 48


class ShortTrainer(Plugin, Trainer):
    """A training that is over at once, but for its time."""

    model = ""

    async def train(self, request: TrainRequest, job: Job) -> Trained:
        await asyncio.sleep(0.3)
        accuracy = request.dropout + request.warmup
        return Trained(self.model, "tfidf-linear", "lbfgs", 1, Scores("validation", 1, accuracy, accuracy, accuracy))


class SureServer(Plugin, Server):
    async def measure(self, request: MeasureRequest, job: Job) -> Measured:
        scores = Scores(request.split, 1, 1.0, 1.0, 1.0)
        return Measured(tuple(Measurement(model, scores, 1.0, 1.0, 1.0, 1, 1.0, 0.0) for model in request.models))


def manifest(name: str, contract: str, max_jobs: int = 1) -> Manifest:
    return Manifest(name, "1", "test", (contract,), "test_system:none", default=False, calls=("jobs/1", "artifacts/1"),
                    max_jobs=max_jobs, events=("candidate.measured",))  # fmt: skip


PLUGINS: dict[str, tuple[Manifest, type[Plugin]]] = {
    "scheduler": (manifest("scheduler", "scheduler/1"), SchedulerPlugin),
    "trainer": (manifest("trainer", "trainer/1", 4), ShortTrainer),
    "server": (manifest("server", "server/1"), SureServer),
    "optimizer": (manifest("optimizer", "optimizer/1"), OptimizerPlugin),
}  # fmt: skip


async def stored(system: System, folder: Path, kind: str, name: str, card: msgspec.Struct) -> str:
    folder.mkdir()
    (folder / name).write_bytes(msgspec.json.encode(card))
    return await put(system, folder, kind)


async def put(system: System, folder: Path, kind: str) -> str:
    """The digest of a folder, once it is in the store."""
    return str((await system.admin.call(Artifacts.put, PutArtifact(str(folder), kind))).digest)


async def done(system: System, job: JobRecord) -> JobRecord:
    """The record of a job that has come to its end, and to a good one."""

    async def over() -> JobRecord | None:
        record = await system.admin.call(Jobs.get, JobName(job.id), patience_s=20.0)
        return record if record.state in ("done", "dead", "cancelled") else None

    record = await until(over, 800.0, f"the end of {job.spec.name}")
    assert record.state == "done", record.fault
    return record


async def compressed(system: System, request: CompressRequest) -> Compressed:
    """What came of a compression that ended well."""
    job = await system.admin.call(Jobs.submit, JobSpec("compress", "optimizer/1.compress", msgspec.to_builtins(request),
                                                       msgspec.convert(FREE, Resources)))  # fmt: skip
    return msgspec.convert((await done(system, job)).result, Compressed)


@pytest.mark.slow
async def test_a_search_outlives_the_job_table_and_its_own_instance(tmp_path: Path) -> None:
    async with System(manifests={name: made for name, (made, _) in PLUGINS.items()}) as system:
        for service in ("artifacts", "jobs"):
            await system.service(service)
        node = await system.node(PLUGINS)
        for name in PLUGINS:
            settings = {"train": FREE, "measure": FREE} if name == "optimizer" else {}
            await system.pool(PoolSpec(name, name, settings=settings))
        dataset = await stored(system, tmp_path / "dataset", "dataset", "dataset.json", DatasetCard("d", LABELS, (), {}, 1))
        ShortTrainer.model = await stored(system, tmp_path / "model", "model", "model.json",
                                          ModelCard("m", "text-classification", "tfidf-linear", LABELS, 1))  # fmt: skip
        train = TrainRequest(dataset, structure="tfidf-linear", algorithm="lbfgs")
        space = (Dimension("dropout", low=0.0, high=0.5), Dimension("warmup", low=0.0, high=0.5))
        request = OptimizeRequest(dataset, (), budget_s=600.0, quantize=False,
                                  search=Search(train, space, sampler="tpe", trials=TRIALS, parallel=6))  # fmt: skip
        job = await system.admin.call(Jobs.submit, JobSpec("search", "optimizer/1.optimize", msgspec.to_builtins(request),
                                                           msgspec.convert(FREE, Resources)))  # fmt: skip

        async def trainings(state: str = "") -> list[JobRecord]:
            found = await system.admin.call(Jobs.find, JobQuery(state=state, limit=1000), patience_s=20.0)
            return [record for record in found.jobs if record.spec.uses == "trainer/1.train"]

        async def enough(count: int) -> bool:
            return len(await trainings("done")) >= count

        await until(lambda: enough(4), 60.0, "the first trials")
        system.processes["jobs"].kill()
        await asyncio.to_thread(system.processes["jobs"].wait)
        await system.service("jobs")
        await until(lambda: enough(10), 60.0, "trials after the job table's restart")
        await node.kill(next(name for name in node.members if name.startswith("optimizer")))

        record = await done(system, job)
        found = msgspec.convert(record.result, Optimized)
        assert found.trials is not None
        assert (found.trials.done, found.trials.failed) == (TRIALS, 0)
        drawn = [(r.spec.request["dropout"], r.spec.request["warmup"]) for r in await trainings() if not r.reused]
        assert len(set(drawn)) == len(drawn) == TRIALS, "no trial was lost, and none trained twice"


async def test_a_model_is_compressed_through_the_store_and_the_job_table(causal_lm: Path, corpus: Path) -> None:
    async with System(manifests={name: PLUGINS[name][0] for name in ("scheduler", "optimizer")}) as system:
        for service in ("artifacts", "jobs"):
            await system.service(service)
        await system.node({name: PLUGINS[name] for name in ("scheduler", "optimizer")})
        for name in ("scheduler", "optimizer"):
            await system.pool(PoolSpec(name, name))
        model, dataset = await put(system, causal_lm, "model"), await put(system, corpus, "dataset")
        found = await compressed(system, CompressRequest(model, dataset, "int8", rounds=1))
        stored = await system.admin.call(Artifacts.describe, ArtifactName(found.model))
        assert (stored.kind, stored.lineage["model"]) == ("model", model)
        assert found.after.bytes < found.before.bytes


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_compression_outlives_kill_9_with_the_result_of_one_that_was_left_alone(
        causal_lm: Path, corpus: Path, tmp_path: Path) -> None:  # fmt: skip
    installed, _ = find_manifests()
    manifests = {name: msgspec.structs.replace(installed[name], default=False) for name in ("scheduler", "optimizer")}
    async with System(manifests=manifests) as system:
        await system.service("artifacts")
        await system.service("node", KERNELM_NODE_CPU="2", KERNELM_NODE_MEMORY_MB="4000")
        await system.service("jobs")
        for name in manifests:
            await system.pool(PoolSpec(name, name))
        model, dataset = await put(system, causal_lm, "model"), await put(system, corpus, "dataset")
        request = CompressRequest(model, dataset, "int8", rounds=15)  # so many that it is killed while it measures
        job = await system.admin.call(Jobs.submit, JobSpec("compress", "optimizer/1.compress", msgspec.to_builtins(request),
                                                           Resources(1.0, 1000)))  # fmt: skip

        async def measuring() -> JobRecord | None:
            record = await system.admin.call(Jobs.get, JobName(job.id), patience_s=20.0)
            assert record.state != "done", "it was too fast to be killed"
            return record if record.checkpoint and record.progress.phase == "measuring" else None

        before = await until(measuring, 120.0, "the measurement of the model that was made")
        report = await system.admin.call(Node.report, Empty(), instance="node-local", patience_s=20.0)
        (pid,) = [running.pid for running in report.running if running.instance == before.instance]
        os.kill(pid, signal.SIGKILL)

        record = await done(system, job)
        assert record.epoch > before.epoch, "another instance brought it to its end"
        found = msgspec.convert(record.result, Compressed)
        made = await system.admin.call(Artifacts.find, ArtifactQuery(kind="model"))
        assert len([a for a in made.artifacts if a.lineage.get("job") == job.id]) == 2, "made once, and once more with its figures"
        folder = Path((await system.admin.call(Artifacts.open, ArtifactName(found.model))).path)
        integers(causal_lm, tmp_path / "alone", read_card(causal_lm), 8)
        assert (folder / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()
        assert found.change.text in read_card(folder).notes


def news_of(folder: Path, real: SimpleNamespace) -> Path:
    """A dataset of `data/1` with the tokens of MiniLM, 6 articles a class for training and 2 for validation."""
    tokenizer = Tokenizer.from_file(str(real.MINILM / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.no_padding()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    texts, labels = real.news(8)
    splits = {}
    for split, rows in (("train", [i for i in range(len(texts)) if i % 8 < 6]),
                        ("validation", [i for i in range(len(texts)) if i % 8 >= 6])):  # fmt: skip
        ids = [encoded.ids for encoded in tokenizer.encode_batch([texts[i] for i in rows])]
        pq.write_table(pa.table({"id": [str(i) for i in rows], "text": [texts[i] for i in rows],
                                 "label": pa.array(labels[rows], pa.int32()), "input_ids": pa.array(ids, pa.list_(pa.int32()))}),
                       folder / f"{split}.parquet")  # fmt: skip
        splits[split] = SplitCard(len(rows), sum(map(len, ids)), {name: len(rows) // len(real.LABELS) for name in real.LABELS})
    (folder / "dataset.json").write_bytes(msgspec.json.encode(DatasetCard("news", real.LABELS, (), splits, TOKENS)))
    (folder / "labels.json").write_bytes(msgspec.json.encode(real.LABELS))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_an_encoder_is_made_smaller_trained_again_and_measured_by_the_plugins_that_do_so(
        tmp_path: Path, real: SimpleNamespace) -> None:  # fmt: skip
    installed, _ = find_manifests()
    plugins: dict[str, tuple[Manifest, type[Plugin]]] = {
        "scheduler": (installed["scheduler"], SchedulerPlugin), "trainer": (installed["trainer"], TrainerPlugin),
        "encoder": (installed["encoder"], EncoderPlugin), "optimizer": (installed["optimizer"], OptimizerPlugin)}  # fmt: skip
    plugins = {name: (msgspec.structs.replace(made, default=False), of) for name, (made, of) in plugins.items()}
    real.write_encoder(tmp_path / "encoder", layers=2)
    async with System(manifests={name: made for name, (made, _) in plugins.items()}) as system:
        for service in ("artifacts", "jobs"):
            await system.service(service)
        await system.node(plugins)
        for name in plugins:
            settings = {"train": FREE | {"memory_mb": 1500}, "measure": FREE} if name == "optimizer" else {}
            await system.pool(PoolSpec(name, name, settings=settings))
        model = await put(system, tmp_path / "encoder", "model")
        dataset = await put(system, news_of(tmp_path / "news", real), "dataset")
        found = await compressed(system, CompressRequest(
            model, dataset, "prune", Prune(layers=0.5, width=0.5), TrainRequest("", epochs=1), rounds=1))  # fmt: skip
        assert found.without is not None
        assert found.after.bytes < found.before.bytes
        assert {m.scores.documents for m in (found.before, found.without, found.after)} == {2 * len(real.LABELS)}
        folder = Path((await system.admin.call(Artifacts.open, ArtifactName(found.model))).path)
        config = json.loads((folder / "config.json").read_bytes())
        assert (config["num_hidden_layers"], config["intermediate_size"]) == (1, 768)
        assert any("before its recovery" in note for note in read_card(folder).notes)

        of_integers = {}
        for activations in ("dynamic", "static"):
            found = await compressed(system, CompressRequest(model, dataset, "int8", activations=activations, rounds=1))
            assert found.after.bytes < 0.3 * found.before.bytes
            assert (found.change.figure, found.after.scores.documents) == ("accuracy", 2 * len(real.LABELS))
            of_integers[activations] = Path((await system.admin.call(Artifacts.open, ArtifactName(found.model))).path)
            card = read_card(of_integers[activations])
            assert (card.precision, card.format, found.change.text in card.notes) == ("int8", "onnx", True)
        one, other = ((folder / "model.onnx").read_bytes() for folder in of_integers.values())
        assert (b"DynamicQuantizeLinear" in one, b"DynamicQuantizeLinear" in other) == (True, False)
