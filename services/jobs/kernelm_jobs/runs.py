"""Runs as pure functions: validation before anything starts, references between stages, content keys, what comes next.

A run is checked as a whole at the submission: every reference is replaced by a sample of the type that the earlier stage
will return, and the whole `with` is converted to the request's struct. What passes can only fail for its values.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import inspect as types

from kernelm_contracts.deployments import DEPLOY, Deployed, DeployRequest
from kernelm_contracts.jobs import JobRecord, RunRecord, RunSpec, StageSpec
from kernelm_jobs import deployment
from kernelm_jobs.deployment import DIGEST, is_replica
from kernelm_sdk.contract import CONTRACTS, Method, token
from kernelm_sdk.errors import ClientFault, FaultBody
from kernelm_sdk.system import Resources

REFERENCE = re.compile(r"\$\{([a-z0-9-]+)\.([A-Za-z_]\w*)\}\Z")
SAMPLE = "sha256:" + "0" * 64  # of the strings that one stage gets from another, most are digests
Signature = tuple[type[msgspec.Struct], type[msgspec.Struct]]


# ---- what a job does ---------------------------------------------------------------------------------------------


def method_named(uses: str) -> Method:
    """The job method that "contract/major.method" names; ClientFault "invalid" with the known ones otherwise."""
    identifier, _, name = uses.rpartition(".")
    contract = CONTRACTS.get(identifier)
    method = contract.methods.get(name.replace("_", "-")) if contract else None
    if method is None or method.kind != "job":
        known = sorted(f"{c.id()}.{m.name}" for c in CONTRACTS.values() for m in c.methods.values() if m.kind == "job")
        raise ClientFault("invalid", f"`uses` {uses!r} names no job", f"known are {', '.join([*known, DEPLOY])}")
    return method


def signature(uses: str) -> Signature:
    """(request, reply) of what `uses` names."""
    if uses == DEPLOY:
        return DeployRequest, Deployed
    method = method_named(uses)
    return method.request, method.reply


def normalized(value: Any, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """`value` as JSON of the struct `kind` with every default filled in; ValidationError if it does not convert."""
    result: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(msgspec.convert(value, kind)))
    return result


def check_resources(needs: Resources, what: str) -> None:
    """ClientFault "invalid" unless no amount is negative (or not a number)."""
    if not (0 <= needs.cpu < float("inf") and needs.memory_mb >= 0 and needs.gpus >= 0):
        raise ClientFault("invalid", f"{what}: resources must not be negative: {needs}")


def content_key(uses: str, plugin: str, version: str, request: dict[str, Any]) -> str:
    """SHA-256, in hex, of what determines a result: contract and method, the plugin and its version, the whole request."""
    return hashlib.sha256(msgspec.json.encode([uses, plugin, version, request], order="deterministic")).hexdigest()


def digests_in(value: Any) -> Iterator[str]:
    """Every artifact's digest in a request or a result."""
    yield from filter(DIGEST.match, _texts_in(value))


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(item)


# ---- references --------------------------------------------------------------------------------------------------


def references_in(value: Any) -> Iterator[tuple[str, str]]:
    """Every (stage, field) that `with` refers to; ValueError for what looks like a reference and is none."""
    for text in _texts_in(value):
        if "${" in text:
            match = REFERENCE.match(text)
            if match is None:
                raise ValueError(f"{text!r}: a reference is the whole value, as in \"${{train.model}}\"")
            yield match[1], match[2]


def replaced(value: Any, results: Mapping[str, Mapping[str, Any]]) -> Any:
    """`value` with every "${stage.field}" replaced by that field of the stage's result."""
    if isinstance(value, str):
        match = REFERENCE.match(value)
        return results[match[1]][match[2]] if match else value
    if isinstance(value, Mapping):
        return {key: replaced(item, results) for key, item in value.items()}
    return [replaced(item, results) for item in value] if isinstance(value, list | tuple) else value


def sample(kind: types.Type) -> Any:
    """Some value of a type of msgspec's: what a reference of that type may turn into."""
    match kind:
        case types.StructType():
            return {f.encode_name: sample(f.type) for f in kind.fields if f.required}
        case types.UnionType():
            return sample(next(t for t in kind.types if not isinstance(t, types.NoneType)))
        case types.LiteralType():
            return kind.values[0]
        case types.BoolType():
            return False
        case types.IntType() | types.FloatType():
            return kind.ge if kind.ge is not None else 1
        case types.ListType() | types.VarTupleType() | types.SetType() | types.TupleType():
            return [sample(t) for t in kind.item_types] if isinstance(kind, types.TupleType) else []
        case types.DictType():
            return {}
        case types.NoneType():
            return None
    return SAMPLE


# ---- validation --------------------------------------------------------------------------------------------------


def validate(spec: RunSpec) -> None:
    """ClientFault "invalid" that names stage and field, unless the run can be started as it stands."""
    try:
        token(spec.name, "name")
    except ValueError as error:
        raise ClientFault("invalid", f"run: {error}") from None
    if not spec.stage:
        raise ClientFault("invalid", f"run {spec.name!r} has no stage", "add a [[stage]] to the run file")
    samples: dict[str, dict[str, Any]] = {}
    for stage in spec.stage:
        where = f"run {spec.name!r}, stage {stage.name!r}"
        if stage.name in samples:
            raise ClientFault("invalid", f"{where}: there are two of this name", "names of stages are unique")
        try:
            if token(stage.name, "name")[0].isdigit():  # "news" 1, stage "1-a" and "news-1" 1, stage "a" would be one job
                raise ValueError("the name of a stage starts with a letter")
            reply = _check_stage(stage, samples)
        except (ValueError, msgspec.ValidationError) as error:
            raise ClientFault("invalid", f"{where}: {error}", "correct the run file") from None
        except ClientFault as fault:
            raise ClientFault(fault.code, f"{where}: {fault.message}", fault.remedy) from None
        fields = types.type_info(reply)
        assert isinstance(fields, types.StructType)
        samples[stage.name] = {f.encode_name: sample(f.type) for f in fields.fields}


def _check_stage(stage: StageSpec, samples: dict[str, dict[str, Any]]) -> type[msgspec.Struct]:
    request, reply = signature(stage.uses)
    check_resources(stage.resources, "`resources`")
    if stage.attempts < 1:
        raise ValueError(f"`attempts` is {stage.attempts}, and must be at least 1")
    for name, field in references_in(stage.with_):
        if name not in samples:
            raise ValueError(f"`with` refers to ${{{name}.{field}}}, and {name!r} is no earlier stage")
        if field not in samples[name]:
            raise ValueError(f"`with` refers to ${{{name}.{field}}}; the result of {name!r} has {', '.join(samples[name])}")
    converted = msgspec.convert(replaced(stage.with_, samples), request)
    if isinstance(converted, DeployRequest):
        deployment.check(converted)
    return reply


# ---- what comes next ---------------------------------------------------------------------------------------------


def is_complete(job: JobRecord) -> bool:
    """Whether a stage is over and well: done, or a replica that serves."""
    return job.state == "done" or (is_replica(job) and job.state == "running" and bool(job.result))


def ready_stages(run: RunRecord, jobs: Mapping[str, JobRecord]) -> list[StageSpec]:
    """Stages without a job whose references are all known; `jobs` by stage."""
    complete = {name for name, job in jobs.items() if is_complete(job)}
    return [stage for stage in run.spec.stage
            if stage.name not in run.jobs and all(name in complete for name, _ in references_in(stage.with_))]  # fmt: skip


def outcome(run: RunRecord, jobs: Mapping[str, JobRecord]) -> tuple[str, FaultBody | None]:
    """State of the run, and the fault of the stage that failed."""
    for stage in run.spec.stage:
        job = jobs.get(stage.name)
        if job is not None and job.state == "dead":
            fault = job.fault or FaultBody("kernel", "dead", job.why)
            return "failed", msgspec.structs.replace(fault, message=f"stage {stage.name!r}: {fault.message}")
    if any(job.state == "cancelled" for job in jobs.values()):
        return "cancelled", None
    complete = all(stage.name in jobs and is_complete(jobs[stage.name]) for stage in run.spec.stage)
    return ("done" if complete else "running"), None


def same_content(a: RunSpec, b: RunSpec) -> bool:
    return msgspec.json.encode(a, order="deterministic") == msgspec.json.encode(b, order="deterministic")
