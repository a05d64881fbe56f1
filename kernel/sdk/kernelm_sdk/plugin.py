"""What a plugin author uses: `Manifest`, `Plugin`, `Context`, `Call` and `Job`. There are no globals."""

import asyncio
import importlib.util
import logging
import tomllib
from collections.abc import Callable, Coroutine
from importlib.metadata import EntryPoint, entry_points
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec

from kernelm_sdk import checkpoints
from kernelm_sdk.contract import Contract
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.events import Event
from kernelm_sdk.nearest import field_hint
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts, Manifest, Progress, PutArtifact, Resources, Restart

if TYPE_CHECKING:
    from kernelm_sdk.bus import Bus

T = TypeVar("T")
Req = TypeVar("Req", bound=msgspec.Struct)
Rep = TypeVar("Rep")

MANIFEST = "kernelm-plugin.toml"
GROUP = "kernelm.plugins"


def read_manifest(path: Path) -> Manifest:
    """The manifest in the file `path`; ClientFault that names the file and the field if it is not valid."""
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise ClientFault("invalid_manifest", f"{path}: {error}", "see kernel/PROTOCOL.md, 'The manifest'") from None
    return parse_manifest(text, str(path))


def parse_manifest(text: str, where: str) -> Manifest:
    """The manifest that `text` (TOML) is; ClientFault that names `where` and the field if it is not valid."""
    try:
        return msgspec.convert({"entry": "", **tomllib.loads(text)}, Manifest)  # which of the two there is, Manifest looks
    except (ValueError, msgspec.ValidationError) as error:
        hint = field_hint(error, Manifest)
        raise ClientFault("invalid_manifest", f"{where}: {error}",
                          f"{hint}{'; ' if hint else ''}see kernel/PROTOCOL.md, 'The manifest'") from None  # fmt: skip


def find_manifests() -> tuple[dict[str, Manifest], dict[str, str]]:
    """Installed plugins by name, and why a broken one was left out. No plugin code is run: entry points name a package,
    and the manifest lies in its folder (an own loop, since pluggy's stops at the first broken plugin)."""
    good: dict[str, Manifest] = {}
    broken: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        try:
            manifest = read_manifest(_folder(point) / MANIFEST)
            if manifest.name != point.name:
                raise ClientFault("invalid_manifest", f"{point.value}: entry point {point.name!r}, manifest {manifest.name!r}")
            good[manifest.name] = manifest
        except Exception as error:  # whatever is wrong with a stranger's package must not stop the others
            broken[point.name] = str(error)
    return good, broken


def package_folder(package: str) -> Path | None:
    """Where a package lies, installed or editable; None where there is none. A top-level one is found without importing it."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def _folder(point: EntryPoint) -> Path:
    if (folder := package_folder(point.value)) is None:
        raise ClientFault("invalid_manifest", f"entry point {point.name} = {point.value!r} names no package")
    return folder


class NoSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of a plugin that has none."""


class Call:
    """One call, as its handler sees it. `caller` was fixed by the caller's JWT; no header can change it."""

    def __init__(self, caller: str, model: str = "", headers: dict[str, str] | None = None) -> None:
        self.caller, self.model, self.headers = caller, model, headers or {}


class JobCancelled(Exception):
    """The job was cancelled or has another owner: stop working, store nothing more."""


class Job(Call):
    """One job in the hands of this instance. Its methods may be called from a worker thread where it says so."""

    def __init__(self, context: "Context", caller: str, id: str, epoch: int, attempt: int = 1, checkpoint: str = "",
                 run: str = "", name: str = "") -> None:  # fmt: skip
        super().__init__(caller)
        self.context, self.id, self.epoch, self.attempt = context, id, epoch, attempt
        self.checkpoint, self.run_id, self.name = checkpoint, run, name  # digest of the last checkpoint, "" for none
        self.scratch = context.scratch / f"{id}-{epoch}"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.resources: Resources | None = None  # what it may use here, where that is known
        self.rank, self.address = 0, ""  # of a gang: see `announce`
        self.peers: tuple[str, ...] = ()
        self.cancelled = ""  # the reason, once it is
        self.latest = Progress()
        self.report: Callable[..., Coroutine[Any, Any, None]] | None = None  # set by the runner: its `report`
        self.changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @property
    def threads(self) -> int:
        """Threads that keep the cores busy which it may use; 0 where that is not known."""
        return ceil(self.resources.cpu) if self.resources else 0

    async def announce(self, address: str) -> None:
        """Of rank 0 of a gang, once it listens there: only now the other `peers` are given the job, with this `address`."""
        if self.report is not None:
            await self.report("", address)

    def progress(self, fraction: float, phase: str = "", message: str = "", *, deadline_s: float = 600.0,
                 **metrics: float) -> None:  # fmt: skip
        """Say how far it got (0 to 1). Cheap, from any thread; raises JobCancelled if the work is no longer wanted. A metric that
        is no finite number (a loss that diverged) is left out: JSON has none, and the job must not end for it."""
        self.raise_if_cancelled()
        finite = {name: float(value) for name, value in metrics.items() if isfinite(value)}
        self.latest = Progress(round(min(max(fraction, 0.0), 1.0), 4), phase, message, finite, deadline_s)
        self._loop.call_soon_threadsafe(self.changed.set)

    def raise_if_cancelled(self) -> None:
        """From any thread."""
        if self.cancelled:
            raise JobCancelled(self.cancelled)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run blocking work beside the event loop, which goes on renewing the lease."""
        return await asyncio.to_thread(function, *args)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """From a worker thread: the result of a coroutine of this context, e.g. `job.wait(job.context.store(...))`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def resume(self, format: int) -> Path | None:
        """A read-only folder with the checkpoint to go on from, or None to begin at the beginning: there is no checkpoint, or one
        of another plugin or `format` (of `save`), in which case the job's record says why. ClientFault "invalid_checkpoint"."""
        if not self.checkpoint:
            return None
        folder = await self.context.artifact(self.checkpoint)
        if not (why := checkpoints.why_anew(folder, self.context.manifest, format)):
            return folder
        await self.begins_anew(why)
        return None

    async def begins_anew(self, why: str) -> None:
        """Say on the job's record, and in an event, why the work begins at the beginning although there is a checkpoint: `resume`
        does where its format is another one, a plugin where what it holds does not fit what is made of the request now."""
        self.context.log.warning("%s: %s", self.id, why)
        self.progress(0.0, "load", why)
        if self.report is not None:
            await self.report("", note=why, left=self.checkpoint)

    async def save(self, folder: Path, *, format: int = 0, passing: bool = False, **metadata: Any) -> str:
        """Store `folder` as a checkpoint and make it the one to resume from; its digest. A `passing` one is erased once a later
        one, or the result, is on record. `format` (1 or more, of the plugin's own numbering) is written beside the files for
        `resume`: raise it whenever what a checkpoint holds, or what it means, changes. ClientFault "stale_epoch" if the job has
        another owner: nothing was changed then."""
        self.raise_if_cancelled()
        if format:
            checkpoints.mark(folder, self.context.manifest, format)
        lineage = {"job": self.id} | ({"before": self.checkpoint} if self.checkpoint else {})
        digest = await self.context.store(folder, "checkpoint", metadata | ({"passing": True} if passing else {}), **lineage)
        if self.report is not None:
            await self.report(digest)
        self.checkpoint = digest
        return digest


class Context:
    """What a plugin has of the system: calls, events, artifacts, a scratch folder, a log."""

    def __init__(self, bus: "Bus", instance: str, pool: str, manifest: Manifest, scratch: Path, cpu: float = 0.0,
                 memory_mb: int = 0, mirror: str = "") -> None:  # fmt: skip
        self.bus, self.instance, self.pool, self.manifest, self.scratch = bus, instance, pool, manifest, scratch
        self.memory_mb = memory_mb  # that was granted to the instance without its jobs, 2**20 bytes; 0: not known
        self.threads = ceil(cpu)  # that keep the cores busy which the instance has for itself, without its jobs; 0: not known
        self.log = logging.getLogger(manifest.name)
        self._mirror = mirror  # who opens and takes artifacts on this machine; "" where the store itself is here

    async def call(self, declared: Callable[[Any, Req, Any], Coroutine[Any, Any, Rep]], request: Req, *, model: str = "",
                   timeout_s: float = 30.0) -> Rep:  # fmt: skip
        """Call a contract's method (`Jobs.submit`) wherever it is routed, or a model's."""
        near = self._mirror if declared in (Artifacts.open, Artifacts.put) else ""
        reply: Rep = await self.bus.call(declared, request, model=model, instance=near, timeout_s=timeout_s)
        return reply

    async def publish(self, event: Event) -> None:
        """Publish a fact; it is on disk when this returns."""
        await self.bus.publish(event)

    async def artifact(self, digest: str) -> Path:
        """A read-only folder with the artifact's files, every byte verified."""
        opened = await self.call(Artifacts.open, ArtifactName(digest), timeout_s=300.0)
        return Path(opened.path)

    async def store(self, folder: Path, kind: str, metadata: dict[str, Any] | None = None, **lineage: str) -> str:
        """Put the files of `folder` into the store for good; their digest."""
        request = PutArtifact(str(folder), kind, lineage, metadata or {})
        stored: Artifact = await self.call(Artifacts.put, request, timeout_s=300.0)
        return stored.digest


class Plugin:
    """Base of all plugins: `class MyScheduler(Plugin, Scheduler)`. Override the contract's methods; the runner does the rest."""

    Settings: ClassVar[type[msgspec.Struct]] = NoSettings

    def __init__(self, context: Context, settings: Any) -> None:
        self.context, self.settings = context, settings

    async def on_start(self) -> None:
        """Before the instance is ready: open, load, warm up."""

    async def on_stop(self) -> None:
        """After it was drained: close."""

    def models(self) -> tuple[str, ...]:
        """Names of the deployments this instance answers for, once `on_start` is done."""
        return ()


def load_plugin(manifest: Manifest, context: Context, settings: dict[str, Any], factory: Any = None) -> Plugin:
    """Import the plugin's class (or take `factory`) and make it; PluginFault if it is none or refuses these settings."""
    module, _, name = manifest.entry.partition(":")
    factory = factory or getattr(importlib.import_module(module), name, None)
    if not (isinstance(factory, type) and issubclass(factory, Plugin)):
        raise PluginFault("invalid_entry", f"{manifest.name}: entry {manifest.entry!r} is no subclass of kernelm_sdk.plugin.Plugin")
    try:
        return factory(context, msgspec.convert(settings, factory.Settings))
    except msgspec.ValidationError as error:
        raise PluginFault("invalid_settings", f"settings of {manifest.name}: {error}",
                          field_hint(error, factory.Settings) or "correct the pool's settings") from None  # fmt: skip


def implemented(plugin: Plugin, identifiers: tuple[str, ...]) -> dict[str, Any]:
    """Subject part `<contract>.v<major>.<method>` -> bound handler, for the methods that the plugin overrides."""
    handlers: dict[str, Any] = {}
    declared = [c for c in type(plugin).__mro__ if issubclass(c, Contract) and "methods" in vars(c)]
    for contract in [c for c in declared if c.id() in identifiers]:
        for method in contract.methods.values():
            if getattr(type(plugin), method.attribute) is not vars(contract)[method.attribute]:
                handlers[f"{contract.name}.v{contract.major}.{method.name}"] = (method, getattr(plugin, method.attribute))
    return handlers


__all__ = ["Call", "Context", "Job", "JobCancelled", "Manifest", "Plugin", "Resources", "Restart", "find_manifests"]
