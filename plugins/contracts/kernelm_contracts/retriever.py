"""`retriever/1`: documents become an index; the index finds passages, recommends documents, and has questions answered from them.

An index is an artifact of kind "index": `index.json` (an `IndexCard`), `passages.parquet` (columns: `document` string, `title`
string, `passage` string, `label` string; a row a passage, those of a document together) and `vectors.safetensors`: `vectors`
[passages, dimensions], float32, of unit length, in the order of the rows.

An index is deployed like a model, `plugin = "retriever"`: clients call `model.<deployment>.<method>`. Vectors are made by another
deployment, which `server/1.embed` is asked of, and answers by a third, with `server/1.generate`.
"""

from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

from msgspec import Struct

from kernelm_contracts.server import ModelLoading, Usage
from kernelm_sdk.contract import Contract, job, model_streamed, model_unary
from kernelm_sdk.events import Event
from kernelm_sdk.plugin import Job


class IndexRequest(Struct, frozen=True, forbid_unknown_fields=True):
    dataset: str  # digest of what `data/1.prepare` made, a corpus too; all splits are taken
    embedder: str  # the deployment that turns passages, and later what is asked for, into vectors
    model: str  # digest of what that deployment serves: vectors of different models can't be compared
    name: str = "documents"
    words: int = 120  # of a passage, at most; passages end where paragraphs or sentences do


class IndexCard(Struct, frozen=True):
    """`index.json`."""

    name: str
    documents: int
    passages: int
    dimensions: int
    embedder: str  # name of a deployment
    model: str  # digest of what it served
    dataset: str  # digest
    words: int


class Indexed(Struct, frozen=True):
    index: str  # digest
    documents: int
    passages: int
    dimensions: int
    took_s: float


class SearchRequest(Struct, frozen=True):
    query: str
    model: str = ""  # the deployment; the subject's when called over NATS
    top: int = 5  # the nearest so many passages
    at_least: int = 0  # refuse with `stale_generation` if the deployment's generation is lower


class Source(Struct, frozen=True):
    """A passage, and where it stands."""

    document: str  # its id in the dataset
    title: str  # first line of the document
    passage: str
    score: float  # cosine of the vectors, -1 to 1
    label: str = ""  # the document's, where it has one


class SearchReply(Struct, frozen=True):
    model: str
    generation: int
    artifact: str  # digest of the index
    sources: tuple[Source, ...]  # nearest first
    took_ms: float  # in the server


class RecommendRequest(Struct, frozen=True):
    """What is like these: documents of the index that somebody has liked, a text, or both."""

    documents: tuple[str, ...] = ()  # ids; they are not recommended again
    text: str = ""
    model: str = ""
    top: int = 5  # documents
    at_least: int = 0


class RecommendReply(Struct, frozen=True):
    model: str
    generation: int
    artifact: str  # digest of the index
    sources: tuple[Source, ...]  # a document each, with its first passage, nearest first
    took_ms: float


class AnswerRequest(Struct, frozen=True):
    question: str
    model: str = ""
    top: int = 4  # passages that the answer may be made of
    max_tokens: int = 0  # of the answer; 0 for the generator's own limit
    at_least: int = 0


class AnswerFrame(Struct, frozen=True, omit_defaults=True):
    """A piece of an answer. The first has the sources alone, numbered from 1 as the answer names them ("[1]"); then come texts;
    the last one says how it ended and what it cost."""

    sources: tuple[Source, ...] = ()
    text: str = ""  # what is added
    # "" in all but the last; "no_source": no passage is near enough to the question, and the generator was not asked
    finish_reason: Literal["", "stop", "length", "no_source"] = ""
    usage: Usage | None = None  # of the generator; of the last frame, as all below
    model: str = ""
    generation: int = 0
    artifact: str = ""  # digest of the index
    generator: str = ""  # digest of the model that has written the answer
    took_ms: float = 0.0


class DocumentsIndexed(Event, frozen=True):
    """An index is in the store."""

    TYPE: ClassVar[str] = "documents.indexed"
    name: str
    index: str  # digest
    documents: int
    passages: int


class Retriever(Contract, name="retriever", major=1):
    """Finds what documents say, what is like them, and answers from them with sources."""

    events = (ModelLoading, DocumentsIndexed)  # the first of an index that is on its way to be served

    @job
    async def index(self, request: IndexRequest, job: Job) -> Indexed:
        """Cut documents into passages, have them embedded, store vectors and passages."""
        ...

    @model_unary
    async def search(self, request: SearchRequest, call: Any) -> SearchReply:
        """The passages nearest to a text."""
        ...

    @model_unary
    async def recommend(self, request: RecommendRequest, call: Any) -> RecommendReply:
        """The documents nearest to given ones."""
        ...

    @model_streamed
    async def answer(self, request: AnswerRequest, call: Any) -> AsyncIterator[AnswerFrame]:
        """An answer from the nearest passages, which come first; a caller who is gone stops the work."""
        ...
