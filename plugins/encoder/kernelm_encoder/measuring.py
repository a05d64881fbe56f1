"""Measuring models side by side: each in a fresh process of its own, all in turns, one at work at a time.

A fresh process has nothing in memory but this model and its library, so that memory and load time are the model's own.
Turns (every round a turn for each, each round beginning with another) spread a noisy machine over all of them.
"""

import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import msgspec

from kernelm_contracts.server import Measured, Measurement, MeasureRequest
from kernelm_contracts.trainer import Scores
from kernelm_encoder.examinee import Loaded, Speed, Task, main
from kernelm_sdk.errors import ClientFault, FaultBody, PluginFault, from_body

POLL_S = 0.5  # how soon a cancelled job is noticed
LIBRARIES = ("numpy", "onnxruntime", "tokenizers", "torch", "transformers")


class Watcher(Protocol):
    """Whom to tell how far it got; a `kernelm_sdk.plugin.Job` is one."""

    def progress(self, fraction: float, phase: str = "", message: str = "", **metrics: float) -> None: ...

    def raise_if_cancelled(self) -> None: ...


class Examinee:
    """A model in its process, with what was measured so far."""

    def __init__(self, digest: str, process: BaseProcess, connection: Connection, watcher: Watcher) -> None:
        self.digest, self._process, self._connection, self._watcher = digest, process, connection, watcher
        self.loaded: Loaded = self._receive()
        self.speeds: list[Speed] = []

    def ask(self, task: Task) -> Any:
        """The process's answer; its Fault, or PluginFault "measure_failed" if it died."""
        return self._receive(task)

    def _receive(self, task: Task | None = None) -> Any:
        try:
            if task is not None:
                self._connection.send(task)
            while not self._connection.poll(POLL_S):
                self._watcher.raise_if_cancelled()
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise PluginFault("measure_failed", f"the process that measured {self.digest} ended with exit code "
                              f"{self._process.exitcode}", "a negative code is a signal; -9 often means that memory ran "
                              "out") from None  # fmt: skip
        if isinstance(answer, FaultBody):
            raise from_body(answer)
        return answer

    def measurement(self, scores: Scores) -> Measurement:
        latencies = sorted(ms for speed in self.speeds for ms in speed.latencies_ms)
        return Measurement(
            model=self.digest, scores=scores,
            latency_ms=median(median(speed.latencies_ms) for speed in self.speeds),
            latency_p99_ms=latencies[math.ceil(0.99 * len(latencies)) - 1],  # nearest rank, over all rounds
            throughput=median(speed.throughput for speed in self.speeds),
            bytes=self.loaded.size, memory_mb=self.loaded.memory_mb, load_s=self.loaded.load_s,
            energy_j=median(speed.energy_j for speed in self.speeds))  # fmt: skip


def check_request(request: MeasureRequest) -> None:
    """ClientFault "invalid" that names the field."""
    for wrong, what in (
        (not request.models, "`models` is empty"),
        (len(set(request.models)) != len(request.models), "`models` names a model twice"),
        (request.rounds < 1, f"`rounds` is {request.rounds}, must be at least 1"),
        (request.threads < 0, f"`threads` is {request.threads}, must be at least 0"),
    ):
        if wrong:
            raise ClientFault("invalid", f"measure: {what}", "correct the request")


def measure(request: MeasureRequest, models: dict[str, Path], dataset: Path, max_batch: int, watcher: Watcher) -> Measured:
    """Measure the models in the folders `models` (by digest) on the request's split of the folder `dataset`."""
    labels = _agreed_labels(models, dataset, request)
    done, total = 0, len(models) * (request.rounds + 2)

    def step(phase: str, message: str, **metrics: float) -> None:
        nonlocal done
        done += 1
        watcher.progress(done / total, phase, message, **metrics)

    with ExitStack() as stack:
        examinees: list[Examinee] = []
        for digest, folder in models.items():
            arguments = (folder, dataset, request.split, labels, request.threads, max_batch)
            examinees.append(stack.enter_context(_examinee(digest, arguments, watcher)))
            loaded = examinees[-1].loaded
            step("loading", digest, load_s=loaded.load_s, memory_mb=loaded.memory_mb)
        for turn in range(request.rounds):
            first = turn % len(examinees)
            for examinee in examinees[first:] + examinees[:first]:
                speed: Speed = examinee.ask(Task("speed", turn))
                examinee.speeds.append(speed)
                step("measuring", f"round {turn + 1} of {request.rounds}: {examinee.digest}",
                     latency_ms=median(speed.latencies_ms), throughput=speed.throughput)  # fmt: skip
        measurements: list[Measurement] = []
        for examinee in examinees:
            scores: Scores = examinee.ask(Task("scores"))
            measurements.append(examinee.measurement(scores))
            step("scoring", examinee.digest, accuracy=scores.accuracy)
    return Measured(tuple(measurements), _conditions(request, max_batch))


@contextmanager
def _examinee(digest: str, arguments: tuple[Any, ...], watcher: Watcher) -> Iterator[Examinee]:
    context = get_context("spawn")  # fork would hand down this process's memory and threads
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs, *arguments), name=f"measure {digest}", daemon=True)
    process.start()
    theirs.close()  # so that its end is seen here
    try:
        yield Examinee(digest, process, ours, watcher)
    finally:
        process.terminate()
        process.join()
        ours.close()


def _agreed_labels(models: dict[str, Path], dataset: Path, request: MeasureRequest) -> tuple[str, ...]:
    """The dataset's labels in its order; ClientFault "labels_differ" if a model has other ones."""
    from kernelm_encoder.model import UNREADABLE, read_card

    path = dataset / "labels.json"
    try:
        labels = msgspec.json.decode(path.read_bytes(), type=tuple[str, ...])
    except UNREADABLE as error:
        raise ClientFault("invalid_dataset", f"{path.name}: {error}", "measure on an artifact of kind 'dataset'") from None
    for digest, folder in models.items():
        if sorted(card_labels := read_card(folder).labels) != sorted(labels):
            raise ClientFault("labels_differ", f"model {digest} has the labels {_listed(card_labels)}, dataset "
                              f"{request.dataset} has {_listed(labels)}",
                              "measure a model on a dataset with its labels")  # fmt: skip
    return labels


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, sorted(labels)))


def _conditions(request: MeasureRequest, max_batch: int) -> dict[str, str]:
    from kernelm_encoder.model import cores

    return {
        "processor": _processor(), "cores": str(cores()), "threads": str(request.threads or cores()),
        "load_average": " ".join(f"{load:.2f}" for load in os.getloadavg()), "rounds": str(request.rounds),
        "batch": str(max_batch), "python": platform.python_version(),
        "memory": "resident set of a fresh process: after loading and one answer, less before, libraries included",
        **{name: version(name) for name in LIBRARIES},
    }  # fmt: skip


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
