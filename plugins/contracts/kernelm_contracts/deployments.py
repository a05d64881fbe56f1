"""Deployments: which model answers under a name, on which nodes, and what did before. They are asked for as jobs (`jobs/1`)."""

from typing import Any

from msgspec import Struct

DEPLOY = "deploy"  # what such a stage `uses`: it is no job method, the job table itself carries it out


class KnownAnswer(Struct, frozen=True, forbid_unknown_fields=True):
    """What a good model answers to a text."""

    text: str  # to classify; for a model that generates, the prompt
    expect: str  # the best label; or what the answer contains, at temperature 0


class DeployRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`with` of a deploy stage: a replica that the scheduler places like any job, and that keeps its resources. The bounds say
    when the kernel goes back to the model before by itself; without `watch_s` the new one takes over at once, for good."""

    name: str  # of the deployment: clients call model.<name>.<method>
    model: str  # digest
    plugin: str = "encoder"  # the server plugin that runs it
    instances: int = 1  # to begin with; `resources` of the stage are those of one
    canary: int = 0  # percent of the calls while it is watched; 0 for all
    watch_s: float = 0.0  # how long it is watched before the model before it is stopped
    error_rate: float = 0.01  # share of calls that may fail, beyond that of the model before
    latency_ratio: float = 2.0  # p99 over that of the model before
    latency_ms: float = 20.0  # p99 up to here is never too slow
    min_calls: int = 20  # before any judgement
    why: str = ""  # for the record
    minimum: int = 1  # instances at least; with 0 it has none after a while without calls, and the next call starts one
    maximum: int = 0  # instances at most, by load; 0 for always `instances`
    objective_ms: float = 0.0  # p99 wanted, to which the load is scaled; 0 for none
    idle_s: float = 0.0  # without a call for so long it goes to `minimum` 0; 0 for as the scheduler is set
    checks: tuple[KnownAnswer, ...] = ()  # asked of the new model before it gets any call
    quality: float = 1.0  # share of the checks that must come out as expected, or else the model before serves on
    settings: dict[str, Any] = {}  # of the plugin, beside `model`: as its README lists them


class Deployed(Struct, frozen=True):
    """Result of a deploy stage."""

    model: str  # name of the deployment
    generation: int
    artifact: str  # digest
    pool: str


class PastDeployment(Struct, frozen=True):
    """What answered under a name before."""

    generation: int
    artifact: str  # digest
    pool: str
    plugin: str
    until: float  # Unix seconds


class Avoided(Struct, frozen=True):
    """A node on which the instances of a deployment did not get ready."""

    until: float  # before, none is started there
    why: str


WAITS = "waits: "  # so begins the reason of what has no room


class Deployment(Struct, frozen=True):
    """The record in KV `deployments` under `model.<name>`: what answers under the name now, and what did before."""

    name: str
    generation: int  # never used twice for a name, not even after one that went back
    artifact: str  # digest
    pool: str
    plugin: str
    job: str  # the replica: it holds the resources
    run: str = ""
    when: float = 0.0  # Unix seconds
    history: tuple[PastDeployment, ...] = ()  # the newest first
    node: str = ""  # where its instances are, or were last; the first one where they are on several
    replicas: int = 1  # instances wanted
    scaled: float = 0.0  # Unix seconds of the last change of `replicas`
    why: str = ""  # of that change
    avoid: dict[str, Avoided] = {}  # by node; where all of its nodes are among them, it has no place
    places: dict[str, int] = {}  # node -> of the instances wanted those that are to be there; {} for all on `node`

    @property
    def spread(self) -> dict[str, int]:
        """Node -> instances wanted there."""
        return self.places or ({self.node: self.replicas} if self.replicas else {})

    @property
    def waits(self) -> bool:
        """Whether its replicas have no place: it lost its node, and no other one had room."""
        return self.why.startswith(WAITS)


class Undeploy(Struct, frozen=True):
    """Take a deployment away."""

    name: str
    why: str = ""  # for the record


class RollbackDeployment(Struct, frozen=True):
    """Deploy the artifact that answered before the present one, as a new generation."""

    name: str
    canary: int = 0  # these as in `DeployRequest`
    watch_s: float = 0.0
    why: str = ""
