"""`server/1`: a model answers.

A deployment is a pool of server instances that load one model version from their settings before they are ready.
Clients call `model.<deployment>.<method>`; every answer says which model, generation and artifact gave it.

A server has the methods that its model is good for, and refuses the others with `unsupported_method`; `info` says which
it has. `generate` speaks the words of OpenAI's API ("Create chat completion", "Create completion"), so that the gateway's
chat and completion endpoints, streamed or not, are made of it.
"""

from collections.abc import AsyncIterator
from typing import Any, Literal

from msgspec import Struct

from kernelm_contracts.trainer import Scores
from kernelm_sdk.contract import Contract, job, model_streamed, model_unary
from kernelm_sdk.plugin import Job


class ServedModel(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a server's pool (`settings.model`): what it loads before it is ready."""

    name: str  # of the deployment
    artifact: str  # digest
    generation: int


class ClassifyRequest(Struct, frozen=True):
    input: tuple[str, ...]  # texts
    model: str = ""  # the deployment; the subject's when called over NATS
    top: int = 0  # the best so many labels a text; 0 for all
    at_least: int = 0  # refuse with `stale_generation` if the deployment's generation is lower


class Label(Struct, frozen=True):
    label: str
    score: float  # probability, 0 to 1


class ClassifyReply(Struct, frozen=True):
    model: str
    generation: int
    artifact: str  # digest
    results: tuple[tuple[Label, ...], ...]  # a text a row, best first
    tokens: int  # read, after truncation
    took_ms: float  # in the server


class EmbedRequest(Struct, frozen=True):
    input: tuple[str, ...]
    model: str = ""
    at_least: int = 0


class EmbedReply(Struct, frozen=True):
    model: str
    generation: int
    artifact: str
    embeddings: tuple[tuple[float, ...], ...]  # [texts][hidden], of unit length
    tokens: int
    took_ms: float


class Message(Struct, frozen=True):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class GenerateRequest(Struct, frozen=True):
    """Exactly one of `messages` and `prompt`. What is out of range is refused with the client's fault `invalid`, and what
    does not fit the model's context with `too_large`."""

    messages: tuple[Message, ...] = ()  # a chat, which the model's own template makes into a text
    prompt: str = ""  # a text to go on with, as it is; begin-of-text is the server's to add
    model: str = ""  # the deployment; the subject's when called over NATS
    max_tokens: int = 0  # new ones, at most; 0 for the server's own limit (`ServerInfo.max_tokens`)
    temperature: float = 1.0  # 0 or more; with 0 always the likeliest token
    top_p: float = 1.0  # above 0, at most 1: only the likeliest tokens that together have this probability
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    seed: int | None = None  # of the sampling; None for another one each time
    at_least: int = 0  # refuse with `stale_generation` if the deployment's generation is lower


class Usage(Struct, frozen=True):
    prompt_tokens: int  # read, begin-of-text and the template's own included
    completion_tokens: int  # generated, also those that a stop string cut off
    cached_tokens: int = 0  # of the prompt: those that did not have to be computed again


class GenerateFrame(Struct, frozen=True, omit_defaults=True):
    """A piece of the answer. All but the last have a text alone; the last one says how it ended, what it cost, and who gave
    it. Texts are whole characters, and one after the other they are the answer. A server whose first text takes long sends a
    frame without one before it begins: the caller can cancel from then on, and is missed if it is gone."""

    text: str = ""  # what is added
    finish_reason: Literal["", "stop", "length"] = ""  # "" in all but the last; "stop": by itself, or at a stop string
    usage: Usage | None = None  # of the last frame, as all below
    model: str = ""
    generation: int = 0
    artifact: str = ""  # digest
    first_ms: float = 0.0  # in the server: to the first text
    took_ms: float = 0.0  # in the server


class InfoRequest(Struct, frozen=True):
    model: str = ""
    at_least: int = 0


class ServerInfo(Struct, frozen=True):
    """What a served model is, and what can be asked of it."""

    model: str
    generation: int
    artifact: str
    methods: tuple[str, ...]  # that it answers: "classify", "embed", "generate"
    context_tokens: int = 0  # prompt and answer together; 0 where that means nothing
    max_tokens: int = 0  # of one answer, at most
    details: dict[str, str] = {}  # for people: structure, parameters, precision, library


class MeasureRequest(Struct, frozen=True, forbid_unknown_fields=True):
    models: tuple[str, ...]  # digests; measured in turns, so that a noisy machine is unfair to none
    dataset: str  # digest
    split: Literal["validation", "test"] = "validation"
    rounds: int = 5
    threads: int = 0  # of the compute library; 0 for all cores of the job


class Measurement(Struct, frozen=True):
    model: str  # digest
    scores: Scores
    latency_ms: float  # one document, median over the rounds
    latency_p99_ms: float
    throughput: float  # documents/s, the whole split in batches, median over the rounds
    bytes: int  # of the artifact on disk
    memory_mb: float  # growth of the resident set by loading it
    load_s: float


class Measured(Struct, frozen=True):
    measurements: tuple[Measurement, ...]
    conditions: dict[str, str] = {}  # processor, cores, library versions


class Server(Contract, name="server", major=1):
    """Loads models and answers for them."""

    @model_unary
    async def classify(self, request: ClassifyRequest, call: Any) -> ClassifyReply:
        """The labels of each text with their probabilities."""
        ...

    @model_unary
    async def embed(self, request: EmbedRequest, call: Any) -> EmbedReply:
        """A vector of unit length for each text; `unsupported_method` where the model has none."""
        ...

    @model_streamed
    async def generate(self, request: GenerateRequest, call: Any) -> AsyncIterator[GenerateFrame]:
        """Text, as it is made; a caller who cancels or is gone stops the work. `unsupported_method` where the model has none."""
        ...

    @model_unary
    async def info(self, request: InfoRequest, call: Any) -> ServerInfo:
        """What the model is, and which methods it has."""
        ...

    @job
    async def measure(self, request: MeasureRequest, job: Job) -> Measured:
        """Quality, latency, throughput, size and memory of models, in one interleaved run on this machine."""
        ...
