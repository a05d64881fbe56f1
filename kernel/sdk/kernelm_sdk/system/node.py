"""`node/1`: starting instances. `plugin/1`: speaking to one."""

from typing import Any

from msgspec import Struct

from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.system.artifacts import ArtifactName
from kernelm_sdk.system.common import Empty, Limits, Resources


class StartInstance(Struct, frozen=True):
    instance: str
    plugin: str
    pool: str
    runtime: str
    token: str  # one-time join token for this instance
    needs: Resources = Resources()
    source: str = ""  # digest of an artifact with the plugin's files; "" for a plugin that is installed on the node
    limits: Limits = Limits()
    isolated: bool = False
    network: bool = False  # more than the way to the broker
    image: str = ""  # of a container: its id or digest; "" for the node's own runner image
    artifacts: tuple[str, ...] = ()  # digests that a container may read

class InstanceName(Struct, frozen=True):
    instance: str
    grace_s: float = 5.0  # between the polite request and the kill

class Running(Struct, frozen=True):
    instance: str
    pool: str
    plugin: str
    runtime: str
    pid: int  # 0 where the runtime has none of its own

class NodeReport(Struct, frozen=True):
    node: str
    capacity: Resources
    free: Resources  # what the machine has left by its own account, not by the scheduler's
    running: tuple[Running, ...]
    plugins: dict[str, str] = {}  # installed here: name -> version
    runtimes: dict[str, tuple[str, ...]] = {}  # runtime -> what it can do here: kill, cpu_limit, memory_limit, gpu_limit, isolation
    artifacts: tuple[str, ...] = ()  # digests whose files lie here, the latest first

class Diagnosis(Struct, frozen=True):
    instance: str
    advice: str
    log: str  # the last lines

class TrustVerdict(Struct, frozen=True):
    """What a node's policy says of a plugin's files, without running any of them."""

    allowed: bool
    reason: str  # who signed it, or why it must not run here, with the file or key that it is about
    policy: str = ""  # "none": nothing is demanded; "admin": an administrator may allow what is not signed; "refuse": nobody may
    signer: str = ""  # SHA-256 of the signer's public key (PEM), hex; "" for none
    remedy: str = ""

class AllowUnsigned(Struct, frozen=True):
    digest: str  # of the artifact with the plugin's files
    why: str = ""

class Node(Contract, name="node", major=1):
    """One machine: reports its resources, starts and stops instances in their runtimes."""
    @unary
    async def start(self, request: StartInstance, call: Any) -> Running:
        """Start an instance; asking again for one that runs is harmless. `unsupported_runtime` says what is lacking here."""
        ...
    @unary
    async def stop(self, request: InstanceName, call: Any) -> Empty:
        """Ask an instance to stop, and kill it with all that it started after `grace_s`; answers when it has ended."""
        ...
    @unary
    async def report(self, request: Empty, call: Any) -> NodeReport:
        """What this machine has, what runs on it, and what its runtimes can enforce."""
        ...
    @unary
    async def diagnose(self, request: InstanceName, call: Any) -> Diagnosis:
        """How an instance is, or how it ended, with the end of its log."""
        ...
    @unary
    async def trust(self, request: ArtifactName, call: Any) -> TrustVerdict:
        """Whether this node would run the plugin in an artifact."""
        ...
    @unary
    async def allow_unsigned(self, request: AllowUnsigned, call: Any) -> TrustVerdict:
        """Allow the plugin in an artifact to run here though no listed key signed it; for the administrator alone."""
        ...

class CancelJob(Struct, frozen=True):
    job: str
    epoch: int
    reason: str = ""

class Probe(Struct, frozen=True):
    instance: str
    uptime_s: float
    jobs: tuple[str, ...]  # "<job>/<epoch>" at work
    in_flight: int  # calls being answered
    answered: int  # all calls, faults too
    failed: int  # calls that ended in a fault of the plugin's or the system's; a client's bad input does not count
    rss_mb: float
    latency: tuple[int, ...] = ()  # calls that took at most 2**k / 16 ms, for k = 0, 1, 2 ...; each counted once
    busy_s: float = 0.0  # time in which at least one call was being answered

class DrainRequest(Struct, frozen=True):
    deadline_s: float = 30.0

class Lifecycle(Contract, name="plugin", major=1):
    """What every instance answers to on `inst.<instance>.plugin.v1.<verb>`; the runner implements it, not the plugin."""
    @unary
    async def probe(self, request: Empty, call: Any) -> Probe:
        """Who are you, what are you doing, and how have your calls gone?"""
        ...
    @unary
    async def cancel(self, request: CancelJob, call: Any) -> Empty:
        """Stop working on a job; store and report nothing more of it."""
        ...
    @unary
    async def drain(self, request: DrainRequest, call: Any) -> Probe:
        """Leave the pool, answer what was delivered, finish the jobs that can be finished in time; then answer."""
        ...
    @unary
    async def stop(self, request: Empty, call: Any) -> Empty:
        """Answer, drain, exit with 0."""
        ...
