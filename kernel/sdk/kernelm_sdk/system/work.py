"""`work/1`: how an instance reports on a job that it was given. Of the jobs themselves the kernel knows no more."""

from typing import Any

from msgspec import Raw, Struct

from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.errors import FaultBody
from kernelm_sdk.system.common import Empty, Resources


class Dispatch(Struct, frozen=True):
    """The body of the call that hands a job to an instance."""

    job: str
    epoch: int
    attempt: int
    request: Raw
    checkpoint: str = ""  # digest of the last one, to resume from
    run: str = ""
    name: str = ""
    resources: Resources | None = None  # what it may use here; None for not said
    rank: int = 0  # of this instance among `peers`
    peers: tuple[str, ...] = ()  # instances that work on it together, by rank; () for this one alone
    address: str = ""  # where rank 0 is met, for the others
    trace: str = ""  # W3C `traceparent` of who submitted it

class Progress(Struct, frozen=True):
    fraction: float = 0.0  # 0 to 1 within the job
    phase: str = ""
    message: str = ""
    metrics: dict[str, float] = {}  # name -> value, with its unit in the name (`tokens_per_s`); `step` only grows
    deadline_s: float = 600.0  # the phase declares it: without progress for so long, the job is taken away

class Report(Struct, frozen=True):
    """A worker's word on its job. Refused with `stale_epoch` when the job has another owner by now."""

    job: str
    epoch: int
    progress: Progress | None = None
    checkpoint: str = ""  # digest of a new one
    result: dict[str, Any] | None = None
    fault: FaultBody | None = None
    address: str = ""  # of rank 0 of several: where the others meet it; they are given the job then
    note: str = ""  # for the job's record: what its owner should know of how it is done
    left: str = ""  # digest of a checkpoint that it can't go on from, as `note` says: no other job of the same content is given it

class UsedRow(Struct, frozen=True):
    """Calls of one model by one caller."""

    model: str
    caller: str = ""  # whose name the broker has checked; the job table knows the tenant of a key
    tenant: str = ""  # for whom, where the caller is a door for others
    calls: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

class Used(Struct, frozen=True):
    """What was used since the report before. Reports of one life count from 1; one that is repeated counts once."""

    life: str  # a random name of this start of the process
    number: int
    rows: tuple[UsedRow, ...]

class Work(Contract, name="work", major=1):
    """Where the runner reports on a job; the job table implements it. Of the jobs themselves the kernel knows no more."""
    @unary
    async def report(self, request: Report, call: Any) -> Empty:
        """How a job gets on, its checkpoint, its result or its fault. `stale_epoch`: somebody else has it by now."""
        ...
    @unary
    async def used(self, request: Used, call: Any) -> Empty:
        """Who has used which model; answered when it is on record."""
        ...
