"""`kernelm model list | show`: the deployments, and the models behind them."""

import asyncio
from typing import Annotated

from cyclopts import App, Parameter
from rich.table import Table
from rich.text import Text

from kernelm_cli.results import short
from kernelm_cli.session import Output, connection, megabytes, print_json, stdout
from kernelm_contracts.trainer import ModelCard, Trainer
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts, Empty, Kernel, Route, SystemState

app = App(name="model", help="The deployments: models that answer under a name.", version_flags=[])


def _deployments(state: SystemState) -> list[Route]:
    return sorted((r for r in state.routes if r.kind == "model"), key=lambda r: r.name)


def _ready(state: SystemState, route: Route) -> int:
    pools = {d.pool for d in route.to}
    return sum(i.pool in pools and i.state == "ready" for i in state.instances)


@app.default
@app.command(name="list")
def list_(*, output: Output = Output()) -> int:
    """List the deployments."""

    async def work() -> SystemState:
        async with connection(output.folder) as bus:
            state: SystemState = await bus.call(Kernel.state, Empty(), patience_s=5.0)
            return state

    state = asyncio.run(work())
    routes = _deployments(state)
    if output.json:
        print_json(routes)
        return 0
    table = Table()
    for name in ("model", "generation", "artifact", "ready", "goes to", "why"):
        table.add_column(name, justify="right" if name in ("generation", "ready") else "left")
    for route in routes:
        ready = _ready(state, route)
        table.add_row(route.name, str(route.generation), short(route.artifact), Text(str(ready), "green" if ready else "red"),
                      ", ".join(f"{d.pool} {d.weight} %" for d in route.to), route.why)  # fmt: skip
    stdout().print(table if routes else "no deployments; a stage that uses \"deploy\" makes one")
    return 0


@app.command
def show(name: Annotated[str, Parameter(name="NAME")], /, *, output: Output = Output()) -> int:
    """Show a deployment: where calls go, and the model's card with its scores."""

    async def work() -> tuple[SystemState, Route, Artifact, ModelCard | str]:
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
            return state, route, artifact, card

    state, route, artifact, card = asyncio.run(work())
    if output.json:
        print_json({"route": route, "artifact": artifact, "card": card})
        return 0
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    facts = {"model": f"{route.name}, generation {route.generation}",
             "goes to": ", ".join(f"{d.pool} {d.weight} %" for d in route.to),
             "ready": f"{_ready(state, route)} instances", "artifact": artifact.digest,
             "size": f"{megabytes(artifact.files):.1f} MB in {len(artifact.files)} files",
             "from": ", ".join(f"{k} {v}" for k, v in artifact.lineage.items())} | _card_facts(card)  # fmt: skip
    for key, value in facts.items():
        if value:
            rows.add_row(key, Text(value))
    console = stdout()
    console.print(rows)
    if isinstance(card, ModelCard) and card.scores:
        console.print(_scores(card))
    return 0


def _card_facts(card: ModelCard | str) -> dict[str, str]:
    if isinstance(card, str):
        return {"card": card}
    return {"structure": f"{card.structure}, {card.format}, {card.precision}, {card.parameters:,} parameters",
            "algorithm": card.algorithm, "labels": ", ".join(card.labels),
            "reads": f"at most {card.max_tokens} tokens"}  # fmt: skip


def _scores(card: ModelCard) -> Table:
    table = Table()
    table.add_column("split")
    for name in ("documents", "accuracy", "macro recall", "macro F1"):
        table.add_column(name, justify="right")
    for split, s in card.scores.items():
        table.add_row(split, f"{s.documents:,}", f"{s.accuracy:.4f}", f"{s.macro_recall:.4f}", f"{s.macro_f1:.4f}")
    return table
