"""Writes checkpoints beside the training, one at a time."""

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from kernelm_sdk.errors import Fault
from kernelm_trainer import checkpoint
from kernelm_trainer.checkpoint import Snapshot
from kernelm_trainer.observer import Observer


class Saver:
    """What ends a training (a cancelled job, another owner) ends it at the next checkpoint or at the end; a full disk does not:
    the checkpoint before stays the one to go on from, and the next one is tried when its time comes."""

    def __init__(self, work: Path, observer: Observer, writes: bool = True) -> None:
        self._folder, self._observer, self._writes = work / "checkpoint", observer, writes
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self.saved_at, self.cost_s = time.monotonic(), 0.0
        self.notes: list[str] = []
        self.said = ""  # what is to be told with the progress

    def save(self, snapshot: Snapshot, steps: int, lasting: bool) -> None:
        """Write and store `snapshot`, which was taken after so many steps, until the next one or `lasting`. `wait` must have been
        called before."""
        self.saved_at = time.monotonic()
        if self._writes:
            self._pending = self._thread.submit(self._store, snapshot, steps, lasting)

    def wait(self) -> None:
        """Wait for the last one; raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        self._thread.shutdown()

    def _store(self, snapshot: Snapshot, steps: int, lasting: bool) -> None:
        began = time.monotonic()
        try:
            checkpoint.write(self._folder, snapshot)
            self._observer.save(self._folder, lasting)
            self.said = ""
        except OSError as error:
            self._failed(steps, str(error))
        except Fault as fault:
            if fault.code != "disk_full":
                raise
            self._failed(steps, fault.message)
        finally:
            for folder in (self._folder, self._folder.with_name("checkpoint.part")):
                shutil.rmtree(folder, ignore_errors=True)
            self.cost_s = time.monotonic() - began

    def _failed(self, steps: int, why: str) -> None:
        self.notes.append(f"no checkpoint after step {steps}: {why}")
        self.said = f", no checkpoint: {why}"
