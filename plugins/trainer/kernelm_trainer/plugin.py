"""Handlers of `trainer/1`: fetch folders, train in a thread, store the model. What they do to data is in `training.py`."""

from pathlib import Path
from typing import Any

from kernelm_contracts.trainer import ModelCard, ModelTrained, Trained, Trainer, TrainRequest
from kernelm_sdk.plugin import Job, Plugin
from kernelm_sdk.system import ArtifactName
from kernelm_trainer.demand import check_request
from kernelm_trainer.settings import TrainerSettings


class JobObserver:
    """Passes a training's progress and checkpoints on to its job. Called from the worker thread."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None:
        self.job.progress(fraction, phase, message, **metrics)

    def save(self, folder: Path) -> None:
        self.job.wait(self.job.save(folder))


class TrainerPlugin(Plugin, Trainer):
    """Trains one job at a time. torch and the like are imported by the first job: an idle instance is small."""

    Settings = TrainerSettings

    async def train(self, request: TrainRequest, job: Job) -> Trained:
        check_request(request)
        job.progress(0.0, "load", "artifacts")
        dataset, base, checkpoint = [await self.context.artifact(digest) if digest else None
                                     for digest in (request.dataset, request.base, job.checkpoint)]  # fmt: skip
        assert dataset is not None
        outcome = await job.in_thread(self._train, request, dataset, base, checkpoint, job)
        card: ModelCard = outcome.card
        validation = card.scores["validation"]
        lineage = {"job": job.id, "dataset": request.dataset} | ({"base": request.base} if request.base else {})
        digest = await self.context.store(outcome.folder, "model", {
            "name": card.name, "structure": card.structure, "algorithm": card.algorithm,
            "accuracy": validation.accuracy}, **lineage)  # fmt: skip
        await self.context.publish(ModelTrained(model=digest, structure=card.structure, accuracy=validation.accuracy))
        return Trained(digest, card.structure, card.algorithm, card.parameters, validation, card.scores.get("test"),
                       card.trained_s, round(outcome.tokens_per_s, 1))  # fmt: skip

    async def describe(self, request: ArtifactName, call: Any) -> ModelCard:
        import asyncio

        from kernelm_trainer.card import read

        return await asyncio.to_thread(read, await self.context.artifact(request.digest))

    def _train(self, request: TrainRequest, dataset: Path, base: Path | None, checkpoint: Path | None, job: Job) -> Any:
        import torch

        from kernelm_trainer.training import Folders, train

        if threads := self.settings.threads or job.threads:
            torch.set_num_threads(threads)
        return train(request, Folders(dataset, job.scratch, base, checkpoint), JobObserver(job))
