"""Where a plugin's code is: installed on this node, or an artifact that is opened here."""

import asyncio
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from kernelm_node.trust import Trust
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.plugin import GROUP, MANIFEST, Manifest, find_manifests, package_folder, read_manifest
from kernelm_sdk.system import ArtifactName, Artifacts, StartInstance

OPEN_S = 20.0  # for one artifact; every byte of it is verified
STORED = 1000  # artifacts that are reported


def installed_stamp() -> list[tuple[str, int]]:
    """The folders that packages are installed in, each with its time of change: another when one was added or removed."""
    return [(folder, Path(folder).stat().st_mtime_ns) for folder in sys.path if folder and Path(folder).is_dir()]


def stored(home: Path) -> tuple[str, ...]:
    """Digests of the artifacts whose files lie on this machine, the latest first; those of a store that is here, or that keeps its
    cache here (services/artifacts: `<root>/trees/<hex>`)."""
    try:
        found = [(entry.stat().st_mtime, entry.name) for entry in os.scandir(home / "artifacts" / "trees") if len(entry.name) == 64]
    except FileNotFoundError:  # there is none, or one was moved aside just now
        return ()
    return tuple(f"sha256:{name}" for _, name in sorted(found, reverse=True)[:STORED])


class Sources:
    """Opens what a start names, if it may run here. `bus` has `call`; `mirror` opens artifacts where their store is elsewhere."""

    def __init__(self, bus: Any, node: str, trust: Trust, mirror: str = "") -> None:
        self._bus, self._node, self._trust, self._mirror = bus, node, trust, mirror
        self._points: dict[str, EntryPoint] = {}
        self._stamp: list[tuple[str, int]] = []  # of the folders that packages are in

    async def of(self, request: StartInstance) -> tuple[Manifest, Path, Path | None]:
        """The plugin's manifest, the file that it is in, and the folder of the plugin's artifact if it comes as one.
        ClientFault when there is no such plugin, its manifest does not allow the runtime, or the node does not trust it."""
        source = await self.open(request.source) if request.source else None
        file = source / MANIFEST if source else await asyncio.to_thread(self._installed, request.plugin)
        manifest = await asyncio.to_thread(read_manifest, file)
        if manifest.name != request.plugin:
            raise ClientFault("manifest_mismatch", f"{file} is of plugin {manifest.name!r}, not of {request.plugin!r}",
                              "load it under its own name, or correct the manifest")  # fmt: skip
        if request.runtime not in manifest.runtimes:
            raise ClientFault("unsupported_runtime", f"plugin {request.plugin!r} does not run as {request.runtime!r}",
                              f"its manifest says runtimes = {', '.join(manifest.runtimes)}")  # fmt: skip
        if source is not None:
            await self._trust.require(request, manifest, source)
        return manifest, file, source

    def _installed(self, plugin: str) -> Path:
        """The manifest's file of an installed plugin. Entry points are read again when something was installed or removed."""
        stamp = installed_stamp()
        if stamp != self._stamp:
            self._points = {point.name: point for point in entry_points(group=GROUP)}
            self._stamp = stamp
        point = self._points.get(plugin)
        folder = package_folder(point.value) if point else None
        if folder is None:
            manifests, broken = find_manifests()
            raise ClientFault("unknown_plugin", f"node {self._node} has no plugin {plugin!r}",
                              broken.get(plugin) or f"installed are {', '.join(sorted(manifests)) or 'none'}")  # fmt: skip
        return folder / MANIFEST

    async def open_all(self, digests: tuple[str, ...]) -> tuple[Path, ...]:
        return tuple([await self.open(digest) for digest in digests])

    async def open(self, digest: str) -> Path:
        """The folder of an artifact on this machine."""
        try:
            opened = await self._bus.call(Artifacts.open, ArtifactName(digest), timeout_s=OPEN_S, instance=self._mirror)
        except ClientFault:
            raise
        except Fault as fault:
            remedy = fault.remedy or "`kernelm ps` shows whether the artifact service runs"
            text = f"artifact {digest[:19]} can't be opened on node {self._node}: {fault.message}"
            raise KernelFault("can_not_open", text, remedy, retriable=True) from fault
        return Path(opened.path)
