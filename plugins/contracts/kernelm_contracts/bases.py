"""Bases for plugins that train or serve text classifiers: what every one of them does, so that an author writes the model alone.

`TextTrainer` reads the dataset, keeps checkpoints, scores, stores and describes; `TextServer` loads, refuses and ranks. Both are
plugins of their contract, any method of which can be overridden. A plugin declares what they import as its own: numpy,
safetensors, and pyarrow for a trainer (the extra `kernelm-contracts[texts]`).
"""

import asyncio
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kernelm_contracts.admission import ms_since, require_served, require_texts
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Label, ServedModel, Server
from kernelm_contracts.texts import Dataset, check_private, log_softmax, read_dataset, score
from kernelm_contracts.trainer import Algorithm, ModelCard, ModelTrained, Structure, Trained, Trainer, TrainRequest
from kernelm_sdk.checkpoints import invalid_checkpoint
from kernelm_sdk.errors import ClientFault, invalid
from kernelm_sdk.plugin import Call, Job, Plugin
from kernelm_sdk.system import ArtifactName

Array = NDArray[np.floating]
Logits = Callable[[Sequence[str]], Array]  # texts -> [texts, labels]
Tensors = dict[str, NDArray[np.generic]]
CHECKPOINT, MODEL = "checkpoint.safetensors", "model.json"


class Training:
    """One training, in a worker thread: what `TextTrainer.fit` has to work with."""

    def __init__(self, job: Job, request: TrainRequest, data: Dataset, folder: Path, saved: Tensors, format: int = 1) -> None:
        self.job, self.request, self.data = job, request, data
        self.folder = folder  # where the model's files are written: by structure, see trainer.py
        self.saved = saved  # the last checkpoint, from which to go on; {} at the beginning
        self._saved_at, self._format = time.monotonic(), format

    def progress(self, fraction: float, message: str = "", **metrics: float) -> None:
        """Say how far it got (0 to 1); ends the training if it is not wanted any more."""
        self.job.progress(fraction, "train", message, **metrics)

    def save(self, **tensors: NDArray[np.generic]) -> None:
        """Make `tensors` the checkpoint, if the last one is `request.checkpoint_every_s` old. They must hold all that the rest
        depends on: a training that goes on from them has to end as if it had not stopped."""
        if time.monotonic() - self._saved_at < self.request.checkpoint_every_s:
            return
        folder = _emptied(self.job.scratch / "checkpoint")
        # safetensors writes the memory as it lies, and scikit-learn's arrays may lie in Fortran order
        save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, folder / CHECKPOINT)
        self.job.wait(self.job.save(folder, format=self._format, passing=True))
        self._saved_at = time.monotonic()

    def write(self, file: str, **tensors: Array) -> None:
        """Write a safetensors file of the model, float32."""
        save_file({name: np.asarray(tensor, np.float32, order="C") for name, tensor in tensors.items()}, self.folder / file)


class TextTrainer(Plugin, Trainer):
    """A trainer whose author writes `fit`, and says in `structures` and `algorithms` which requests it is for."""

    structures: ClassVar[tuple[Structure, ...]]
    algorithms: ClassVar[tuple[Algorithm, ...]]
    checkpoint_format: ClassVar[int] = 1  # raise it when `fit` saves other tensors, or they mean something else

    def fit(self, training: Training) -> Logits:
        """Learn from `training.data.train`, write the model's files into `training.folder`; how it answers."""
        raise NotImplementedError

    async def train(self, request: TrainRequest, job: Job) -> Trained:
        for field, known in (("structure", self.structures), ("algorithm", self.algorithms)):
            if (asked := getattr(request, field)) not in known:
                raise ClientFault("invalid", f"`{field}` is {asked!r}, and {self.context.manifest.name} trains {', '.join(known)}",
                                  "correct it, or name another plugin for the stage")  # fmt: skip
        if request.epochs < 1:
            raise ClientFault("invalid", f"`epochs` is {request.epochs}", "1 or more")
        dataset = await self.context.artifact(request.dataset)
        checkpoint = await job.resume(self.checkpoint_format)
        folder = _emptied(job.scratch / "model")
        card = await job.in_thread(self._train, request, dataset, checkpoint, folder, job)
        validation = card.scores["validation"]
        about = {"name": card.name, "structure": card.structure, "algorithm": card.algorithm, "accuracy": validation.accuracy}
        model = await self.context.store(folder, "model", about, job=job.id, dataset=request.dataset)
        await self.context.publish(ModelTrained(model=model, structure=card.structure, accuracy=validation.accuracy))
        return Trained(model, card.structure, card.algorithm, card.parameters, validation, card.scores.get("test"), card.trained_s)

    async def describe(self, request: ArtifactName, call: Call) -> ModelCard:
        return read_card(await self.context.artifact(request.digest))

    def _train(self, request: TrainRequest, dataset: Path, checkpoint: Path | None, folder: Path, job: Job) -> ModelCard:
        began, names = time.monotonic(), ("validation", "test") if request.report_test else ("validation",)
        data = read_dataset(dataset, ("train", *names))
        warning = check_private(request, data.card)
        logits = self.fit(Training(job, request, data, folder, _saved(checkpoint), self.checkpoint_format))
        scores = {name: score(name, data.labels, data.splits[name].labels, logits(data.splits[name].texts)) for name in names}
        weights = [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in load_file(file).values()]
        settings, took_s = msgspec.to_builtins(request), round(time.monotonic() - began, 2)
        card = ModelCard(f"{data.card.name}-{request.structure}", "text-classification", request.structure, data.labels, 0,
                         algorithm=request.algorithm, parameters=sum(tensor.size for tensor in weights), dataset=request.dataset,
                         request=settings, scores=scores, trained_s=took_s, warnings=(warning,) if warning else ())  # fmt: skip
        for name, content in ((MODEL, card), ("evaluation.json", scores)):
            (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(content)))
        return card


class TextServer(Plugin, Server):
    """A server whose author writes `load` and `answer`, and says in `structures` which models it can serve."""

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """Of a pool; without a deployment it answers for no model."""

        model: ServedModel | None = None

    structures: ClassVar[tuple[Structure, ...]]
    card: ModelCard

    def load(self, folder: Path) -> None:
        """In a worker thread, before the instance is ready: load the model of which `self.card` is the card."""
        raise NotImplementedError

    def answer(self, texts: tuple[str, ...]) -> tuple[Array, int]:
        """In a worker thread, one call at a time: (logits [texts, labels], tokens read)."""
        raise NotImplementedError

    async def on_start(self) -> None:
        self._turn = asyncio.Lock()
        if self.settings.model is None:
            return
        folder = await self.context.artifact(self.settings.model.artifact)
        self.card = read_card(folder)
        if (found := self.card.structure) not in self.structures:
            raise ClientFault("invalid_model", f"{MODEL}: `structure` is {found!r}, and {self.context.manifest.name} serves "
                              f"{', '.join(self.structures)}", "deploy it with another plugin")  # fmt: skip
        await asyncio.to_thread(self.load, folder)

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,) if self.settings.model else ()

    async def classify(self, request: ClassifyRequest, call: Call) -> ClassifyReply:
        began = time.perf_counter()
        model = require_served(self.settings.model, request, call, self.context.pool)
        require_texts(request.input)
        if request.top < 0:
            raise ClientFault("invalid", f"`top` is {request.top}", "ask for the best 1 or more labels, or 0 for all")
        async with self._turn:
            logits, tokens = await asyncio.to_thread(self.answer, request.input)
        scores = np.exp(log_softmax(logits))
        best = np.argsort(-scores, axis=1, kind="stable")[:, : request.top or None]
        rows = tuple(tuple(Label(self.card.labels[k], float(row[k])) for k in ks) for row, ks in zip(scores, best, strict=True))
        return ClassifyReply(model.name, model.generation, model.artifact, rows, tokens, ms_since(began))


def read_card(folder: Path) -> ModelCard:
    """The card of the model in `folder`; ClientFault "invalid" if there is none, or none that is valid."""
    if not (folder / MODEL).is_file():
        raise ClientFault("invalid", f"{MODEL} is missing: the artifact is no model", "give the digest of a model")
    try:
        return msgspec.json.decode((folder / MODEL).read_bytes(), type=ModelCard)
    except msgspec.DecodeError as error:
        raise invalid(MODEL, error, "train the model again") from None


def _saved(checkpoint: Path | None) -> Tensors:
    """The tensors of a checkpoint; {} without one. ClientFault "invalid_checkpoint" if it is damaged."""
    try:
        return load_file(checkpoint / CHECKPOINT) if checkpoint else {}
    except (OSError, SafetensorError) as error:
        raise invalid_checkpoint(CHECKPOINT, error) from None


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
