"""`server/1`: a model answers.

A deployment is a pool of server instances that load one model version from their settings before they are ready.
Clients call `model.<deployment>.<method>`; every answer says which model, generation and artifact gave it.
"""

from typing import Any, Literal

from msgspec import Struct

from kernelm_contracts.trainer import Scores
from kernelm_sdk.contract import Contract, job, model_unary
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

    @job
    async def measure(self, request: MeasureRequest, job: Job) -> Measured:
        """Quality, latency, throughput, size and memory of models, in one interleaved run on this machine."""
        ...
