"""`optimizer/1`: finds the better model, makes it cheaper, and proves it.

Candidates are given, or found by a search of a space of training requests, whose trials are jobs of their own
(`trainer/1.train`). They are measured side by side on the server that will serve them (`server/1.measure`), and chosen on the
validation split. What was not measured is not reported.
"""

from typing import ClassVar, Literal

from msgspec import Struct

from kernelm_contracts.server import Measurement
from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_sdk.contract import Contract, job
from kernelm_sdk.events import Event
from kernelm_sdk.plugin import Job


class Candidate(Struct, frozen=True, forbid_unknown_fields=True):
    """A point of the search: a model that exists, or settings to train one with."""

    name: str
    model: str = ""  # digest of a trained model; then `train` is not needed
    train: TrainRequest | None = None


Value = str | int | float | bool | tuple[str, ...]
Objective = Literal["accuracy", "loss", "latency", "size", "memory"]  # the first is to be large, the others small


class Dimension(Struct, frozen=True, forbid_unknown_fields=True):
    """A field of the training request that a search varies: one of `values`, or a number from `low` to `high`."""

    field: str  # of TrainRequest; "a.b" for the field b of its struct a
    values: tuple[Value, ...] = ()  # in the unit of the field
    low: float = 0.0  # in the unit of the field
    high: float = 0.0  # included
    step: float = 0.0  # between numbers; 0 for any number, or for every whole one
    log: bool = False  # numbers by their magnitude
    only: dict[str, tuple[Value, ...]] = {}  # asked for only where each of these fields has one of these values


class Search(Struct, frozen=True, forbid_unknown_fields=True):
    """Trials of a space of training requests. The same request suggests the same trials as long as the same has come of them."""

    train: TrainRequest  # what no dimension says
    space: tuple[Dimension, ...]
    sampler: Literal["tpe", "gp", "cmaes", "random", "grid"] = "tpe"
    pruner: Literal["none", "asha", "hyperband"] = "none"  # by `validation_accuracy`, which a training reports with its `epoch`
    objectives: tuple[Objective, ...] = ("accuracy",)  # several: the trials of the Pareto front are the finalists
    trials: int = 20
    parallel: int = 2  # jobs under way or waiting at the same time
    finalists: int = 4  # the best so many trials are measured beside the candidates
    seed: int = 0
    preemptible: bool = False  # trials make room for any other job, and go on later


class OptimizeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    dataset: str  # digest
    candidates: tuple[Candidate, ...]  # may be () where there is a `search`
    budget_s: float = 300.0  # nothing is started after it; trainings under way are cancelled, and said to be
    quantize: bool = True  # make an int8 variant of the winner
    max_drop: float = 0.005  # of accuracy, on the validation split; an int8 variant that loses more is not kept
    objective: str = "accuracy"  # "accuracy", "latency" or "size": the last two among candidates within `max_drop` of the best
    search: Search | None = None  # trials beside the candidates
    max_latency_ms: float = 0.0  # of one document; 0 for any. What is above any of these limits wins only if all are
    max_bytes: int = 0  # of the artifact
    max_memory_mb: float = 0.0  # of the loaded model
    optimize: Literal["", "auto"] = ""  # "auto": a built-in search beside the defaults, and whether it found better
    base: str = ""  # digest of an encoder that "auto" may start from


class Row(Struct, frozen=True):
    """One line of the report."""

    name: str
    outcome: str  # "winner", "measured", "not kept", "not measured: <reason>"
    structure: str = ""
    algorithm: str = ""
    precision: str = ""
    model: str = ""  # digest
    measurement: Measurement | None = None


class Trials(Struct, frozen=True):
    """What became of a search's trials. Each, with what was drawn and what came of it, is in `trials.json` of the report."""

    done: int
    pruned: int = 0
    failed: int = 0
    late: int = 0  # asked for, and cancelled when the budget was spent
    front: tuple[str, ...] = ()  # rows that no other measured one beats in all objectives


class Verdict(Struct, frozen=True):
    """Whether a search found better than the defaults, by McNemar's exact test on the test split."""

    default: str  # row
    better: bool  # significantly, at 0.05
    difference: float  # accuracy of the winner less that of the default
    p_value: float  # two-sided
    text: str  # for people


class Optimized(Struct, frozen=True):
    model: str  # digest of the winner
    winner: str
    rows: tuple[Row, ...]
    test: Scores | None  # of the winner, looked at once, after the choice; None if that could not begin
    report: str = ""  # digest of an artifact of kind "report": report.md, report.json, report.png
    took_s: float = 0.0
    trials: Trials | None = None  # of a search
    verdict: Verdict | None = None  # of "auto"
    notes: tuple[str, ...] = ()  # what was left out, and why: a measurement that waited for cores until it was too late


class Prune(Struct, frozen=True, forbid_unknown_fields=True):
    """Which shares of a model go, 0 to less than 1: what did least on documents of the train split."""

    layers: float = 0.0  # share of the layers
    heads: float = 0.0  # share of each layer's attention, with the keys and values that they share; not of BERT-like models
    width: float = 0.0  # share of the inner units of each layer's feed-forward part


class CompressRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A smaller model out of one of structure "causal-lm" or, by "prune", "distill" and "int8", "encoder"; "int8" takes
    "tfidf-linear" too."""

    model: str  # digest
    dataset: str  # digest: trained on its train split, measured on its validation split
    method: Literal["int8", "int4", "prune", "distill", "gguf", "gptq"]  # "gguf": a file for llama.cpp with weights of 8 bits;
    # "gptq": integers in the format of compressed-tensors, which vLLM serves
    prune: Prune = Prune()
    train: TrainRequest | None = None  # how a pruned model recovers (None: not at all), how a student learns; as it is for
    # "distill" it names the student, by `base` or `architecture`. Dataset, structure, and base or teacher are filled in
    budget_s: float = 3600.0  # that the trainings may take
    rounds: int = 5  # of the measurement of a causal model, in which both take turns
    scheme: Literal["W4A16", "W8A8"] = "W4A16"  # of "gptq": bits of weights and activations; A16 are bfloat16
    activations: Literal["dynamic", "static"] = "dynamic"  # of an encoder by "int8": their ranges at each call, or
    # once, as documents of the train split show them


class Change(Struct, frozen=True):
    """What a model lost or won, on the same documents."""

    figure: Literal["accuracy", "loss"]  # of classifiers, of causal models (mean nats a token)
    difference: float  # after less before, in the unit of the figure
    low: float  # 95% interval of it, by paired bootstrap over the documents
    high: float  # likewise
    significant: bool  # at 0.05: McNemar's exact test of classifiers; of causal models whether the interval is off 0
    text: str  # for people


class Compressed(Struct, frozen=True):
    model: str  # digest, whose card has all of this
    method: str
    before: Measurement  # of causal models `latency_ms` is that of a token of an answer, `throughput` tokens/s of reading, and
    # `energy_j` that of a token that is read
    after: Measurement  # measured in turns with it; of "gguf" and "gptq" as transformers reads it: its time is not its server's
    change: Change
    without: Measurement | None = None  # the pruned model before its recovery; the student trained alike without a teacher
    gain: Change | None = None  # of `after` over that one
    took_s: float = 0.0


class CandidateMeasured(Event, frozen=True):
    """A candidate has figures."""

    TYPE: ClassVar[str] = "candidate.measured"
    job: str
    name: str
    accuracy: float
    latency_ms: float


class Optimizer(Contract, name="optimizer", major=1):
    """Searches and compresses, with proof."""

    events = (CandidateMeasured,)

    @job
    async def optimize(self, request: OptimizeRequest, job: Job) -> Optimized:
        """Train what is not yet trained, measure all in one interleaved run, choose, quantize, report."""
        ...

    @job
    async def compress(self, request: CompressRequest, job: Job) -> Compressed:
        """Make one model smaller by one method, and measure it beside what it was made from. ClientFault `invalid`,
        `invalid_model` (it can't be compressed so), `not_installed` (what the method needs) or `budget_too_small`."""
        ...
