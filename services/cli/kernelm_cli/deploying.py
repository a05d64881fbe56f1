"""`kernelm model import | deploy | promote | history`: a model gets into the store, answers under a name, and is replaced there."""

import asyncio
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from kernelm_cli import artifacts, shadowing
from kernelm_cli.models import finish
from kernelm_cli.results import short
from kernelm_cli.session import Common, Output, connection, megabytes, print_json, stdout
from kernelm_cli.shadowing import percent
from kernelm_cli.sources import visible
from kernelm_cli.tables import columns
from kernelm_contracts.deployments import DEPLOY, Deployed, Deployment, DeployRequest, KnownAnswer, PastDeployment
from kernelm_contracts.jobs import JobRecord, Jobs, JobSpec
from kernelm_contracts.shadows import ShadowRequest
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import (
    Artifact,
    ArtifactList,
    ArtifactName,
    ArtifactQuery,
    Artifacts,
    Bounds,
    Empty,
    Kernel,
    OpenArtifact,
    PutArtifact,
    Resources,
    Swap,
    SwapRequest,
    SystemState,
)

MODEL = "model"  # the kind of an artifact
BASE_MB, PER_MB = 1024, 1.25  # memory that is asked for: of a server with its libraries, and for each MB of the model's files
WATCH_S = 60.0  # that a canary is watched, unless the command says so
GENERATIVE = ("ForCausalLM", "ForConditionalGeneration", "MTModel")  # ends of such architectures' names in config.json
ENCODING = ("ForSequenceClassification", "ForTokenClassification", "Model")
ENCODERS = ("encoder", "frozen-linear", "tfidf-linear", "token-classification", "sentence-embedding")
SERVED_BY = dict.fromkeys(ENCODERS, "encoder") | {"causal-lm": "generator", "seq2seq-lm": "generator"}  # structure -> plugin
PUT_S = 600.0


def import_(path: Annotated[Path, Parameter(name="FOLDER|GGUF")], /, *, name: str = "", output: Output = Output()) -> int:
    """Store a model: a folder of Hugging Face's (config.json, *.safetensors, tokenizer.json) or a GGUF file. Pickles are refused.

    Parameters
    ----------
    name
        What it is called in the store; the folder's or file's own name otherwise.
    """
    path = path.expanduser().absolute()
    _check_importable(path)
    about: dict[str, Any] = {"name": name or path.stem, "origin": str(path)}
    if (config := path / "config.json").is_file():
        about["architecture"] = next(iter(_json(config).get("architectures") or ()), "")

    async def put(folder: Path) -> Artifact:
        async with connection(output.folder) as bus:
            stored: Artifact = await bus.call(Artifacts.put, PutArtifact(str(folder), MODEL, metadata=about), timeout_s=PUT_S)
            return stored

    with visible(path, output.folder) as folder:
        artifact = asyncio.run(put(folder))
    if output.json:
        print_json(artifact)
        return 0
    size = f"{megabytes(artifact.files):,.1f} MB in {len(artifact.files)} files"
    stdout().print(f"{about['name']}: {short(artifact.digest)}, {size}\ndeploy it: kernelm model deploy NAME {about['name']}",
                   markup=False)  # fmt: skip
    return 0


def _check_importable(path: Path) -> None:
    remedy = "give a folder with config.json, *.safetensors and tokenizer.json, or a file *.gguf"
    if not path.exists():
        raise ClientFault("not_found", f"{path} does not exist", remedy)
    if path.is_dir():
        files = {file.name for file in path.iterdir()}
        served = "model.json" in files or ("config.json" in files and any(file.endswith(".safetensors") for file in files))
        if not served and not any(file.endswith(".gguf") for file in files):
            raise ClientFault("invalid_model", f"{path} holds no model: {', '.join(sorted(files)[:8]) or 'nothing'}", remedy)
    elif path.suffix != ".gguf":
        raise ClientFault("invalid_model", f"{path.name} is no model that can be served", remedy)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    except ValueError as error:
        raise ClientFault("invalid_model", f"{path.name}: {error}", "store the model again") from None


@Parameter(name="*")
@dataclass(frozen=True)
class Replicas:
    """How many instances there are, and what each of them gets."""

    replicas: Annotated[int, Parameter(help="Instances; with --maximum the least, 0 for none while nobody calls.")] = 1
    maximum: Annotated[int, Parameter(help="Instances at most, by load; 0 for always --replicas.")] = 0
    idle: Annotated[float, Parameter(help="Seconds without a call after which there are none.")] = 0.0
    plugin: Annotated[str, Parameter(help="The server plugin; found out by the model's files otherwise.")] = ""
    cpu: Annotated[float, Parameter(help="Cores of one instance.")] = 0.5
    memory: Annotated[int, Parameter(help="MB (2**20 bytes) of one instance; by the model's size otherwise.")] = 0
    gpus: Annotated[int, Parameter(help="GPUs of one instance.")] = 0
    tenant: Annotated[str, Parameter(help="Who pays.")] = "default"


def deploy(name: Annotated[str, Parameter(name="NAME")], model: Annotated[str, Parameter(name="MODEL")], /, *, canary: str = "",
           shadow: str = "", watch: float | None = None, error_rate: float = 0.01, latency_ratio: float = 2.0,
           checks: Path | None = None, quality: float = 1.0, why: str = "", replicas: Replicas = Replicas(),
           output: Output = Output()) -> int:  # fmt: skip
    """Have MODEL answer under NAME: beside what serves there now, watched, and back by itself if it is worse.

    Parameters
    ----------
    model
        The name of a stored model (of `kernelm model import` or a training), its digest or the beginning of that.
    canary
        Percent of the calls that it gets while it is watched, as 10 or 10%; all of them otherwise.
    shadow
        Percent of the calls of which it gets copies: it answers as NAME-shadow, its answers are compared and thrown away
        (`kernelm model shadow NAME`), and `kernelm model promote NAME` has it answer in earnest.
    watch
        Seconds for which it is watched before what served before is stopped; 60 for a canary, else 0.
    error_rate
        Share of calls that may fail while it is watched, beyond that of the model before; it goes back by itself above that.
    latency_ratio
        p99 over that of the model before, above which it goes back by itself.
    checks
        A file with known answers, which it is asked before it gets any call: JSON, {"text": ..., "expect": ...} a line.
    quality
        Share of these that must come out as expected.
    why
        The reason, for the record.
    """
    share, copied = percent("--canary", canary, 99) if canary else 0, percent("--shadow", shadow) if shadow else 0
    watched = (WATCH_S if share else 0.0) if watch is None else watch
    request = DeployRequest(name, "", canary=share, watch_s=watched, why=why, checks=_known(checks), quality=quality,
                            error_rate=error_rate, latency_ratio=latency_ratio)  # fmt: skip
    if copied:
        request, replicas = _as_shadow(request, replicas)

    async def work() -> JobRecord:
        async with connection(output.folder) as bus:
            artifact = await find_model(bus, model)
            if copied:
                await shadowing.require(bus, name)
            state: SystemState = await bus.call(Kernel.state, Empty(), patience_s=5.0)
            _raise_if_busy(request.name, state)
            _require_plugin(replicas.plugin, state)
            plugin = replicas.plugin or await _plugin_for(bus, artifact)
            served = msgspec.structs.replace(request, model=artifact.digest, plugin=plugin)
            job: JobRecord = await bus.call(Jobs.submit, job_of(served, replicas, megabytes(artifact.files)), timeout_s=20.0)
            job = await finish(bus, job, output.json)
            if copied:
                await bus.call(Jobs.shadow, ShadowRequest(name, request.name, copied, why), timeout_s=20.0)
            return job

    job = asyncio.run(work())
    if output.json:
        print_json(job)
        return 0
    deployed = msgspec.convert(job.result, Deployed)
    stdout().print(f"{deployed.model} answers: {short(deployed.artifact)}, generation {deployed.generation}, pool {deployed.pool}",
                   markup=False)  # fmt: skip
    return 0


def _as_shadow(request: DeployRequest, replicas: Replicas) -> tuple[DeployRequest, Replicas]:
    """The deployment that answers copies of the calls of `request.name`; it is there while there are copies."""
    if request.canary or request.watch_s:
        raise ClientFault("invalid", "--shadow is given beside --canary or --watch", "a shadow gets no calls that could be watched")
    lasting = dataclasses.replace(replicas, replicas=0, maximum=max(replicas.maximum, replicas.replicas, 1),
                                  idle=replicas.idle or shadowing.IDLE_S)  # fmt: skip
    return msgspec.structs.replace(request, name=request.name + shadowing.SUFFIX), lasting


def job_of(request: DeployRequest, replicas: Replicas, model_mb: float) -> JobSpec:
    """The replica that is to be deployed; its memory by the size of the model, where the user does not say."""
    if replicas.maximum:
        request = msgspec.structs.replace(request, instances=max(replicas.replicas, 1), minimum=replicas.replicas,
                                          maximum=replicas.maximum, idle_s=replicas.idle)  # fmt: skip
    else:
        request = msgspec.structs.replace(request, instances=replicas.replicas)
    needs = Resources(replicas.cpu, replicas.memory or round(BASE_MB + PER_MB * model_mb), replicas.gpus)
    return JobSpec(f"deploy-{request.name}", DEPLOY, msgspec.to_builtins(request), needs, tenant=replicas.tenant)


def _known(file: Path | None) -> tuple[KnownAnswer, ...]:
    """The lines of a file of known answers; ClientFault "invalid" that names the line."""
    if file is None:
        return ()
    if not file.is_file():
        raise ClientFault("not_found", f"--checks {file} is no file", 'one {"text": ..., "expect": ...} a line')
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            found.append(msgspec.json.decode(line, type=KnownAnswer))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ClientFault("invalid", f"{file}:{number}: {error}", 'one {"text": ..., "expect": ...} a line') from None
    return tuple(found)


def promote(name: Annotated[str, Parameter(name="NAME")], /, *, common: Common = Common()) -> int:
    """Give a canary all calls now, without waiting for the end of its watch; or have a shadow answer in earnest."""

    async def work() -> Swap | JobRecord:
        async with connection(common.folder) as bus:
            state: SystemState = await bus.call(Kernel.state, Empty(), patience_s=5.0)
            swap = next((s for s in state.swaps if name in s.routes and s.phase == "watching"), None)
            if swap is None and (job := await shadowing.promote(bus, name)):
                return job
            if swap is None:
                raise ClientFault("not_found", f"no canary of {name!r} is being watched, and it has no shadow",
                                  "kernelm model deploy NAME MODEL --canary 10%, or --shadow 10%")  # fmt: skip
            pool = next(p for p in state.pools if p.pool == swap.pool)
            promoted: Swap = await bus.call(Kernel.swap, SwapRequest(pool, swap.routes, bounds=Bounds(watch_s=0.0)))
            return promoted

    done = asyncio.run(work())
    if isinstance(done, JobRecord):
        deployed = msgspec.convert(done.result, Deployed)
        stdout().print(f"{name} answers with {short(deployed.artifact)} now, generation {deployed.generation}; its shadow is over")
    else:
        stdout().print(f"all calls of {name} go to {done.pool} now, generation {done.generation}; {done.before} is stopped")
    return 0


def history(name: Annotated[str, Parameter(name="NAME")], /, *, output: Output = Output()) -> int:
    """List what has answered under a name, the newest first."""

    async def work() -> Deployment:
        async with connection(output.folder) as bus:
            bucket = bus.bucket("deployments", Deployment)
            found, _ = await bucket.get(f"model.{name}")
            if found is None:
                raise ClientFault("unknown_model", f"there is no deployment {name!r}", "kernelm model list")
            return found

    deployment = asyncio.run(work())
    now = PastDeployment(deployment.generation, deployment.artifact, deployment.pool, deployment.plugin, 0.0)
    rows = (now, *deployment.history)
    if output.json:
        print_json(rows)
        return 0
    table = columns("generation", "artifact", "plugin", "from", "until", right=("generation",))
    begun = [deployment.when, *(0.0 for _ in deployment.history)]
    for k, past in enumerate(rows):
        since = begun[k] or (rows[k + 1].until if k + 1 < len(rows) else 0.0)
        table.add_row(str(past.generation), short(past.artifact), past.plugin, _when(since), _when(past.until) or "now")
    stdout().print(table)
    return 0


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _require_plugin(name: str, state: SystemState) -> None:
    """ClientFault "unknown_plugin" for one that is nowhere: the job would wait for it for ever."""
    manifests = [p.manifest for p in state.plugins] + list(find_manifests()[0].values())  # one may have come since the kernel began
    known = {m.name for m in manifests if {"server/1", "retriever/1"} & set(m.contracts)}
    if name and name not in known:
        remedy = f"there are {', '.join(sorted(known)) or 'none'}; `kernelm plugin replace server/1 PATH` brings another"
        raise ClientFault("unknown_plugin", f"--plugin {name!r} is no plugin that serves models", remedy)


def _raise_if_busy(name: str, state: SystemState) -> None:
    if swap := next((s for s in state.swaps if name in s.routes and not s.over), None):
        raise ClientFault("busy", f"{name} is being changed: the swap to {swap.pool} is {swap.phase}",
                          f"wait for it, or `kernelm model promote {name}`, or `kernelm plugin rollback {swap.pool}`",
                          retriable=True)  # fmt: skip


async def find_model(bus: Bus, model: str) -> Artifact:
    """The newest stored model of that name, or the artifact whose digest begins so; ClientFault "not_found" with the names."""
    stored: ArtifactList = await bus.call(Artifacts.find, ArtifactQuery(MODEL, artifacts.ALL), timeout_s=30.0)
    if named := next((a for a in stored.artifacts if a.metadata.get("name") == model), None):
        return named
    try:
        return await artifacts.find(bus, model)
    except ClientFault as fault:
        if fault.code != "not_found":
            raise
    names = sorted({str(a.metadata["name"]) for a in stored.artifacts if a.metadata.get("name")})
    raise ClientFault("not_found", f"no model {model!r} is in the store; there are {', '.join(names) or 'none'}",
                      "kernelm model import FOLDER --name NAME, or `kernelm artifact list --kind model`")  # fmt: skip


def plugin_of(card: dict[str, Any], config: dict[str, Any]) -> str:
    """Which of kernelm's own servers takes a model with this `model.json` and `config.json` ({} for none); "" for none does."""
    if structure := card.get("structure"):
        return SERVED_BY.get(structure, "")
    architecture = str(next(iter(config.get("architectures") or ()), ""))
    if architecture.endswith(GENERATIVE):
        return "generator"
    return "encoder" if architecture.endswith(ENCODING) else ""


async def _plugin_for(bus: Bus, artifact: Artifact) -> str:
    """Which of kernelm's own servers takes the model, by its files."""
    files = {file.path for file in artifact.files}
    opened: OpenArtifact = await bus.call(Artifacts.open, ArtifactName(artifact.digest), timeout_s=PUT_S)
    folder = Path(opened.path)
    card, config = (_json(folder / name) if name in files else {} for name in ("model.json", "config.json"))
    if plugin := plugin_of(card, config):
        return plugin
    raise ClientFault("invalid", f"which plugin serves {short(artifact.digest)} can't be told by its files "
                      f"({', '.join(sorted(files)[:6])})", "name it: --plugin PLUGIN")  # fmt: skip
