"""`kernelm plugin list`: what can be run, what runs, and what could be gone back to."""

import asyncio

from rich.table import Table
from rich.text import Text

from kernelm_cli.home import read_up
from kernelm_cli.results import short
from kernelm_cli.session import Output, print_json, stdout
from kernelm_cli.state import system_state
from kernelm_cli.swapping import headline
from kernelm_cli.tables import columns
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import LoadedPlugin, PoolSpec, SystemState


def list_(*, output: Output = Output()) -> int:
    """List the plugins that can be run, and the pools that run them; none of their code is run for it."""
    manifests, broken = find_manifests()
    up = read_up(output.folder)
    state = asyncio.run(system_state(output.folder)) if up and up.alive() else None
    plugins = [LoadedPlugin(m) for m in manifests.values()]
    plugins += [p for p in state.plugins if p.source] if state else []
    ready: dict[str, int] = {}
    for instance in state.instances if state else ():
        if instance.state == "ready":
            ready[instance.plugin] = ready.get(instance.plugin, 0) + 1
    if output.json:
        loaded = [p for p in plugins if p.source]
        print_json({"plugins": list(manifests.values()), "broken": broken, "ready": ready, "loaded": loaded,
                    "pools": state.pools if state else [], "routes": state.routes if state else [],
                    "swaps": state.swaps if state else []})  # fmt: skip
        return 0
    console = stdout()
    table = _plugins(plugins, broken)
    console.print(table if plugins or broken else "no plugins are installed: pip install kernelm-data ...")
    if state is not None:
        console.print(_pools(state))
        for swap in state.swaps:
            if not swap.over:
                console.print(f"swap {swap.id} is {swap.phase}: {headline(swap)}", highlight=False)
    return 1 if broken else 0


def _plugins(plugins: list[LoadedPlugin], broken: dict[str, str]) -> Table:
    table = Table()
    for name in ("plugin", "version", "from", "contracts", "runtimes", "summary"):
        table.add_column(name, overflow="fold")
    for plugin in plugins:
        m = plugin.manifest
        table.add_row(m.name, m.version, short(plugin.source) if plugin.source else "installed", ", ".join(m.contracts),
                      ", ".join(m.runtimes), m.summary)  # fmt: skip
    for name, why in broken.items():
        table.add_row(Text(name, "red"), "", "", "", "", Text(f"broken: {why}", "red"))
    return table


def _pools(state: SystemState) -> Table:
    table = columns("pool", "plugin", "runtime", "ready", "serves", "generation", "state", right=("ready", "generation"))
    back = {s.before: s.pool for s in state.swaps if s.phase == "done"}
    for spec in sorted(state.pools, key=lambda p: (p.plugin, p.pool)):
        mine = [i for i in state.instances if i.pool == spec.pool]
        ready = sum(i.state == "ready" for i in mine)
        version = next((f" {i.version}" for i in mine if i.state == "ready" and i.version), "")
        routes = [(r, d.weight) for r in state.routes for d in r.to if d.pool == spec.pool]
        serves = ", ".join(r.name if weight == 100 else f"{r.name} {weight}%" for r, weight in routes)
        generation = ", ".join(map(str, sorted({r.generation for r, _ in routes if r.generation})))
        table.add_row(spec.pool, spec.plugin + version, spec.runtime,
                      "" if spec.parked else str(ready) if spec.each_node else f"{ready} of {spec.instances}",
                      serves, generation, _condition(spec, state, back))  # fmt: skip
    return table


def _condition(spec: PoolSpec, state: SystemState, back: dict[str, str]) -> Text:
    if spec.parked:
        newer = back.get(spec.pool, "")
        runs = any(p.pool == newer and not p.parked for p in state.pools)
        return Text(f"parked; kernelm plugin rollback {newer}" if runs else "parked", "dim")
    if why := state.health.get(f"pool {spec.pool}"):
        return Text(why, "red")
    return Text("runs", "green")
