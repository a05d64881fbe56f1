"""`optimizer/1`: finds the better model, makes it cheaper, and proves it.

Candidates are trained as jobs of their own (`trainer/1.train`), measured side by side on the server that will serve
them (`server/1.measure`), and chosen on the validation split. What was not measured is not reported.
"""

from typing import ClassVar

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


class OptimizeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    dataset: str  # digest
    candidates: tuple[Candidate, ...]
    budget_s: float = 300.0  # no candidate is started after it; those under way are cancelled, and said to be
    quantize: bool = True  # make an int8 variant of the winner
    max_drop: float = 0.005  # of accuracy, on the validation split; an int8 variant that loses more is not kept
    objective: str = "accuracy"  # "accuracy", "latency" or "size": the last two among candidates within `max_drop` of the best


class Row(Struct, frozen=True):
    """One line of the report."""

    name: str
    outcome: str  # "winner", "measured", "not kept", "not measured: <reason>"
    structure: str = ""
    algorithm: str = ""
    precision: str = ""
    model: str = ""  # digest
    measurement: Measurement | None = None


class Optimized(Struct, frozen=True):
    model: str  # digest of the winner
    winner: str
    rows: tuple[Row, ...]
    test: Scores | None  # of the winner, looked at once, after the choice
    report: str = ""  # digest of an artifact of kind "report": report.md, report.json, report.png
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
