"""`jobs/1`: durable, resumable work, and the runs (pipelines) that are made of it.

Units: `_s` in seconds, times in Unix seconds. The record in KV `jobs` is the only truth about a job.
"""

from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

from msgspec import Struct

from kernelm_contracts.deployments import Deployment, RollbackDeployment, Undeploy
from kernelm_contracts.scheduler import Share
from kernelm_contracts.shadows import Compared, ModelShadowed, Shadow, ShadowRequest
from kernelm_contracts.usage import UsageQuery, UsageReport
from kernelm_sdk.contract import Contract, streamed, unary
from kernelm_sdk.errors import FaultBody
from kernelm_sdk.events import Event
from kernelm_sdk.system import Empty, Progress, Resources

JobState = Literal["queued", "placed", "running", "done", "dead", "cancelled"]


class JobSpec(Struct, frozen=True, gc=False):
    """What to do: a job method of a contract with its request, or (kind "replica") a pool to keep running."""

    name: str
    uses: str  # "trainer/1.train"; for a replica "deploy"
    request: dict[str, Any]
    resources: Resources = Resources()
    plugin: str = ""  # which plugin, if the user cares; "" for the one that the contract is routed to
    tenant: str = "default"
    priority: int = 0  # higher first
    attempts: int = 3  # after as many failures it is dead
    parent: str = ""  # the job that submitted it: cancelled with it
    run: str = ""
    preemptible: bool = False  # burst: it may be stopped, at a checkpoint, for any other
    deadline: float = 0.0  # Unix seconds; 0 for none
    estimate_s: float = 0.0  # run time, where it is known; 0 for not known
    most: int = 1  # so many times `resources` it can use in its instance: it grows and shrinks by that, at checkpoints
    gang: int = 1  # instances that work on it together, all of them or none; each gets `resources`


class JobRecord(Struct, frozen=True, gc=False):
    """The only truth about a job, in KV `jobs`. All writes are compare-and-set."""

    id: str
    spec: JobSpec
    key: str  # content address: contract, plugin version and request; equal keys share a result
    state: JobState = "queued"
    epoch: int = 0  # grows with every owner: the fencing token
    attempt: int = 0
    node: str = ""
    instance: str = ""
    progress: Progress = Progress()
    checkpoint: str = ""
    result: dict[str, Any] = {}
    fault: FaultBody | None = None
    submitted: float = 0.0  # Unix seconds
    started: float = 0.0
    finished: float = 0.0
    heard: float = 0.0  # last progress
    why: str = ""  # the scheduler's or the system's last reason
    reused: bool = False
    checkpointed: float = 0.0  # when the last checkpoint was made
    stopping: float = 0.0  # since when it is to make room at its next checkpoint; 0 for not
    preemptions: int = 0  # how often it has made room
    allocation: tuple[Share, ...] = ()  # where its members are; () for one on `node`
    served_s: float = 0.0  # member seconds that it has run for, up to its last stop
    target: tuple[Share, ...] = ()  # what it is to have from its next checkpoint on; () for no change
    heir: str = ""  # the instance that has it from then on
    gang: tuple[str, ...] = ()  # its instances by rank, where there are several; `instance` is the first
    meeting: str = ""  # the address at which rank 0 is met
    rates: dict[str, float] = {}  # members -> part of the work that was done per second with so many
    trace: str = ""  # W3C `traceparent` of who submitted it
    left: str = ""  # digest of the checkpoint that its plugin, in the version of `key`, could not go on from


class StageSpec(Struct, frozen=True, forbid_unknown_fields=True, rename={"with_": "with"}):
    """One stage of a run. A value "${stage.field}" in `with` is replaced by that field of the stage's result."""

    name: str
    uses: str
    with_: dict[str, Any] = {}
    plugin: str = ""
    resources: Resources = Resources()
    attempts: int = 3
    preemptible: bool = False  # this and what follows as in `JobSpec`
    deadline: float = 0.0
    estimate_s: float = 0.0
    most: int = 1
    gang: int = 1


class RunSpec(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    stage: tuple[StageSpec, ...]
    tenant: str = "default"
    priority: int = 0


class RunRecord(Struct, frozen=True):
    id: str
    spec: RunSpec
    jobs: dict[str, str] = {}  # stage -> job
    state: Literal["running", "done", "failed", "cancelled"] = "running"
    fault: FaultBody | None = None
    submitted: float = 0.0
    finished: float = 0.0
    trace: str = ""  # W3C `traceparent` of who submitted it


class RunView(Struct, frozen=True):
    run: RunRecord
    jobs: tuple[JobRecord, ...] = ()  # in the order of the stages, children behind their parent


class RunName(Struct, frozen=True):
    id: str


class JobName(Struct, frozen=True):
    id: str


class Outlook(Struct, frozen=True):
    """What the scheduler says to a job now, and what would start it."""

    job: str
    name: str
    state: str  # of the job; "planned" for one that was not submitted
    action: str = ""  # of the scheduler: place, wait, reject; "" where it isn't asked
    node: str = ""
    reason: str = ""
    remedy: str = ""  # what would start it
    starts: float = 0.0  # when it starts, by the estimates that there are; 0 for not known
    ahead: int = 0  # waiting jobs that the scheduler takes before it


class Plan(Struct, frozen=True):
    """A stage that needs the result of another one is seen as if that was there already."""

    stages: tuple[Outlook, ...]


class JobQuery(Struct, frozen=True):
    state: str = ""  # "" for all
    run: str = ""
    limit: int = 100
    known: dict[str, float] = {}  # job -> `heard` as the caller knows it: those that are over or were heard of since, no others
    wait_s: float = 0.0  # so long the answer may wait for the first of them, up to 20
    tenant: str = ""  # "" for all


class JobList(Struct, frozen=True):
    jobs: tuple[JobRecord, ...]
    total: int = 0  # that there are, also beyond `limit`


class JobChanged(Event, frozen=True):
    """A job went to another state."""

    TYPE: ClassVar[str] = "job.state"
    job: str
    name: str
    run: str
    state: JobState
    epoch: int
    why: str = ""
    tenant: str = ""
    node: str = ""
    cpu: float = 0.0  # cores that it holds in this state
    uses: str = ""  # what it does, as in `JobSpec`


class JobProgress(Event, frozen=True):
    """A job got on; at most one a second and job."""

    TYPE: ClassVar[str] = "job.progress"
    job: str
    name: str
    run: str
    progress: Progress


class RunFinished(Event, frozen=True):
    """A run is at its end."""

    TYPE: ClassVar[str] = "run.finished"
    run: str
    name: str
    state: str
    took_s: float


class ModelDeployed(Event, frozen=True):
    """A model version answers under a name."""

    TYPE: ClassVar[str] = "model.deployed"
    model: str
    generation: int
    artifact: str
    pool: str


class ModelScaled(Event, frozen=True):
    """A deployment is to have another number of instances."""

    TYPE: ClassVar[str] = "model.scaled"
    model: str
    replicas: int
    was: int
    why: str
    node: str = ""  # "one", or "one, two" where they are on several
    tenant: str = ""
    cpu: float = 0.0  # cores of one instance


class Jobs(Contract, name="jobs", major=1):
    """The job table: takes runs and jobs, asks the scheduler, checks its decisions, dispatches, fences."""

    events = (JobChanged, JobProgress, RunFinished, ModelDeployed, ModelScaled, ModelShadowed)

    @unary
    async def submit_run(self, request: RunSpec, call: Any) -> RunRecord:
        """Take a run: its stages become jobs, each as soon as what it refers to is there."""
        ...

    @unary
    async def get_run(self, request: RunName, call: Any) -> RunView:
        """A run with its jobs, those that its jobs have submitted included."""
        ...

    @streamed
    async def follow_run(self, request: RunName, call: Any) -> AsyncIterator[RunView]:
        """A run each time that something of it changes, until it is over."""
        ...

    @unary
    async def cancel_run(self, request: RunName, call: Any) -> RunRecord:
        """Cancel a run with all of its jobs."""
        ...

    @unary
    async def submit(self, request: JobSpec, call: Any) -> JobRecord:
        """Take one job. Work that was done before, by the same plugin on the same request, is done at once (`reused`)."""
        ...

    @unary
    async def get(self, request: JobName, call: Any) -> JobRecord:
        """One job."""
        ...

    @unary
    async def find(self, request: JobQuery, call: Any) -> JobList:
        """The latest jobs, newest first."""
        ...

    @unary
    async def cancel(self, request: JobName, call: Any) -> JobRecord:
        """Cancel a job with all that it has submitted."""
        ...

    @unary
    async def why(self, request: JobName, call: Any) -> Outlook:
        """Why a job waits and what would start it, asked of the scheduler now."""
        ...

    @unary
    async def plan(self, request: RunSpec, call: Any) -> Plan:
        """When and where the stages of a run would start if it were submitted now. Nothing is changed."""
        ...

    @unary
    async def rollback(self, request: RollbackDeployment, call: Any) -> JobRecord:
        """A replica that brings back the model that a deployment served before."""
        ...

    @unary
    async def undeploy(self, request: Undeploy, call: Any) -> Deployment:
        """Take a deployment away: its calls that are under way are answered, later ones are refused, and what it held is free. Its
        last record."""
        ...

    @unary
    async def shadow(self, request: ShadowRequest, call: Any) -> Shadow:
        """Have a deployment answer copies of another one's calls, or end that."""
        ...

    @unary
    async def compared(self, request: Compared, call: Any) -> Empty:
        """What came of copies; said by gateways alone."""
        ...

    @unary
    async def usage(self, request: UsageQuery, call: Any) -> UsageReport:
        """Who used what: calls and tokens of models, and the resources that jobs and deployments held."""
        ...
