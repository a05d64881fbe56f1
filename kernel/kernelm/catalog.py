"""The plugins that can be run: those installed beside the kernel, and those that came as artifacts. None of their code is
run here. Records of the latter live in KV `registry` under `plugin.<digest>`."""

import time

import msgspec

from kernelm_sdk.bus import Bucket, Bus
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import find_manifests, parse_manifest
from kernelm_sdk.system import LoadedPlugin, Manifest, PoolSpec

FRESH_S = 300.0


class Catalog:
    """Manifests by name (installed) and by the digest of their files (loaded)."""

    def __init__(self, bus: Bus) -> None:
        self._records: Bucket[LoadedPlugin] = bus.bucket("registry", LoadedPlugin)
        self.find = find_manifests
        self.installed, self.broken = self.find()
        self.loaded: dict[str, LoadedPlugin] = {}
        self._added: dict[str, float] = {}  # source -> when, monotonic

    async def recover(self) -> None:
        self.loaded = {p.source: p for p, _ in (await self._records.all("plugin")).values()}

    def refresh(self) -> None:
        """Look again at what is installed: a plugin may have come, or become a newer one."""
        self.installed, self.broken = self.find()

    async def add(self, text: str, source: str) -> Manifest:
        """Take up a plugin that came as the artifact `source` with the manifest `text`; it is read, and nothing is run."""
        if not source.startswith("sha256:"):
            raise ClientFault("invalid", f"source {source!r} is no digest", "store the plugin's folder as an artifact first")
        plugin = LoadedPlugin(parse_manifest(text, "the manifest"), source)
        await self._records.put(f"plugin.{source[7:]}", plugin, -1, patience_s=10)
        self.loaded[source], self._added[source] = plugin, time.monotonic()
        return plugin.manifest

    async def forget(self, pools: dict[str, PoolSpec]) -> None:
        """Drop what no pool refers to any more; what came just now may still wait for its pool."""
        fresh = {s for s, added in self._added.items() if time.monotonic() - added < FRESH_S}
        for source in self.loaded.keys() - {p.source for p in pools.values()} - fresh:
            await self._records.delete(f"plugin.{source[7:]}")
            del self.loaded[source]

    def of(self, spec: PoolSpec) -> Manifest | None:
        """The manifest behind a pool; None when the plugin is not there (any more)."""
        if spec.source:
            return self.loaded[spec.source].manifest if spec.source in self.loaded else None
        return self.installed.get(spec.plugin)

    def need(self, name: str) -> Manifest:
        """An installed plugin's manifest; ClientFault "unknown_plugin" that names what there is."""
        if name not in self.installed:
            raise ClientFault("unknown_plugin", f"plugin {name!r} is not installed",
                              f"installed are {', '.join(sorted(self.installed)) or 'none'}")  # fmt: skip
        return self.installed[name]

    def first_party(self, spec: PoolSpec) -> bool:
        """Whether the pool runs kernelm's own code, as safe mode demands."""
        manifest = self.of(spec)
        return manifest is not None and not spec.source and manifest.entry.startswith("kernelm_")

    def all(self) -> tuple[LoadedPlugin, ...]:
        return (*(LoadedPlugin(m) for m in self.installed.values()), *self.loaded.values())


def pool_of(manifest: Manifest, **fields: object) -> PoolSpec:
    """The pool that a plugin asks for by itself."""
    spec = PoolSpec(manifest.name, manifest.name, 0 if manifest.each_node else 1, manifest.each_node, runtime=manifest.runtimes[0])
    return msgspec.structs.replace(spec, **fields)
