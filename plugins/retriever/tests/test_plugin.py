"""The handlers, with artifacts from a folder in place of the store and, for vectors and answers, a deployment whose faults are
chosen. The whole over real deployments: tests/integration/test_runs.py."""

import asyncio
import logging
import shutil
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kernelm_retriever
from kernelm_contracts.retriever import AnswerFrame, AnswerRequest, IndexRequest, RecommendRequest, SearchRequest
from kernelm_contracts.server import EmbedReply, EmbedRequest, GenerateFrame, GenerateRequest, Usage
from kernelm_retriever.index import Index
from kernelm_retriever.indexing import FORMAT
from kernelm_retriever.plugin import RetrieverPlugin
from kernelm_sdk.checkpoints import mark
from kernelm_sdk.errors import ClientFault, Fault, KernelFault, PluginFault
from kernelm_sdk.plugin import MANIFEST, Call, Job, JobCancelled, load_plugin, read_manifest

MODEL, OTHER, DATASET = ("sha256:" + pair * 32 for pair in ("ab", "cd", "ef"))
CALL = Call("tester", "archive")
TEXTS = {"sports/1": "Arsenal win the cup\nThe striker scored twice against Chelsea.",
         "sports/2": "Chelsea lose again\nThe goalkeeper was hurt.",
         "business/1": "Bank warns of losses\nShares of the bank fell."}  # fmt: skip
DIMENSIONS, QUESTION = 256, "Who scored twice against Chelsea?"


class Deployments:
    """Answers for every model: vectors of hashed words, and an answer of three pieces."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.headers: list[dict[str, str] | None] = []
        self.artifact, self.ended = MODEL, False
        self.faults: list[Fault] = []
        self.patience: list[float] = []  # of the calls, in seconds
        self.before = lambda: None  # what is done when vectors are asked for

    async def call(self, declared: Any, request: EmbedRequest, *, headers: Any = None, patience_s: float = 0.0,
                   **_: Any) -> EmbedReply:  # fmt: skip
        self.before()
        self.patience.append(patience_s)
        if self.faults:
            raise self.faults.pop(0)
        self.asked.append(request)
        self.headers.append(headers)
        rows = np.zeros((len(request.input), DIMENSIONS))
        for row, text in zip(rows, request.input, strict=True):
            for word in text.lower().replace(".", " ").split():
                row[zlib.crc32(word.encode()) % DIMENSIONS] += 1
        return EmbedReply("vectors", 1, self.artifact, tuple(map(tuple, rows.tolist())), 0, 0.0)

    async def stream(self, declared: Any, request: GenerateRequest, *, headers: Any = None,
                     **_: Any) -> AsyncIterator[GenerateFrame]:  # fmt: skip
        self.asked.append(request)
        self.headers.append(headers)
        try:
            if self.faults:
                raise self.faults.pop(0)
            yield GenerateFrame()
            yield GenerateFrame("The striker ")
            yield GenerateFrame("scored [1].")
            yield GenerateFrame("", "stop", Usage(90, 5), "chat", 1, OTHER)
        finally:
            self.ended = True


class Shelf:
    """The part of `Context` that the handlers use."""

    pool, threads = "archive-g1", 1
    log = logging.getLogger("test")
    manifest = read_manifest(Path(kernelm_retriever.__file__).parent / MANIFEST)

    def __init__(self, folder: Path) -> None:
        self.scratch, self.bus, self.events, self.stored = folder / "scratch", Deployments(), list[Any](), dict[str, Path]()
        self.passing: set[str] = set()

    async def publish(self, event: Any) -> None:
        self.events.append(event)

    async def artifact(self, digest: str) -> Path:
        return self.stored[digest]

    async def store(self, folder: Path, kind: str, metadata: Any = None, **lineage: str) -> str:
        digest = f"sha256:{len(self.stored):064}"
        self.stored[digest] = Path(shutil.copytree(folder, self.scratch / digest))
        self.passing |= {digest} if (metadata or {}).get("passing") else set()
        return digest


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    made, dataset = Shelf(tmp_path), tmp_path / "dataset"
    dataset.mkdir()
    columns = {"id": list(TEXTS), "text": list(TEXTS.values()), "label": pa.array([1, 1, 0], pa.int32())}
    pq.write_table(pa.table(columns), dataset / "train.parquet")
    (dataset / "dataset.json").write_text('{"name": "d", "labels": ["business", "sports"], "steps": [], "max_tokens": 0, '
                                          '"splits": {"train": {"documents": 3, "tokens": 0}}}')  # fmt: skip
    made.stored[DATASET] = dataset
    return made


def plugin(shelf: Shelf, **settings: Any) -> RetrieverPlugin:
    made = load_plugin(read_manifest(Path(kernelm_retriever.__path__[0]) / MANIFEST), shelf, settings)  # type: ignore[arg-type]
    assert isinstance(made, RetrieverPlugin)
    return made


def a_job(shelf: Shelf, epoch: int = 1, checkpoint: str = "") -> Job:
    return Job(shelf, "jobs", "j-1", epoch, checkpoint=checkpoint)  # type: ignore[arg-type]


async def made(shelf: Shelf, **fields: Any) -> str:
    request = IndexRequest(**{"dataset": DATASET, "embedder": "vectors", "model": MODEL, **fields})
    return (await plugin(shelf).index(request, a_job(shelf))).index


@pytest.fixture
async def archive(shelf: Shelf) -> RetrieverPlugin:
    serving = plugin(shelf, model={"name": "archive", "artifact": await made(shelf), "generation": 2}, generator="chat")
    await serving.on_start()
    shelf.bus.asked.clear()
    shelf.bus.headers.clear()
    return serving


async def frames(stream: AsyncIterator[AnswerFrame]) -> list[AnswerFrame]:
    return [frame async for frame in stream]


async def test_documents_become_an_index(shelf: Shelf) -> None:
    digest = await made(shelf, name="news")
    index = Index.load(shelf.stored[digest])
    assert (index.card.name, index.card.documents, index.card.passages, index.card.dimensions) == ("news", 3, 3, DIMENSIONS)
    assert (index.card.embedder, index.card.model, index.card.dataset) == ("vectors", MODEL, DATASET)
    assert [(e.name, e.index, e.documents, e.passages) for e in shelf.events] == [("news", digest, 3, 3)]
    assert shelf.bus.asked[0].input == ("Bank warns of losses\nShares of the bank fell.",), "the title goes with each passage"


async def test_a_job_goes_on_with_the_vectors_that_it_had(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelm_retriever.indexing.MOST", 1)
    whole = Index.load(shelf.stored[await made(shelf)])
    serving, first = plugin(shelf, checkpoint_every_s=1e-9), a_job(shelf, 2)
    request = IndexRequest(DATASET, "vectors", MODEL)
    shelf.bus.asked.clear()
    shelf.bus.before = lambda: setattr(first, "cancelled", "another owner" if len(shelf.bus.asked) == 2 else "")
    with pytest.raises(JobCancelled):
        await serving.index(request, first)
    assert first.checkpoint in shelf.passing, "it is of use until the next one"
    shelf.bus.asked.clear()
    shelf.bus.before = lambda: None
    again = await serving.index(request, a_job(shelf, 3, first.checkpoint))
    assert len(shelf.bus.asked) == 1, "two of three vectors were known"
    index = Index.load(shelf.stored[again.index])
    assert np.array_equal(index.vectors, whole.vectors)


async def test_a_checkpoint_of_another_version_is_left_alone_and_a_broken_one_is_named(shelf: Shelf, tmp_path: Path) -> None:
    folder, request = tmp_path / "old", IndexRequest(DATASET, "vectors", MODEL)
    folder.mkdir()
    (folder / "vectors.safetensors").write_bytes(b"nothing that this version would read")
    shelf.stored["sha256:old"] = folder
    again = await plugin(shelf).index(request, a_job(shelf, 2, "sha256:old"))
    assert Index.load(shelf.stored[again.index]).card.passages == 3
    mark(folder, shelf.manifest, FORMAT)
    with pytest.raises(ClientFault, match=r"vectors\.safetensors") as caught:
        await plugin(shelf).index(request, a_job(shelf, 3, "sha256:old"))
    assert caught.value.code == "invalid_checkpoint"


@pytest.mark.parametrize(("fields", "named"), [({"embedder": ""}, "`embedder`"), ({"model": ""}, "`model`"),
                                               ({"words": 3}, "`words` is 3")])  # fmt: skip
async def test_a_request_that_makes_no_sense(shelf: Shelf, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ClientFault, match=named) as caught:
        await made(shelf, **fields)
    assert caught.value.code == "invalid"


async def test_found_are_passages_with_their_place(archive: RetrieverPlugin, shelf: Shelf) -> None:
    reply = await archive.search(SearchRequest("Who scored for Arsenal?", top=2), CALL)
    assert (reply.model, reply.generation) == ("archive", 2)
    first = reply.sources[0]
    assert (first.document, first.title, first.label) == ("sports/1", "Arsenal win the cup", "sports")
    assert first.passage == "The striker scored twice against Chelsea."
    assert len(reply.sources) == 2
    assert shelf.bus.headers == [{"Kernelm-Tenant": "tester/"}], "whom it asks for is told, so that prompts stay apart"


async def test_what_is_like_something(archive: RetrieverPlugin, shelf: Shelf) -> None:
    reply = await archive.recommend(RecommendRequest(("sports/1",), top=5), CALL)
    assert [s.document for s in reply.sources] == ["sports/2", "business/1"]
    assert not shelf.bus.asked, "documents of the index have their vectors"
    reply = await archive.recommend(RecommendRequest(text="The bank has losses", top=1), CALL)
    assert [s.document for s in reply.sources] == ["business/1"]


async def test_an_answer_begins_with_its_sources_and_ends_with_what_it_cost(archive: RetrieverPlugin, shelf: Shelf) -> None:
    first, *texts, last = await frames(archive.answer(AnswerRequest(QUESTION, max_tokens=7), CALL))
    assert first.sources[0].document == "sports/1"
    assert "".join(frame.text for frame in texts) == "The striker scored [1]."
    assert (last.finish_reason, last.usage, last.generator) == ("stop", Usage(90, 5), OTHER)
    assert (last.model, last.generation, bool(last.artifact)) == ("archive", 2, True)
    asked = shelf.bus.asked[-1]
    assert (asked.temperature, asked.max_tokens, asked.messages[0].role) == (0.0, 7, "user")
    assert "[1] Arsenal win the cup\nThe striker scored twice" in asked.messages[0].content
    assert asked.messages[0].content.endswith(f"Question: {QUESTION}")


async def test_a_model_without_a_chat_template_gets_a_prompt(archive: RetrieverPlugin, shelf: Shelf) -> None:
    other = plugin(shelf, model={"name": "archive", "artifact": archive.settings.model.artifact, "generation": 2}, generator="c",
                   chat=False)  # fmt: skip
    await other.on_start()
    await frames(other.answer(AnswerRequest(QUESTION), CALL))
    assert shelf.bus.asked[-1].prompt.endswith(f"Question: {QUESTION}\nAnswer:")
    assert "\nQuestion:" in shelf.bus.asked[-1].stop, "it would go on with another question"


async def test_without_a_near_passage_nobody_is_asked(archive: RetrieverPlugin, shelf: Shelf) -> None:
    (only,) = await frames(archive.answer(AnswerRequest("quantum chromodynamics"), CALL))
    assert (only.finish_reason, only.sources, only.text, only.model) == ("no_source", (), "", "archive")
    assert not any(isinstance(request, GenerateRequest) for request in shelf.bus.asked)


async def test_a_caller_who_is_gone_stops_the_generator(archive: RetrieverPlugin, shelf: Shelf) -> None:
    stream = archive.answer(AnswerRequest(QUESTION), CALL)
    assert (await anext(stream)).sources
    assert (await anext(stream)).text
    await stream.aclose()  # type: ignore[attr-defined]
    assert shelf.bus.ended


@pytest.mark.parametrize(("ask", "named"), [
    (lambda p: p.search(SearchRequest(" "), CALL), "`query` is blank"),
    (lambda p: p.search(SearchRequest("x", top=0), CALL), "`top` is 0"),
    (lambda p: p.search(SearchRequest("x", top=101), CALL), "`top` is 101"),
    (lambda p: p.recommend(RecommendRequest(), CALL), "neither `documents` nor `text`"),
    (lambda p: p.recommend(RecommendRequest(("x/1",)), CALL), "'x/1' is not in the index"),
    (lambda p: frames(p.answer(AnswerRequest(""), CALL)), "`question` is blank"),
    (lambda p: frames(p.answer(AnswerRequest("x", max_tokens=-1), CALL)), "`max_tokens` is -1"),
    (lambda p: p.search(SearchRequest("x", at_least=9), CALL), "generation 2"),
    (lambda p: p.search(SearchRequest("x"), Call("tester", "other")), "'other' is not served here"),
])  # fmt: skip
async def test_bad_requests_are_the_callers_fault(archive: RetrieverPlugin, ask: Any, named: str) -> None:
    with pytest.raises(ClientFault) as caught:
        await ask(archive)
    assert named in caught.value.message


async def test_faults_of_other_deployments_are_not_the_callers(archive: RetrieverPlugin, shelf: Shelf) -> None:
    shelf.bus.faults = [KernelFault("no_responders", "nobody")]
    with pytest.raises(PluginFault, match="'vectors', which makes the vectors") as caught:
        await archive.search(SearchRequest("x"), CALL)
    assert (caught.value.code, caught.value.retriable) == ("not_deployed", True)
    shelf.bus.patience.clear()
    shelf.bus.faults = [KernelFault("no_responders", "nobody", retriable=True)]
    with pytest.raises(PluginFault):
        await archive.search(SearchRequest("x"), CALL)
    assert shelf.bus.patience == [0.0], "that nobody is there is told at once"
    shelf.bus.faults = [KernelFault("starting", "it has no instance yet", retriable=True)]
    await archive.search(SearchRequest("x"), CALL)
    assert shelf.bus.patience[-1] == 60.0, "what is started for this call is waited for"
    shelf.bus.artifact = OTHER
    with pytest.raises(PluginFault, match="can't be compared") as caught:
        await archive.search(SearchRequest("x"), CALL)
    assert (caught.value.code, "kernelm model rollback vectors" in caught.value.remedy) == ("stale_index", True)
    shelf.bus.artifact = MODEL
    stream = archive.answer(AnswerRequest(QUESTION), CALL)
    await anext(stream)
    shelf.bus.faults = [KernelFault("no_responders", "nobody")]
    with pytest.raises(PluginFault, match="'chat', which writes the answers"):
        await anext(stream)


async def test_without_a_generator_there_is_no_answer(archive: RetrieverPlugin, shelf: Shelf) -> None:
    other = plugin(shelf, model={"name": "archive", "artifact": archive.settings.model.artifact, "generation": 2})
    await other.on_start()
    with pytest.raises(ClientFault, match="no generator") as caught:
        await frames(other.answer(AnswerRequest("x"), CALL))
    assert caught.value.code == "unsupported_method"
    replies = await asyncio.gather(*(other.search(SearchRequest(text), CALL) for text in TEXTS.values()))
    assert [reply.sources[0].document for reply in replies] == list(TEXTS)
