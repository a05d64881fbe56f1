"""`kernelm plugin list | load | replace | rollback | unload | scale | dev`: changing what runs while it runs."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from rich.console import Console

from kernelm.lifecycle import LIVE
from kernelm_cli import amounts, plugin_list, staging, trusting
from kernelm_cli.results import short
from kernelm_cli.session import Output, connection, print_json, stdout
from kernelm_cli.swapping import conclude, follow, resolve, settle, state_of, unknown
from kernelm_sdk.bus import Bus
from kernelm_sdk.contract import TOKEN
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.system import (
    Artifact,
    Artifacts,
    Bounds,
    Kernel,
    LoadRequest,
    PoolSpec,
    PutArtifact,
    RollbackRequest,
    ScaleRequest,
    Swap,
    SystemState,
    UnloadRequest,
)

PUT_S = 300.0
SETTLE_S = 120.0  # for instances to start or to be drained
DONE, REVERTED = frozenset({"done"}), frozenset({"done", "rolled_back", "failed"})
app = App(name="plugin", help="Plugins: what is there, and replacing it while it runs.", version_flags=[])
app.default(plugin_list.list_)
app.command(plugin_list.list_, name="list")
What = Annotated[str, Parameter(name="WHAT")]


def _option(help: str) -> Parameter:
    """An option that is empty by default, of which there is nothing to say."""
    return Parameter(help=help, negative="", show_default=False)


@Parameter(name="*")
@dataclass(frozen=True)
class Change(Output):
    """Options of every command that changes what runs."""

    why: Annotated[str, _option("For the record: why this is done.")] = ""
    wait: Annotated[bool, Parameter(negative="--no-wait", help="Follow it to its end.")] = True

    @property
    def as_json(self) -> Callable[[object], None] | None:
        """How the outcome is printed, if as JSON."""
        return print_json if self.json else None


@Parameter(name="*")
@dataclass(frozen=True)
class Starting:
    """Options of what starts a plugin."""

    runtime: Annotated[str, _option("inproc, process, venv or container; the manifest's first by default.")] = ""
    settings: Annotated[tuple[str, ...], _option("KEY=VALUE, or a TOML or JSON file; repeat it for several. They take the "
                                                 "place of all earlier ones.")] = ()  # fmt: skip
    instances: Annotated[int, _option("How many; as many as before, or 1.")] = 0
    image: Annotated[str, _option("Of a container: its id or digest.")] = ""
    artifact: Annotated[tuple[str, ...], _option("Digest that a container may read; repeat it.")] = ()
    allow_unsigned: Annotated[bool, Parameter(negative="", help="As administrator, allow these files to run on nodes that list "
                                              "keys (KERNELM_TRUST), though no listed key signed them.")] = False  # fmt: skip

    def request(self, why: str, replaces: str = "", bounds: Bounds = Bounds(), canary: int = 0) -> LoadRequest:
        """The request, without the plugin."""
        if self.instances < 0:
            raise ClientFault("invalid", f"--instances {self.instances} is less than one", "1 or more")
        return LoadRequest(replaces=replaces, runtime=self.runtime, instances=self.instances, image=self.image,
                           settings=amounts.settings(self.settings), artifacts=self.artifact, canary=canary, bounds=bounds,
                           why=why)  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True)
class Replacing:
    """Options of what takes the place of something that runs."""

    canary: Annotated[str, _option("Share of the calls while it is watched, e.g. 5%; all by default.")] = ""
    watch: Annotated[str, Parameter(help="How long both run and are compared; 0 for not at all.")] = "30s"
    max_errors: Annotated[str, Parameter(help="Share of failed calls beyond the old one's, above which it goes back.")] = "1%"
    max_latency: Annotated[str, Parameter(help="Times the old one's p99, above which it goes back.")] = "2x"

    def bounds(self) -> tuple[int, Bounds]:
        """(percent of the calls, bounds of the watch)."""
        canary, watch_s = amounts.percent("--canary", self.canary), amounts.seconds("--watch", self.watch)
        if canary and not watch_s:
            raise ClientFault("invalid", f"--canary {self.canary} with --watch {self.watch}: it would see no calls",
                              "give it a time, e.g. --watch 30s")  # fmt: skip
        errors, latency = amounts.share("--max-errors", self.max_errors), amounts.ratio("--max-latency", self.max_latency)
        return canary, Bounds(watch_s, errors, latency)


@app.command
def load(plugin: Annotated[str, Parameter(name="PLUGIN|PATH")], /, *, starting: Starting = Starting(),
         change: Change = Change()) -> int:  # fmt: skip
    """Start a plugin for contracts that nobody serves yet.

    Parameters
    ----------
    plugin
        An installed plugin's name, a folder with a plugin (./my-plugin), or a wheel.
    """
    return _start(plugin, starting.request(change.why), change, starting.allow_unsigned)


@app.command
def replace(what: What, plugin: Annotated[str, Parameter(name="PLUGIN|PATH")] = "", /, *, starting: Starting = Starting(),
            replacing: Replacing = Replacing(), change: Change = Change()) -> int:  # fmt: skip
    """Replace what runs, without a lost call: the new one starts beside it, proves itself, and takes the calls over.

    It goes back by itself if the new one fails more often or is slower while it is watched.

    Parameters
    ----------
    what
        A pool, a plugin, or a contract such as scheduler/1.
    plugin
        What takes its place: an installed plugin's name, a folder or a wheel; by default the same plugin anew, e.g.
        with other settings or after an upgrade.
    """
    canary, bounds = replacing.bounds()
    return _start(plugin, starting.request(change.why, what, bounds, canary), change, starting.allow_unsigned)


def _start(plugin: str, request: LoadRequest, options: Change, allow_unsigned: bool) -> int:
    console = stdout()
    if plugin and not staging.is_path(plugin) and not TOKEN.match(plugin):
        raise ClientFault("invalid", f"{plugin!r} is no plugin's name and no path",
                          "a name is a-z, 0-9 and '-'; a path begins with ./")  # fmt: skip

    async def work() -> None:
        async with prepared(plugin) as source, connection(options.folder) as bus:
            wanted = await _complete(bus, options.folder, plugin, source, request)
            if source is not None and not options.json:
                m = source.manifest
                console.print(f"{m.name} {m.version} is stored as {short(wanted.source)}", highlight=False)
            if source is not None:
                found = await trusting.verdicts(bus, wanted.source, allow_unsigned, request.why)
                if not options.json:
                    console.print(f"trust: {trusting.summary(found)}", highlight=False, markup=False, soft_wrap=True)
            elif plugin and not options.json and await _installed(bus, plugin):
                console.print(f"trust: {plugin} was installed by the owner of the machine, who is not questioned", highlight=False)

            async def ask() -> Swap:
                return await ask_load(bus, wanted)

            swap = await follow(bus, console, ask, options.wait, options.json)
            await conclude(bus, console, swap, options.as_json, DONE)

    asyncio.run(work())
    return 0


async def _installed(bus: Bus, plugin: str) -> bool:
    """Whether the name is an installed plugin's, and not one's that came as an artifact, or nobody's."""
    return any(p.manifest.name == plugin and not p.source for p in (await state_of(bus)).plugins)


async def _complete(bus: Bus, home: Path, plugin: str, source: staging.Source | None, request: LoadRequest) -> LoadRequest:
    """The request with the plugin's files, which are not stored for nothing: what they shall replace is there."""
    if request.replaces and resolve(state := await state_of(bus), request.replaces) is None:
        raise unknown(state, request.replaces)
    if source is None:
        return msgspec.structs.replace(request, plugin=plugin)
    digest, _ = await store(bus, home, source)
    return msgspec.structs.replace(request, manifest=source.text, source=digest)


@asynccontextmanager
async def prepared(plugin: str) -> AsyncIterator[staging.Source | None]:
    """The plugin in the folder or wheel that `plugin` names; None for a name."""
    if not staging.is_path(plugin):
        yield None
    elif not plugin.endswith(staging.ARCHIVES):
        yield staging.find(Path(plugin))
    else:
        with tempfile.TemporaryDirectory(prefix="kernelm-wheel-") as folder:
            wheel = Path(plugin).expanduser().absolute()
            yield staging.find(await asyncio.to_thread(staging.unpack, wheel, Path(folder)), plugin)


async def store(bus: Bus, home: Path, source: staging.Source) -> tuple[str, int]:
    """Put the plugin's files into the artifact store; (digest, number of files). The copy is made below the home's scratch/,
    where the store may read even if it sees no other folder of this machine."""
    scratch = home / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="plugin-", dir=scratch) as folder:
        files = await asyncio.to_thread(staging.stage, source, Path(folder))
        about = {"plugin": source.manifest.name, "version": source.manifest.version}
        artifact: Artifact = await bus.call(Artifacts.put, PutArtifact(folder, "plugin", metadata=about), timeout_s=PUT_S)
    return artifact.digest, files


async def ask_load(bus: Bus, request: LoadRequest) -> Swap:
    """`kernel/1.load`; the fault for an unknown plugin tells of a folder that is called so."""
    try:
        swap: Swap = await bus.call(Kernel.load, request)
        return swap
    except ClientFault as fault:
        if fault.code == "unknown_plugin" and request.plugin and Path(request.plugin).is_dir():
            hint = f"there is a folder of that name: `./{request.plugin}` means the folder; {fault.remedy}"
            raise ClientFault(fault.code, fault.message, hint) from None
        raise


@app.command
def rollback(what: What, /, *, options: Change = Change()) -> int:
    """Bring back what served before: at once while a replacement is watched, and by a swap back after.

    Parameters
    ----------
    what
        A pool, a plugin, a contract or a deployment.
    """
    console = stdout()

    async def work() -> None:
        async with connection(options.folder) as bus:
            async def ask() -> Swap:
                swap: Swap = await bus.call(Kernel.rollback, RollbackRequest(what, options.why))
                return swap

            swap = await follow(bus, console, ask, options.wait, options.json)
            meant = "rolled back by" in swap.outcome  # a swap that we turned ends so; one that failed by itself is a failure
            await conclude(bus, console, swap, options.as_json, REVERTED if meant else DONE)

    asyncio.run(work())
    return 0


@app.command
def unload(what: What, /, *, options: Change = Change(),
           force: Annotated[bool, Parameter(negative="")] = False) -> int:  # fmt: skip
    """Drain and stop a pool, and withdraw the routes that end there.

    Parameters
    ----------
    what
        A pool or a plugin.
    force
        Even if its contracts are then served by nobody.
    """
    console = stdout()

    async def work() -> None:
        async with connection(options.folder) as bus:
            before = await state_of(bus)
            if (spec := resolve(before, what)) is None:
                raise unknown(before, what)
            await bus.call(Kernel.unload, UnloadRequest(what, force, options.why), timeout_s=SETTLE_S)
            if options.wait:
                with console.status(f"draining {spec.pool}"):
                    await settle(bus, lambda s: not _live(s, spec.pool), f"pool {spec.pool} did not end", SETTLE_S)
            after = await state_of(bus)
            served = sorted(r.name for r in before.routes if any(d.pool == spec.pool for d in r.to))
            lost = [n for n in served if not any(r.name == n for r in after.routes)]
            if options.json:
                print_json({"pool": spec.pool, "unserved": lost, "instances": _live(after, spec.pool)})
                return
            tail = f"; nobody serves {', '.join(lost)} now" if lost else ""
            how = "is unloaded" if options.wait else "is being drained"
            console.print(f"pool {spec.pool} ({spec.plugin}) {how}{tail}", highlight=False)

    asyncio.run(work())
    return 0


@app.command
def scale(what: What, instances: Annotated[int, Parameter(name="N")], /, *, options: Change = Change()) -> int:
    """Change how many instances a pool has.

    Parameters
    ----------
    what
        A pool, a plugin or a contract.
    instances
        How many.
    """
    if instances < 1:
        raise ClientFault("invalid", f"{instances} instances serve nobody", "1 or more; `kernelm plugin unload` stops a pool")
    console = stdout()

    async def work() -> None:
        async with connection(options.folder) as bus:
            spec: PoolSpec = await bus.call(Kernel.scale, ScaleRequest(what, instances))
            if options.wait:
                await _scaled(bus, console, spec)
            if options.json:
                print_json({"pool": spec, "ready": len(_ready(await state_of(bus), spec.pool))})
            elif options.wait:
                console.print(f"pool {spec.pool} ({spec.plugin}) has {spec.instances} ready", highlight=False)
            else:
                console.print(f"pool {spec.pool} ({spec.plugin}) goes to {spec.instances}", highlight=False)

    asyncio.run(work())
    return 0


async def _scaled(bus: Bus, console: Console, spec: PoolSpec) -> None:
    def done(state: SystemState) -> bool:
        if why := state.health.get(f"pool {spec.pool}"):
            raise PluginFault("not_ready", f"pool {spec.pool}: {why}", "see the log of its instances")
        return len(_ready(state, spec.pool)) == len(_live(state, spec.pool)) == spec.instances

    with console.status(f"{spec.pool}: to {spec.instances}"):
        await settle(bus, done, f"pool {spec.pool} did not come to {spec.instances} ready instances", SETTLE_S)


def _live(state: SystemState, pool: str) -> list[str]:
    return [i.id for i in state.instances if i.pool == pool and i.state in LIVE]


def _ready(state: SystemState, pool: str) -> list[str]:
    return [i.id for i in state.instances if i.pool == pool and i.state == "ready"]
