"""`server/1`: a model answers.

A deployment is a pool of server instances that load one model version from their settings before they are ready.
Clients call `model.<deployment>.<method>`; every answer says which model, generation and artifact gave it.

A server has the methods that its model is good for, and refuses the others with `unsupported_method`; `info` says which
it has. `generate` speaks the words of OpenAI's API ("Create chat completion", "Create completion"), so that the gateway's
chat and completion endpoints, streamed or not, are made of it.
"""

from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

from msgspec import Struct

from kernelm_contracts.trainer import Scores
from kernelm_sdk.contract import Contract, job, model_streamed, model_unary
from kernelm_sdk.events import Event
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


class ExtractRequest(Struct, frozen=True):
    input: tuple[str, ...]  # texts
    model: str = ""  # the deployment; the subject's when called over NATS
    at_least: int = 0  # refuse with `stale_generation` if the deployment's generation is lower


class Entity(Struct, frozen=True):
    """A part of a text that a model of the structure "token-classification" has found."""

    label: str  # as the model names it, without the prefixes of BIO ("B-", "I-")
    start: int  # first character, in Unicode code points of the text
    end: int  # behind the last one
    score: float  # mean probability of its words' labels, 0 to 1


class ExtractReply(Struct, frozen=True):
    model: str
    generation: int
    artifact: str  # digest
    results: tuple[tuple[Entity, ...], ...]  # a text a row, in the order of the text
    tokens: int  # read, after truncation
    took_ms: float  # in the server


class ToolCall(Struct, frozen=True):
    """What the model wants to be done: the caller does it, and sends the outcome back as a message of role "tool"."""

    id: str
    name: str  # of the tool
    arguments: str  # JSON text, as the model wrote it


class Message(Struct, frozen=True):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()  # of role "assistant": what it asked for
    tool_call_id: str = ""  # of role "tool": which call this is the outcome of


class Tool(Struct, frozen=True):
    """A function that the caller has and the model may ask for."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}  # JSON Schema of its arguments


class GenerateRequest(Struct, frozen=True):
    """Exactly one of `messages` and `prompt`. What is out of range is refused with the client's fault `invalid`, what does not
    fit the model's context with `too_large`, and a field that the server or its model can't honour with `unsupported_parameter`,
    which names it: nothing that was asked for is left out silently."""

    messages: tuple[Message, ...] = ()  # a chat, which the model's own template makes into a text
    prompt: str = ""  # a text to go on with, as it is; begin-of-text is the server's to add
    model: str = ""  # the deployment; the subject's when called over NATS
    max_tokens: int = 0  # new ones, at most; 0 for the server's own limit (`ServerInfo.max_tokens`)
    temperature: float = 1.0  # 0 or more; with 0 always the likeliest token
    top_p: float = 1.0  # above 0, at most 1: only the likeliest tokens that together have this probability
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    seed: int | None = None  # of the sampling; None for another one each time
    at_least: int = 0  # refuse with `stale_generation` if the deployment's generation is lower
    top_k: int = 0  # only the likeliest so many tokens; 0 for all
    presence_penalty: float = 0.0  # -2 to 2: off the logit of each token that the answer has already
    frequency_penalty: float = 0.0  # -2 to 2: the same, for each time that the answer has it
    schema: dict[str, Any] = {}  # JSON Schema that the answer must follow; {} for free text
    tools: tuple[Tool, ...] = ()  # of a chat
    tool_choice: str = ""  # "" or "auto": the model decides; "none"; "required": at least one call; or a tool's name
    adapter: str = ""  # digest of an artifact of kind "adapter" (LoRA) to answer with, loaded at its first use
    stream: bool = True  # False: the caller waits for the end, so that the answer may come in as few frames as the server likes


class Usage(Struct, frozen=True):
    prompt_tokens: int  # read, begin-of-text and the template's own included
    completion_tokens: int  # generated, also those that a stop string cut off
    cached_tokens: int = 0  # of the prompt: those that did not have to be computed again


class GenerateFrame(Struct, frozen=True, omit_defaults=True):
    """A piece of the answer. All but the last have a text or tool calls alone; the last one says how it ended, what it cost,
    and who gave it. Texts are whole characters, and one after the other they are the answer. A server whose first text takes
    long sends a frame without one before it begins: the caller can cancel from then on, and is missed if it is gone."""

    text: str = ""  # what is added
    # "" in all but the last; "stop": by itself, or at a stop string; "tool_calls": it waits for their outcome
    finish_reason: Literal["", "stop", "length", "tool_calls"] = ""
    usage: Usage | None = None  # of the last frame, as all below
    model: str = ""
    generation: int = 0
    artifact: str = ""  # digest
    first_ms: float = 0.0  # in the server: to the first text or tool call
    took_ms: float = 0.0  # in the server
    tool_calls: tuple[ToolCall, ...] = ()  # whole ones, each in one frame; as many as there are in all frames


class InfoRequest(Struct, frozen=True):
    model: str = ""
    at_least: int = 0


class ServerInfo(Struct, frozen=True):
    """What a served model is, and what can be asked of it."""

    model: str
    generation: int
    artifact: str
    methods: tuple[str, ...]  # that it answers: "classify", "embed", "extract", "generate"
    context_tokens: int = 0  # prompt and answer together; 0 where that means nothing
    max_tokens: int = 0  # of one answer, at most
    details: dict[str, str] = {}  # for people: structure, parameters, precision, library


class ModelLoading(Event, frozen=True):
    """An instance of a server is on its way to answer for a model; told at each new phase, with 1 when it is ready."""

    TYPE: ClassVar[str] = "model.loading"
    model: str  # the deployment
    generation: int
    pool: str
    fraction: float  # 0 to 1
    phase: str  # what it does now, for people


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
    energy_j: float = 0.0  # of all processors, for a document of the split in batches; 0 where it can't be read


class Measured(Struct, frozen=True):
    measurements: tuple[Measurement, ...]
    conditions: dict[str, str] = {}  # processor, cores, library versions


class Server(Contract, name="server", major=1):
    """Loads models and answers for them."""

    events = (ModelLoading,)

    @model_unary
    async def classify(self, request: ClassifyRequest, call: Any) -> ClassifyReply:
        """The labels of each text with their probabilities."""
        ...

    @model_unary
    async def embed(self, request: EmbedRequest, call: Any) -> EmbedReply:
        """A vector of unit length for each text; `unsupported_method` where the model has none."""
        ...

    @model_unary
    async def extract(self, request: ExtractRequest, call: Any) -> ExtractReply:
        """The entities of each text: persons, places, or what the model was trained to find; `unsupported_method` where it
        finds none."""
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
