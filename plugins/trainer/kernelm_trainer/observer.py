"""What training tells the outside, and how it estimates the time that is left."""

import time
from pathlib import Path
from typing import Protocol


class Observer(Protocol):
    """Who follows a training. Both methods may raise to end it (`JobCancelled`)."""

    def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None:
        """`fraction` of the whole, 0 to 1."""

    def save(self, folder: Path) -> None:
        """Keep the checkpoint in `folder`, which is complete, for good."""


class Meter:
    """Turns work done into progress. Work is counted in tokens; a token of evaluation is a third of one of training."""

    EVALUATION = 1 / 3  # forward only

    def __init__(self, observer: Observer, total: float, done: float = 0.0) -> None:
        self.observer, self.total, self.done = observer, total, done
        self._started, self._began_at = time.monotonic(), done

    def advance(self, work: float, phase: str, message: str = "", **metrics: float) -> None:
        """Report `work` more."""
        self.done += work
        rate = (self.done - self._began_at) / max(time.monotonic() - self._started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        self.observer.progress(self.done / self.total, phase, message, left_s=round(max(left, 0.0), 1), **metrics)
