"""`node/1`: starting instances. `plugin/1`: speaking to one."""

from typing import Any

from msgspec import Struct

from kernelm_sdk.contract import Contract, unary
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

class Diagnosis(Struct, frozen=True):
    instance: str
    advice: str
    log: str  # the last lines

class Node(Contract, name="node", major=1):
    """One machine: reports its resources, starts and stops instances in their runtimes."""
    @unary
    async def start(self, request: StartInstance, call: Any) -> Running: ...
    @unary
    async def stop(self, request: InstanceName, call: Any) -> Empty: ...
    @unary
    async def report(self, request: Empty, call: Any) -> NodeReport: ...
    @unary
    async def diagnose(self, request: InstanceName, call: Any) -> Diagnosis: ...

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

class DrainRequest(Struct, frozen=True):
    deadline_s: float = 30.0

class Lifecycle(Contract, name="plugin", major=1):
    """What every instance answers to on `inst.<instance>.plugin.v1.<verb>`; the runner implements it, not the plugin."""
    @unary
    async def probe(self, request: Empty, call: Any) -> Probe: ...
    @unary
    async def cancel(self, request: CancelJob, call: Any) -> Empty: ...
    @unary
    async def drain(self, request: DrainRequest, call: Any) -> Probe: ...
    @unary
    async def stop(self, request: Empty, call: Any) -> Empty: ...
