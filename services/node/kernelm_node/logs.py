"""The logs of this node's instances, `logs/<instance>.log`: one that has grown large is put aside when its instance starts, and of
those whose instances have ended only the newest are kept, or a node that lives for a year has a disk full of them."""

import contextlib
import logging
import re
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from kernelm_node.resources import MB

log = logging.getLogger("kernelm.node")
LOG_BYTES = 16 * MB  # a log that is larger when its instance starts is put aside as <name>.log.1
KEPT = 2000  # of so many instances that have ended
# As the kernel names instances: the logs of services lie in the same folder, and are not the node's to remove
INSTANCE = re.compile(r"(.+-[0-9a-f]{8})\.log(\.1)?")


class Files(NamedTuple):
    """What there is of one instance's log."""

    written: float = 0.0  # Unix seconds
    size: int = 0  # bytes
    paths: tuple[Path, ...] = ()


class Logs:
    """The logs in `folder`, of which those of ended instances may have `kept_mb` in all (0: without a bound)."""

    def __init__(self, folder: Path, kept_mb: int, kept: int = KEPT) -> None:
        self._folder, self._bytes, self._number = folder, kept_mb * MB, kept
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, instance: str) -> Path:
        return self._folder / f"{instance}.log"

    def rotate(self, instance: str) -> int:
        """Where the output of a start from now on begins in the log, bytes."""
        path = self.path(instance)
        size = path.stat().st_size if path.exists() else 0
        if size > LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
            return 0
        return size

    def prune(self, living: Container[str]) -> list[str]:
        """Remove the oldest logs of instances that are not `living`, until the others are few and small enough; whose they were."""
        if not self._bytes:
            return []
        removed, size = [], 0
        ended = [(name, files) for name, files in self._all().items() if name not in living]
        for number, (name, files) in enumerate(sorted(ended, key=lambda item: item[1].written, reverse=True), 1):
            size += files.size
            if number == 1 or (number <= self._number and size <= self._bytes):  # the last word of the latest is always there
                continue
            try:
                for path in files.paths:
                    path.unlink(missing_ok=True)
            except OSError as error:  # it stays: nobody waits for this
                log.warning("a log can't be removed: %s", error)
            else:
                removed.append(name)
        return removed

    def _all(self) -> dict[str, Files]:
        logs: dict[str, Files] = {}
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was put aside just now
                if found := INSTANCE.fullmatch(path.name):
                    known, stat = logs.get(found[1], Files()), path.stat()
                    logs[found[1]] = Files(max(known.written, stat.st_mtime), known.size + stat.st_size, (*known.paths, path))
        return logs
