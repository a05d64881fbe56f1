"""`kernelm model list | show | rollback | undeploy`: the deployments, and the models behind them; more in deploying.py."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from rich.text import Text

from kernelm_cli.results import quality, short
from kernelm_cli.session import Output, connection, megabytes, print_json, stdout
from kernelm_cli.tables import columns, pairs
from kernelm_contracts.deployments import Deployed, Deployment, RollbackDeployment, Undeploy
from kernelm_contracts.jobs import JobName, JobRecord, Jobs
from kernelm_contracts.trainer import ModelCard, Trainer
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault, from_body
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts, Empty, Instance, Kernel, Route, SystemState

app = App(name=("model", "models"), help="The deployments: models that answer under a name.", version_flags=[])


def _deployments(state: SystemState) -> list[Route]:
    return sorted((r for r in state.routes if r.kind == "model"), key=lambda r: r.name)


def _ready(state: SystemState, route: Route) -> list[Instance]:
    pools = {d.pool for d in route.to}
    return [i for i in state.instances if i.pool in pools and i.state == "ready" and route.name in i.models]


@app.default
@app.command(name="list")
def list_(*, output: Output = Output()) -> int:
    """List the deployments."""

    async def work() -> tuple[SystemState, dict[str, tuple[Deployment, int]]]:
        async with connection(output.folder) as bus:
            state: SystemState = await bus.call(Kernel.state, Empty(), patience_s=5.0)
            return state, await bus.bucket("deployments", Deployment).all("model")

    state, records = asyncio.run(work())
    routes = _deployments(state)
    if output.json:
        print_json(routes)
        return 0
    table = columns("model", "generation", "artifact", "ready", "goes to", "why", right=("generation", "ready"))
    for route in routes:
        ready = len(_ready(state, route))
        table.add_row(route.name, str(route.generation), short(route.artifact), Text(str(ready), "green" if ready else "red"),
                      ", ".join(f"{d.pool} {d.weight} %" for d in route.to), why_of(route, records))  # fmt: skip
    stdout().print(table if routes else 'no deployments; a stage that uses "deploy" makes one')
    return 0


def why_of(route: Route, records: Mapping[str, tuple[Deployment, int]]) -> str:
    """Why calls go where they go; of a deployment that has lost its node, what it waits for. `records`: key in KV -> record."""
    deployment, _ = records.get(f"model.{route.name}", (None, 0))
    return deployment.why if deployment is not None and deployment.waits else route.why


@app.command
def show(name: Annotated[str, Parameter(name="NAME")], /, *, output: Output = Output()) -> int:
    """Show a deployment: where calls go, and the model's card with its scores."""

    async def work() -> tuple[SystemState, Route, Artifact, ModelCard | str, Deployment | None]:
        async with connection(output.folder) as bus:
            state: SystemState = await bus.call(Kernel.state, Empty(), patience_s=5.0)
            route = next((r for r in _deployments(state) if r.name == name), None)
            if route is None:
                known = ", ".join(r.name for r in _deployments(state)) or "none"
                raise ClientFault("unknown_model", f"there is no deployment {name!r}", f"deployments: {known}")
            artifact: Artifact = await bus.call(Artifacts.describe, ArtifactName(route.artifact))
            card: ModelCard | str
            try:
                card = await bus.call(Trainer.describe, ArtifactName(route.artifact))
            except Fault as fault:  # no trainer is running, or the model is of another kind: the rest is worth showing
                card = fault.message
            deployment, _ = await bus.bucket("deployments", Deployment).get(f"model.{name}")
            return state, route, artifact, card, deployment

    state, route, artifact, card, deployment = asyncio.run(work())
    history = deployment.history if deployment else ()
    if output.json:
        print_json({"route": route, "artifact": artifact, "card": card, "history": history})
        return 0
    rows = pairs()
    facts = {"model": f"{route.name}, generation {route.generation}",
             "goes to": ", ".join(f"{d.pool} {d.weight} %" for d in route.to),
             "ready": _placed(_ready(state, route), deployment),
             "why": deployment.why if deployment and deployment.waits else "", "artifact": artifact.digest,
             "size": f"{megabytes(artifact.files):.1f} MB in {len(artifact.files)} files",
             "from": ", ".join(f"{k} {v}" for k, v in artifact.lineage.items()),
             "before": ", ".join(f"{short(p.artifact)} (generation {p.generation})" for p in history)}  # fmt: skip
    facts |= _card_facts(card)
    for key, value in facts.items():
        if value:
            rows.add_row(key, Text(value))
    console = stdout()
    console.print(rows)
    if isinstance(card, ModelCard) and card.scores:
        for table in quality([("", scores) for scores in card.scores.values()]):
            console.print(table)
    return 0


@app.command
def rollback(name: Annotated[str, Parameter(name="NAME")], /, *, canary: str = "", watch: float = 0.0, why: str = "",
             output: Output = Output()) -> int:  # fmt: skip
    """Bring back the model that a deployment served before, as a new generation.

    Parameters
    ----------
    canary
        Percent of the calls that it gets while it is watched, as 10 or 10%; all of them otherwise.
    watch
        Seconds for which it is watched before the present one is stopped.
    why
        The reason, for the record.
    """
    from kernelm_cli.shadowing import percent  # here, since it builds upon this module

    share = percent("--canary", canary, 99) if canary else 0

    async def work() -> JobRecord:
        async with connection(output.folder) as bus:
            job: JobRecord = await bus.call(Jobs.rollback, RollbackDeployment(name, share, watch, why), timeout_s=20.0)
            return await finish(bus, job, output.json)

    job = asyncio.run(work())
    if output.json:
        print_json(job)
        return 0
    deployed = msgspec.convert(job.result, Deployed)
    stdout().print(f"{deployed.model} answers with {short(deployed.artifact)} again, as generation {deployed.generation}")
    return 0


@app.command
def undeploy(name: Annotated[str, Parameter(name="NAME")], /, *, why: str = "", output: Output = Output()) -> int:
    """Take a deployment away: its calls under way are answered, later ones are refused, and its cores and memory are free.

    The model itself stays in the store.

    Parameters
    ----------
    why
        The reason, for the record.
    """

    async def work() -> Deployment:
        async with connection(output.folder) as bus:
            last: Deployment = await bus.call(Jobs.undeploy, Undeploy(name, why), timeout_s=60.0)
            return last

    last = asyncio.run(work())
    if output.json:
        print_json(last)
    else:
        stdout().print(f"nobody answers as {name} any more; its model is still stored: {short(last.artifact)}")
    return 0


def _placed(ready: list[Instance], deployment: Deployment | None) -> str:
    """ "2 instances on local", or "3 instances: 2 on local, 1 on other"; where there is none now, the nodes where it was to be."""
    nodes = Counter(i.node for i in ready if i.node)
    if len(nodes) > 1:
        return f"{_counted(len(ready))}: {', '.join(f'{count} on {node}' for node, count in sorted(nodes.items()))}"
    where = ", ".join(nodes or (deployment.spread if deployment else ()))
    return _counted(len(ready)) + f" on {where}" * bool(where)


def _counted(instances: int) -> str:
    return f"{instances} {'instance' if instances == 1 else 'instances'}"


async def finish(bus: Bus, job: JobRecord, quiet: bool) -> JobRecord:
    """Show how a replica gets on until it serves, in lines where there is no terminal, and raise its fault if it does not come to
    that; Ctrl-C leaves it running."""
    console, told = stdout(), ""
    shown = console.status(f"job {job.id}") if console.is_terminal and not quiet else contextlib.nullcontext()
    with shown as status:
        while not job.result and job.state not in ("dead", "cancelled", "done"):
            if status is not None:
                status.update(_state_of(job))
            elif not quiet and job.state == "queued" and job.why not in ("", told):  # it may wait for ever: say for what
                console.print(_state_of(job))
                told = job.why
            await asyncio.sleep(0.2)
            job = await bus.call(Jobs.get, JobName(job.id), timeout_s=5.0, patience_s=60.0)
    if job.state in ("dead", "cancelled"):
        raise from_body(job.fault) if job.fault else KernelFault("not_deployed", f"job {job.id} is {job.state}: {job.why}")
    return job


def _state_of(job: JobRecord) -> Text:
    """One line, whatever a reason is made of."""
    said = f"{job.progress.phase} {job.progress.message}" if job.state == "running" else job.why
    return Text(" ".join(f"job {job.id} is {job.state}: {said}".split()).removesuffix(":"), no_wrap=True, overflow="ellipsis")


def _card_facts(card: ModelCard | str) -> dict[str, str]:
    if isinstance(card, str):
        return {"card": card}
    return {"structure": f"{card.structure}, {card.format}, {card.precision}, {card.parameters:,} parameters",
            "algorithm": card.algorithm, "labels": ", ".join(card.labels),
            "reads": f"at most {card.max_tokens} tokens" if card.max_tokens else "texts of any length"}  # fmt: skip
