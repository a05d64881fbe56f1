"""One of several processes of a training, as torchrun starts it: `python -m kernelm_trainer.worker <work>/order.json`."""

import os
import shutil
import sys
import time
import uuid
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from kernelm_sdk.errors import Fault, from_body
from kernelm_trainer import memory
from kernelm_trainer.observer import Observer
from kernelm_trainer.processes import Processes
from kernelm_trainer.training import Folders, train
from kernelm_trainer.workers import ANSWERS, REPORTS, Answer, Order, Report, silent

KEPT = "kept-*"  # the last checkpoint


class Speaker:
    """The observer whose words go through the pipe to the plugin."""

    def __init__(self, work: Path) -> None:
        self._work, self._name = work, uuid.uuid4().hex
        self._reports = os.open(work / REPORTS, os.O_WRONLY)
        self._answers = (work / ANSWERS).open("rb", buffering=0)

    def say(self, **what: object) -> None:
        os.write(self._reports, msgspec.json.encode(Report(self._name, **what)) + b"\n")  # type: ignore[arg-type]

    def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None:
        self.say(fraction=fraction, phase=phase, message=message, metrics=metrics)

    def save(self, folder: Path, lasting: bool = False) -> None:
        self.say(checkpoint=str(folder), lasting=lasting)
        while (answer := msgspec.json.decode(self._answers.readline(), type=Answer)).sender != self._name:
            continue  # it was for a process that is gone
        if answer.fault is not None:
            raise from_body(answer.fault)
        before = sorted(self._work.glob(KEPT))
        folder.rename(self._work / f"kept-{time.time_ns()}")  # for the processes that are started again
        for old in before:
            shutil.rmtree(old)

    def begins_anew(self, why: str) -> None:
        self.say(begins_anew=why)


def main(path: str) -> int:
    """Train as the order in the file `path` says."""
    order = msgspec.json.decode(Path(path).read_bytes(), type=Order)
    os.nice(max(order.nice - os.nice(0), 0))
    torch.set_num_threads(max(1, order.threads))
    dist.init_process_group("gloo")
    work = Path(order.work)
    speaks = order.speaks and os.environ["LOCAL_RANK"] == "0"
    processes = Processes.of_group(order.request.sharding, speaks)
    observer: Observer = Speaker(work) if speaks else silent()
    kept = sorted(work.glob(KEPT))
    checkpoint = kept[-1] if kept else Path(order.checkpoint) if order.checkpoint else None
    own = work if speaks else work / f"rank-{processes.rank}"
    folders = Folders(Path(order.dataset), own, Path(order.base) if order.base else None, checkpoint, work,
                      Path(order.teacher) if order.teacher else None)  # fmt: skip
    try:
        outcome = train(order.request, folders, observer, memory.left(order.memory_mb), processes)
    except Fault as fault:
        if isinstance(observer, Speaker):
            observer.say(fault=fault.body())
        raise
    if isinstance(observer, Speaker):
        observer.say(fraction=1.0, phase="write", card=outcome.card, tokens_per_s=outcome.tokens_per_s)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
