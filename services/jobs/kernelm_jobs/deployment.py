"""The pure decisions about a deployment, a stage that `uses = "deploy"`."""

import re
from typing import Any

import msgspec

from kernelm_contracts.jobs import DEPLOY, Deployed, Deployment, DeployRequest, JobRecord
from kernelm_contracts.server import ServedModel
from kernelm_sdk.contract import token
from kernelm_sdk.errors import FaultBody
from kernelm_sdk.system import PoolSpec, SystemState

DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
MAX_NAME = 40  # characters; generation and digest follow it in the pool's name, which has 63


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


def pool_of(request: DeployRequest, generation: int) -> str:
    """The pool's name tells the model: an instance of an attempt that was given up, with another model, is never taken
    for one of this pool."""
    return f"{request.name}-g{generation}-{request.model.removeprefix('sha256:')[:8]}"


def pool_spec(request: DeployRequest, generation: int, node: str) -> PoolSpec:
    """The pool that serves `request.model` under its name; its instances load the model from their settings."""
    served = ServedModel(request.name, request.model, generation)
    return PoolSpec(pool_of(request, generation), request.plugin, request.instances, node=node, runtime="",
                    settings={"model": msgspec.to_builtins(served)}, models=(request.name,), contracts=False)  # fmt: skip


def has_ready(pool: str, system: SystemState) -> bool:
    return any(i.pool == pool and i.state == "ready" for i in system.instances)


def already_serves(request: DeployRequest, record: Deployment | None, system: SystemState) -> bool:
    """Whether the model answers under the name already: then to deploy it again is to do nothing."""
    return (record is not None and (record.artifact, record.plugin) == (request.model, request.plugin)
            and has_ready(record.pool, system))  # fmt: skip


def outdated_pools(current: Deployment, system: SystemState) -> list[str]:
    """Pools of earlier generations, and of given up attempts at this one. A later one may be starting at this moment."""
    return [p.pool for p in system.pools if p.models == (current.name,) and not p.contracts and p.pool != current.pool
            and p.settings.get("model", {}).get("generation", current.generation + 1) <= current.generation]  # fmt: skip


def trouble(pool: str, system: SystemState) -> FaultBody | None:
    """Why the pool will not become ready, once the kernel has given up on it."""
    if why := system.health.get(f"pool {pool}"):
        return FaultBody("plugin", "quarantined", f"pool {pool} is {why}", "see the log of its instances")
    return None
