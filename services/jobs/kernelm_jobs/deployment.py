"""The pure decisions about a deployment, a stage that `uses = "deploy"`."""

import re
from typing import Any

import msgspec

from kernelm_contracts.deployments import DEPLOY, Deployed, Deployment, DeployRequest, PastDeployment
from kernelm_contracts.jobs import JobRecord
from kernelm_contracts.server import ServedModel
from kernelm_sdk.contract import token
from kernelm_sdk.errors import FaultBody, PluginFault, from_body
from kernelm_sdk.system import Bounds, Destination, PoolSpec, Progress, Resources, Route, Swap, SwapRequest, SystemState

DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
MAX_NAME = 40  # characters; generation and digest follow it in the pool's name, which has 63
REMEDY, LOG = " -> ", "\n  | "  # in what a node says of an instance that has ended: before what to do, and each line of its log
HISTORY = 10  # models that a record remembers


class Attempt(msgspec.Struct, frozen=True):
    """The record in KV `deployments` under `attempt.<name>`: the last generation that was given out, and to whom. Written
    before anything is begun, so that a number is never used twice, and whoever goes on after a crash finds the swap."""

    name: str
    generation: int
    pool: str
    job: str
    epoch: int


def result_of(deployment: Deployment) -> dict[str, Any]:
    """The deployment as the result of its stage."""
    deployed = Deployed(deployment.name, deployment.generation, deployment.artifact, deployment.pool)
    result: dict[str, Any] = msgspec.to_builtins(deployed)
    return result


def request_of(job: JobRecord) -> DeployRequest:
    return msgspec.convert(job.spec.request, DeployRequest)


def is_replica(job: JobRecord) -> bool:
    return job.spec.uses == DEPLOY


def check(request: DeployRequest) -> None:
    """ValueError that names the field, unless the request can be carried out."""
    if len(token(request.name, "`name`")) > MAX_NAME:
        raise ValueError(f"`name` {request.name!r} is longer than {MAX_NAME} characters")
    token(request.plugin, "`plugin`")
    if not DIGEST.match(request.model):
        raise ValueError(f"`model` {request.model!r} is no digest (sha256:<64 hex digits>)")
    if request.instances < 1:
        raise ValueError(f"`instances` is {request.instances}, and must be at least 1")
    if request.maximum and not 1 <= request.instances <= request.maximum:
        raise ValueError(f"`maximum` is {request.maximum}, and must be at least `instances`, {request.instances}, or 0 for always "
                         "as many")  # fmt: skip
    if not 0 <= request.minimum <= (request.maximum or request.minimum):
        raise ValueError(f"`minimum` is {request.minimum}, and must be 0 to `maximum`, {request.maximum}")
    if request.objective_ms < 0 or request.idle_s < 0:
        raise ValueError(f"`objective_ms` {request.objective_ms:g} and `idle_s` {request.idle_s:g} must not be negative")
    if not 0 <= request.canary < 100:
        raise ValueError(f"`canary` is {request.canary}, and must be 1 to 99 percent, or 0 for all calls")
    if request.watch_s < 0 or (request.canary and not request.watch_s):
        raise ValueError(f"`watch_s` is {request.watch_s:g}, and must be above 0 for a canary, which ends with it")
    if not 0 <= request.error_rate <= 1:
        raise ValueError(f"`error_rate` is {request.error_rate:g}, and must be 0 to 1")
    if not 0 <= request.quality <= 1 or any(not c.text.strip() or not c.expect for c in request.checks):
        raise ValueError(f"`quality` is {request.quality:g}, and must be 0 to 1; each of `checks` has a text and what to `expect`")
    if request.latency_ratio <= 0 or request.latency_ms < 0 or request.min_calls < 1:
        raise ValueError(f"`latency_ratio` {request.latency_ratio:g}, `latency_ms` {request.latency_ms:g} and `min_calls` "
                         f"{request.min_calls} must be above 0")  # fmt: skip


def pool_of(request: DeployRequest, generation: int) -> str:
    """The pool's name tells the model: an instance of an attempt that was given up, with another model, is never taken
    for one of this pool."""
    return f"{request.name}-g{generation}-{request.model.removeprefix('sha256:')[:8]}"


def pool_spec(request: DeployRequest, generation: int, spread: dict[str, int], needs: Resources | None = None) -> PoolSpec:
    """The pool that serves `request.model` under its name; its instances load the model from their settings. `spread`: node ->
    instances; `needs`: of one."""
    served = ServedModel(request.name, request.model, generation)
    return PoolSpec(pool_of(request, generation), request.plugin, sum(spread.values()), node=next(iter(spread)), runtime="",
                    settings={**request.settings, "model": msgspec.to_builtins(served)}, models=(request.name,), contracts=False,
                    needs=needs, places=several(spread))  # fmt: skip


def several(spread: dict[str, int]) -> dict[str, int]:
    """`spread` where it has several nodes: that of one is told by its name and the number of instances."""
    return spread if len(spread) > 1 else {}


def answers(name: str, generation: int) -> str:
    """The reason of a replica's job that serves."""
    return f"answers as {name}, generation {generation}"


def route_to(deployment: Deployment, pool: str, why: str) -> Route:
    """All calls of the deployment to `pool`, which is its own, or a service that answers while it sleeps."""
    return Route(deployment.name, "model", (Destination(pool, 100),), deployment.generation, deployment.artifact, why)


def source_of(plugin: str, system: SystemState) -> str:
    """The digest of the plugin's files where what runs of it came as an artifact; "" where it is installed. The pool that serves
    its contracts says which of several versions is meant, else the newest pool does."""
    running = [p for p in system.pools if p.plugin == plugin and not p.parked]
    return max(running, key=lambda p: (p.contracts, running.index(p))).source if running else ""


def has_ready(pool: str, system: SystemState) -> bool:
    return any(i.pool == pool and i.state == "ready" for i in system.instances)


def instances_for(request: DeployRequest, current: Deployment | None) -> int:
    """How many instances a new version begins with: where they follow the load, as many as the one before has now."""
    if not request.maximum or current is None:
        return request.instances
    return min(max(request.instances, current.replicas), max(request.maximum, request.minimum))


def bounds(request: DeployRequest, replicas: int, changing: bool) -> tuple[int, int]:
    """(fewest, most) replicas that may be decided on now."""
    if changing:
        return replicas, replicas
    if not request.maximum:  # fewer, where a node had no room for more
        return request.instances, request.instances
    return request.minimum, max(request.maximum, request.minimum)


def scaling_of(request: DeployRequest) -> tuple[float, ...]:
    """How the number of instances follows the load; without a maximum it is fixed."""
    if not request.maximum:
        return (request.instances,)
    return request.minimum, request.maximum, request.objective_ms, request.idle_s


def already_serves(request: DeployRequest, record: Deployment | None, before: DeployRequest | None, system: SystemState) -> bool:
    """Whether the model answers under the name already, scaled and set in the same way (`before`: what was asked for then): then
    to deploy it again is to do nothing."""
    if record is None or before is None or (record.artifact, record.plugin) != (request.model, request.plugin):
        return False
    if request.settings != before.settings:
        return False
    return scaling_of(request) == scaling_of(before) and (has_ready(record.pool, system) or record.replicas == 0)


def outdated_pools(current: Deployment, system: SystemState) -> list[str]:
    """Pools of earlier generations, and of given up attempts at this one. A later one may be starting at this moment."""
    return [p.pool for p in system.pools if p.models == (current.name,) and not p.contracts and p.pool != current.pool
            and p.settings.get("model", {}).get("generation", current.generation + 1) <= current.generation]  # fmt: skip


def next_generation(name: str, current: Deployment | None, last: Attempt | None, system: SystemState) -> int:
    """Above every generation that callers may have seen: of the record, of attempts that went back, of the route."""
    seen = [current.generation if current else 0, last.generation if last else 0]
    return 1 + max(seen + [r.generation for r in system.routes if r.kind == "model" and r.name == name])


def swap_request(request: DeployRequest, spec: PoolSpec, generation: int, job: str, ready_s: float,
                 system: SystemState) -> SwapRequest:  # fmt: skip
    """What the kernel is asked for: the pool takes over the name from whatever serves it now, watched if that is there."""
    serving = {p.pool for p in system.pools if not p.parked}
    before = next((d.pool for r in system.routes if r.kind == "model" and r.name == request.name for d in r.to
                   if d.pool in serving and d.pool != spec.pool), "")  # fmt: skip
    bounds = Bounds(request.watch_s if before else 0.0, request.error_rate, request.latency_ratio, request.latency_ms,
                    request.min_calls, ready_s)  # fmt: skip
    spec = msgspec.structs.replace(spec, source=source_of(request.plugin, system))
    return SwapRequest(spec, (request.name,), before, generation, request.model, request.canary if before else 0, bounds,
                       request.why or f"deployed by {job}")  # fmt: skip


def trial_request(wanted: SwapRequest) -> SwapRequest:
    """The same pool started and proven, without any call: so that it can be asked what a good model knows."""
    bounds = msgspec.structs.replace(wanted.bounds, watch_s=0.0)
    return msgspec.structs.replace(wanted, routes=(), before="", canary=0, bounds=bounds)


def swap_of(pool: str, system: SystemState, trial: bool = False) -> Swap | None:
    """The swap to `pool`, whose name holds a generation and so is that of one swap only; or that by which it was put on trial."""
    return next((s for s in reversed(system.swaps) if s.pool == pool and bool(s.routes) != trial), None)


def is_routed(pool: str, system: SystemState) -> bool:
    """Whether all calls of some name go to `pool`."""
    return any([d.pool for d in r.to] == [pool] for r in system.routes)


def progress_of(swap: Swap, system: SystemState, now: float) -> Progress:
    """How far a swap is, for the record of its job. `now`: Unix seconds."""
    if swap.phase == "watching" and swap.bounds.watch_s:
        share = f"{swap.canary} % of the calls go" if swap.canary else "all calls go"
        seconds = min(max(now - swap.since, 0.0), swap.bounds.watch_s)
        return Progress(round(seconds / swap.bounds.watch_s, 4), "watching",
                        f"{share} to {swap.pool}, watched for {seconds:.0f} of {swap.bounds.watch_s:g} s")  # fmt: skip
    mine = [i for i in system.instances if i.pool == swap.pool]
    reasons = {i.id: i.reason.partition(LOG)[0] for i in mine}  # the fault that may follow has the log
    states = ", ".join(f"{i.id} is {i.state}{': ' * bool(reasons[i.id])}{reasons[i.id]}" for i in mine) or "no instance yet"
    return Progress(0.0, swap.phase, states)


def unfit(pool: str, system: SystemState) -> FaultBody | None:
    """What an instance of `pool` ended with that could not load the model, where it would come to that anywhere and at any time: a
    damaged file, a setting that is none. None where nobody has said so, as after a lack of memory."""
    said = (i.fault for i in system.instances if i.pool == pool and i.fault is not None)
    return next((fault for fault in said if fault.whose == "client" and not fault.retriable), None)


def raise_if_over(swap: Swap, name: str, system: SystemState) -> None:
    """If the swap did not come to its aim: the plugin's own ClientFault where it can't load the model, else a PluginFault:
    "rolled_back" once the new model had calls, "not_ready" before. Its message is one line; the remedy of what an instance ended
    with is its own, and the last lines of the log are a detail."""
    if swap.phase not in ("rolled_back", "failed"):
        return
    outcome, *log = swap.outcome.split(LOG)
    outcome, _, remedy = outcome.partition(REMEDY)
    details: dict[str, Any] = {"generation": swap.generation, "pool": swap.pool} | ({"log": "\n".join(log)} if log else {})
    if swap.phase == "rolled_back":
        raise PluginFault("rolled_back", f"{name} went back from {swap.pool} to {swap.before}, which goes on serving: "
                          f"{outcome}", remedy or "see the log of its instances; deploy with wider bounds if this is how it "
                          "shall be", **details)  # fmt: skip
    if fault := unfit(swap.pool, system):
        raise from_body(msgspec.structs.replace(fault, details=details))
    outcome = outcome.replace(f"pool {swap.pool} ", "it ", 1)
    raise PluginFault("not_ready", f"pool {swap.pool} does not serve {name}: {outcome}", remedy or "see the log of its instances",
                      retriable=True, **details)  # fmt: skip


def follows(new: Deployment, old: Deployment) -> Deployment:
    """`new` with the history of `old` and `old` itself in front of it."""
    if (new.generation, new.pool) == (old.generation, old.pool):  # the same, written again after a crash
        return msgspec.structs.replace(new, history=old.history)
    past = PastDeployment(old.generation, old.artifact, old.pool, old.plugin, new.when)
    return msgspec.structs.replace(new, history=(past, *old.history)[:HISTORY])
