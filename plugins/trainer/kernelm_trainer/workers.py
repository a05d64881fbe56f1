"""Several processes for one training: torchrun starts them, replaces those that die, and meets those of other instances.

What a training says comes from its speaker, the first process of the first instance, as a line of JSON through a pipe of the file
system, and each checkpoint waits there for its answer. A process that dies takes its group down with it; torchrun starts the group
again, up to `TrainRequest.restarts` times, and the speaker hands the others the last checkpoint.
"""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from kernelm_contracts.trainer import ModelCard, TrainRequest
from kernelm_sdk.children import die_with
from kernelm_sdk.errors import FaultBody, PluginFault, from_body
from kernelm_sdk.ports import free_port
from kernelm_trainer.observer import Observer

ORDER, REPORTS, ANSWERS, LOG = "order.json", "reports.pipe", "answers.pipe", "workers.log"
CHECK_S = 0.5  # between two looks whether the job is still wanted, where nothing is reported
LOGGED = 60  # lines of what the processes said that go into the instance's log when they fail
STOP_S = 20.0  # that torchrun is given to stop its processes


log = logging.getLogger("kernelm.trainer")


class Order(Struct, frozen=True):
    """What each process is told, in `work`/order.json."""

    request: TrainRequest
    dataset: str  # paths, as below
    base: str
    checkpoint: str
    work: str
    threads: int  # of the compute library, of each process
    speaks: bool  # this instance's first process is the speaker
    memory_mb: float = 0.0  # that each process was granted, all in all; 0: not known
    teacher: str = ""
    nice: int = 0  # of each process


class Report(Struct, frozen=True, omit_defaults=True):
    """One line of the speaker."""

    sender: str  # of this start of it
    fraction: float = -1.0  # progress, if not negative
    phase: str = ""
    message: str = ""
    metrics: dict[str, float] = {}
    checkpoint: str = ""  # a folder that waits to be stored; there is an answer
    lasting: bool = False  # it stays beside later ones
    begins_anew: str = ""  # why, although there was a checkpoint
    fault: FaultBody | None = None
    card: ModelCard | None = None  # it is done
    tokens_per_s: float = 0.0


class Answer(Struct, frozen=True):
    """To the sender whose checkpoint was stored, or could not be."""

    sender: str
    fault: FaultBody | None = None


class Result(Struct, frozen=True):
    """A model lies in `work`/model."""

    folder: Path
    card: ModelCard
    tokens_per_s: float


class Place(Struct, frozen=True):
    """Of this instance among those that work together."""

    node: int = 0
    nodes: int = 1
    address: str = ""  # host:port at which the first instance's torchrun is met
    host: str = "127.0.0.1"  # at which the others reach this instance


def run(order: Order, place: Place, observer: Observer) -> Result | None:
    """Run the processes of this instance to their end; the speaker's instance has a result.

    Raises the fault that the training has raised, PluginFault "workers_failed" if they died too often, and what `observer` raises.
    """
    work = Path(order.work)
    (work / ORDER).write_bytes(msgspec.json.encode(order))
    for name in (REPORTS, ANSWERS):
        (work / name).unlink(missing_ok=True)
        os.mkfifo(work / name, 0o600)
    with _torchrun(order, place) as process:
        result = _listen(order, process, observer)
        code = process.wait()
    if (order.speaks and result is None) or code:
        log.error("the training's processes ended with code %s:\n%s", code, "\n".join(_lines(work / LOG)[-LOGGED:]))
        raise PluginFault("workers_failed", f"the training's processes ended with code {code}: {_tail(work / LOG)}",
                          "the log of the instance has the last lines of theirs", retriable=True)  # fmt: skip
    return result


@contextlib.contextmanager
def _torchrun(order: Order, place: Place) -> Iterator[subprocess.Popen[bytes]]:
    address = place.address or f"127.0.0.1:{free_port('127.0.0.1')}"
    conf = f"is_host={str(place.node == 0).lower()}"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={place.nodes}",
               f"--nproc-per-node={order.request.processes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={address}",
               "--rdzv-id=training", f"--local-addr={place.host}",
               f"--rdzv-conf={conf}", f"--max-restarts={order.request.restarts}", "--monitor-interval=0.2",
               f"--log-dir={Path(order.work) / 'torchrun'}",  # else a folder for each run stays in the machine's temporary one
               "-m", "kernelm_trainer.worker", str(Path(order.work) / ORDER)]  # fmt: skip
    # A store that is shared between the starts of a group still holds the addresses of the processes that are gone.
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, order.threads)), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if place.nodes == 1:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    with (Path(order.work) / LOG).open("ab") as log:  # nobody would store its checkpoints when this process is gone: it goes too
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
                                   process_group=0, preexec_fn=die_with(os.getpid()))  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # it passes this on to its processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):  # what is left of its processes
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _listen(order: Order, process: "subprocess.Popen[bytes]", observer: Observer) -> Result | None:
    """Pass on what the speaker says until it is done, or torchrun is gone."""
    work, waiting = Path(order.work), b""
    # open for both ways: neither does the pipe end when a process dies, nor does opening it wait for one
    reports, answers = (os.open(work / name, os.O_RDWR) for name in (REPORTS, ANSWERS))
    ended, result, said = os.pidfd_open(process.pid), None, (0.0, "start")
    try:
        while True:
            ready, _, _ = select.select([reports, ended], [], [], CHECK_S)
            if reports in ready:
                *lines, waiting = (waiting + os.read(reports, 1 << 16)).split(b"\n")
                for report in filter(None, map(_decode, lines)):
                    if report.fraction >= 0:
                        said = (report.fraction, report.phase)
                    result = _take(report, work, answers, observer) or result
            elif ended in ready:
                return result
            else:
                observer.progress(*said)  # raises if the job is no longer wanted
    finally:
        for descriptor in (reports, answers, ended):
            os.close(descriptor)


def _take(report: Report, work: Path, answers: int, observer: Observer) -> Result | None:
    if report.fault is not None:
        raise from_body(report.fault)
    if report.card is not None:
        return Result(work / "model", report.card, report.tokens_per_s)
    if report.begins_anew:
        observer.begins_anew(report.begins_anew)
    elif report.checkpoint:
        fault = None
        try:
            observer.save(Path(report.checkpoint), report.lasting)
        except Exception as error:
            if getattr(error, "code", "") != "disk_full":  # that one the training lives with
                raise
            fault = error.body()  # type: ignore[attr-defined]
        os.write(answers, msgspec.json.encode(Answer(report.sender, fault)) + b"\n")
    elif report.fraction >= 0:
        observer.progress(report.fraction, report.phase, report.message, **report.metrics)
    return None


def _decode(line: bytes) -> Report | None:
    try:
        return msgspec.json.decode(line, type=Report)
    except msgspec.DecodeError:  # half a line, of a process that was killed as it wrote
        return None


def _tail(path: Path) -> str:
    """The last line that says what a process died of, or else what torchrun did."""
    lines = _lines(path)
    of_processes = [line for line in lines if line.startswith("[rank") and ("Error" in line or "Fault" in line)]
    return (of_processes or lines or ["nothing in the log"])[-1]


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def silent() -> Any:
    """The observer of the processes that are not heard."""

    class Silent:
        def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None: ...

        def save(self, folder: Path, lasting: bool = False) -> None: ...

        def begins_anew(self, why: str) -> None: ...

    return Silent()
