"""What training tells the outside, and how it estimates the time that is left."""

import time
from pathlib import Path
from typing import Protocol


class Observer(Protocol):
    """Who follows a training. All methods may raise to end it (`JobCancelled`)."""

    def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None:
        """`fraction` of the whole, 0 to 1."""

    def save(self, folder: Path, lasting: bool = False) -> None:
        """Keep the checkpoint in `folder`, which is complete: until the next one, or `lasting`."""

    def begins_anew(self, why: str) -> None:
        """The checkpoint to resume from was left alone, and why."""


class Meter:
    """Turns work done into progress. Work is counted in tokens; a token of evaluation is a third of one of training."""

    EVALUATION = 1 / 3  # forward only

    def __init__(self, observer: Observer, total: float, done: float = 0.0) -> None:
        self.observer, self.total, self.done = observer, total, done
        self._started, self._began_at = time.monotonic(), done
        self._validated: dict[str, float] = {}  # the last look at the validation split: it stays beside what comes after it, as
        # a job's progress is sent no more than twice a second and a search must not miss it

    def advance(self, work: float, phase: str, message: str = "", **metrics: float) -> None:
        """Report `work` more."""
        self.done += work
        if "validation_accuracy" in metrics:
            self._validated = {k: v for k, v in metrics.items() if k == "epoch" or k.startswith("validation_")}
        rate = (self.done - self._began_at) / max(time.monotonic() - self._started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        self.observer.progress(self.done / self.total, phase, message, left_s=round(max(left, 0.0), 1),
                               **{**self._validated, **metrics})  # fmt: skip
