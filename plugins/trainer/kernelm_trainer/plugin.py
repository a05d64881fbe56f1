"""Handlers of `trainer/1`: fetch folders, train in a thread, store the model. What they do to data is in `training.py`."""

import asyncio
import os
import shutil
import socket
import threading
from functools import partial
from pathlib import Path
from typing import Any

from kernelm_contracts.trainer import ModelCard, ModelTrained, Scores, Trained, Trainer, TrainRequest
from kernelm_sdk.plugin import Job, Plugin
from kernelm_sdk.ports import free_port
from kernelm_sdk.system import ArtifactName
from kernelm_trainer.allocator import in_main_arena
from kernelm_trainer.demand import check_request
from kernelm_trainer.settings import TrainerSettings

# Of the checkpoints of all structures: raise it when `TrainRequest` (of whose fields their fingerprint is), a state.json or what
# the tensors are changes. Checkpoints of another format are left alone, and the training begins anew; so it does where one does not
# fit what is made of the request now, as after the upgrade of a library that renames parameters (`checkpoint.Misfit`).
FORMAT = 1


class JobObserver:
    """Passes a training's progress and checkpoints on to its job. Called from the worker thread."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None:
        self.job.progress(fraction, phase, message, **metrics)

    def save(self, folder: Path, lasting: bool = False) -> None:
        self.job.wait(self.job.save(folder, format=FORMAT, passing=not lasting))

    def begins_anew(self, why: str) -> None:
        self.job.wait(self.job.begins_anew(why))


class TrainerPlugin(Plugin, Trainer):
    """Trains one job at a time. torch and the like are imported by the first job: an idle instance is small."""

    Settings = TrainerSettings

    async def train(self, request: TrainRequest, job: Job) -> Trained:
        check_request(request)
        try:
            return await self._store(request, job)
        finally:  # of the next job's disk; the thread of a cancelled one may still write there, and finds that it is cancelled
            await asyncio.to_thread(shutil.rmtree, job.scratch, ignore_errors=True)

    async def _store(self, request: TrainRequest, job: Job) -> Trained:
        job.progress(0.0, "load", "artifacts")
        digests = request.base, request.teacher.model if request.teacher else ""
        base, teacher = [await self.context.artifact(digest) if digest else None for digest in digests]
        others = base, await job.resume(FORMAT), teacher
        dataset = await self.context.artifact(request.dataset)
        if request.processes > 1 or job.peers:
            outcome = await self._together(request, dataset, *others, job)
            if outcome is None:  # another instance speaks for all
                return Trained("", request.structure, request.algorithm, 0, Scores("validation", 0, 0.0, 0.0, 0.0))
        else:
            work = partial(self._train, request, dataset, *others, job)
            outcome = await job.in_thread(in_main_arena, work)
        card: ModelCard = outcome.card
        validation = card.scores["validation"]
        lineage = {"job": job.id, "dataset": request.dataset} | ({"base": request.base} if request.base else {})
        lineage |= {"teacher": request.teacher.model} if request.teacher else {}
        digest = await self.context.store(outcome.folder, "adapter" if card.adapter else "model", {
            "name": card.name, "structure": card.structure, "algorithm": card.algorithm,
            "accuracy": validation.accuracy}, **lineage)  # fmt: skip
        await self.context.publish(ModelTrained(model=digest, structure=card.structure, accuracy=validation.accuracy))
        return Trained(digest, card.structure, card.algorithm, card.parameters, validation, card.scores.get("test"),
                       card.trained_s, round(outcome.tokens_per_s, 1), card.adapter)  # fmt: skip

    async def describe(self, request: ArtifactName, call: Any) -> ModelCard:
        from kernelm_trainer.card import read

        return await asyncio.to_thread(read, await self.context.artifact(request.digest))

    async def _together(self, request: TrainRequest, dataset: Path, base: Path | None, checkpoint: Path | None,
                        teacher: Path | None, job: Job) -> Any:  # fmt: skip
        """Train in several processes, here and in the job's other instances. None in all instances but the first."""
        from kernelm_trainer.workers import Order, Place, run

        place = Place()
        if job.peers:
            host = self.settings.address or socket.gethostbyname(socket.gethostname())
            place = Place(job.rank, len(job.peers), job.address or f"{host}:{free_port(host)}", host)
        if job.peers and not job.rank:
            await job.announce(place.address)
        threads = max(1, (self.settings.threads or job.threads) // request.processes)
        order = Order(request, str(dataset), str(base or ""), str(checkpoint or ""), str(job.scratch), threads, not job.rank,
                      self._granted(job) / request.processes, str(teacher or ""), self.settings.nice)  # fmt: skip
        return await job.in_thread(run, order, place, JobObserver(job))

    def _train(self, request: TrainRequest, dataset: Path, base: Path | None, checkpoint: Path | None, teacher: Path | None,
               job: Job) -> Any:  # fmt: skip
        if self.settings.nice:  # of this thread, which ends with the job, and of those that it starts
            me = os.PRIO_PROCESS, threading.get_native_id()
            os.setpriority(*me, max(os.getpriority(*me), self.settings.nice))
        import torch

        from kernelm_trainer.training import Folders, train

        if threads := self.settings.threads or job.threads:
            torch.set_num_threads(threads)  # of the thread that this is called in
        folders = Folders(dataset, job.scratch, base, checkpoint, teacher=teacher)
        # What libraries take is the instance's, and what earlier jobs have freed is taken again: the job's is what comes on top.
        return train(request, folders, JobObserver(job), job.resources.memory_mb if job.resources else 0.0)

    def _granted(self, job: Job) -> float:
        """MB that the processes of a job may take, with their libraries; 0 where that is not known."""
        return self.context.memory_mb + job.resources.memory_mb if job.resources else 0.0
