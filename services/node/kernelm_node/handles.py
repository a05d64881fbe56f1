"""The handles of running instances, one file each: what a node that is started again adopts from."""

import logging
import os
from pathlib import Path

import msgspec

from kernelm_node.runtimes.runtime import HANDLE_VERSION, Handle

log = logging.getLogger("kernelm.node")


class Handles:
    """`<folder>/<instance>.json`, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, handle: Handle) -> None:
        """Durable when this returns."""
        path = self._folder / f"{handle.instance}.json"
        temporary = path.with_suffix(".new")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(handle))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def remove(self, instance: str) -> None:
        (self._folder / f"{instance}.json").unlink(missing_ok=True)

    def names(self) -> set[str]:
        """The instances that have one, and those behind one that can't be read."""
        return {path.stem for path in self._folder.iterdir()}

    def all(self) -> list[Handle]:
        """In the order of their start. What can't be read is renamed to `.unreadable` and logged, since an instance may
        be running behind it."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                handle = msgspec.json.decode(path.read_bytes(), type=Handle)
                if handle.version != HANDLE_VERSION:
                    raise ValueError(f"version {handle.version}, this node writes {HANDLE_VERSION}")
            except (ValueError, msgspec.DecodeError) as error:
                log.error("%s can't be adopted from: %s; stop its process by hand if it still runs", path, error)
                path.rename(path.with_suffix(".unreadable"))
                continue
            found.append(handle)
        return sorted(found, key=lambda h: h.started)
