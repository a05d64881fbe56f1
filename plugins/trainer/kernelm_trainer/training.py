"""From a request and folders to a model folder: reads, trains, evaluates, writes. No bus, no store."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelm_contracts.texts import check_private
from kernelm_contracts.trainer import ModelCard, Scores, TrainRequest
from kernelm_contracts.trainer import Task as TaskName
from kernelm_trainer import card, encoder, pretrained, scores, tfidf
from kernelm_trainer.allocator import memory_kept
from kernelm_trainer.attention import short_rows_by_products
from kernelm_trainer.classify import Classification
from kernelm_trainer.corpus import Corpus, read_card, read_corpus
from kernelm_trainer.demand import check_request, settings_of
from kernelm_trainer.frozen import FrozenLinear
from kernelm_trainer.language import Causal, Translation
from kernelm_trainer.loop import Training
from kernelm_trainer.observer import Observer
from kernelm_trainer.processes import ALONE, Processes
from kernelm_trainer.sentences import Sentences
from kernelm_trainer.tagging import Tagging
from kernelm_trainer.task import Task


@dataclass(frozen=True)
class Folders:
    """Where a training reads and writes."""

    dataset: Path
    work: Path  # its own, empty
    base: Path | None = None
    checkpoint: Path | None = None  # the one to resume from
    shared: Path | None = None  # of all processes of this instance; None where `work` is
    teacher: Path | None = None

    @property
    def start(self) -> Path:
        """The base, of a structure that `check_request` lets not begin without one."""
        assert self.base is not None
        return self.base


@dataclass(frozen=True)
class Outcome:
    """A complete model in `folder`."""

    folder: Path
    card: ModelCard
    tokens_per_s: float  # of training, or of embedding for a frozen encoder


@dataclass(frozen=True)
class Fitted:
    """What a structure hands back: how to write the model, and what it scored."""

    write: Callable[[Path], None]
    scores: dict[str, Scores]
    parameters: int
    elapsed_s: float
    labels: tuple[str, ...] = ()
    hidden: int = 0
    tokens_per_s: float = 0.0
    epoch: int = 0  # the one that was kept
    max_tokens: int = 0
    notes: tuple[str, ...] = ()
    epsilon: float = 0.0


@dataclass(frozen=True)
class Means:
    """What a training has: who follows it, how much memory, which processes."""

    observer: Observer
    memory_mb: float = 0.0  # that this process may still take; 0 for what is free
    processes: Processes = ALONE


def train(request: TrainRequest, folders: Folders, observer: Observer, memory_mb: float = 0.0,
          processes: Processes = ALONE) -> Outcome:  # fmt: skip
    """Train what `request` says in `memory_mb` more than this process has now (0: in what is free); the model lies in
    `folders.work / "model"` then, which the leader of several processes writes.

    Raises ClientFault for a request, dataset, base or checkpoint that cannot be used, PluginFault for a training that
    fails, and whatever the observer raises to end it.
    """
    check_request(request)
    means = Means(observer, memory_mb, processes)
    observer.progress(0.0, "load", "dataset")
    card_of_data = read_card(folders.dataset, request)
    warning = check_private(request, card_of_data) if card_of_data else ""
    if warning:
        observer.progress(0.0, "load", f"warning: {warning}")
    fitted = STRUCTURES[request.structure](request, folders, means)
    observer.progress(1.0, "write", "model")
    folder = folders.work / "model"
    described = _describe(request, card_of_data.name if card_of_data else "lines", fitted, (warning,) if warning else ())
    if processes.leads:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fitted.write(folder)
        card.write(folder, described)
    return Outcome(folder, described, fitted.tokens_per_s)


def splits_of(request: TrainRequest) -> tuple[str, ...]:
    return ("train", "validation", "test") if request.report_test else ("train", "validation")


def _corpus(request: TrainRequest, folders: Folders) -> Corpus:
    return read_corpus(folders.dataset, request.structure != "tfidf-linear", splits_of(request), request.problem == "multi-label")


def _tuned(request: TrainRequest, task: Task, folders: Folders, means: Means, **about: Any) -> Fitted:
    """Run the loop, and report the splits."""
    with memory_kept(), short_rows_by_products():
        training = Training(request, task, folders.work, means.observer, folders.checkpoint, means.processes, means.memory_mb)
        tuned = training.run()
    found = {"validation": tuned.validation}
    if request.report_test:
        found["test"] = training.evaluate("test")
    count = sum(p.numel() for p in task.model.parameters())
    tensors = means.processes.gather(task.model)
    return Fitted(lambda folder: task.write(folder, tensors), found, count, tuned.elapsed_s, tokens_per_s=tuned.tokens_per_s,
                  epoch=tuned.epoch, notes=tuned.notes, epsilon=tuned.epsilon, **about)  # fmt: skip


def _encoder(request: TrainRequest, folders: Folders, means: Means) -> Fitted:
    corpus = _corpus(request, folders)
    means.observer.progress(0.0, "load", "encoder")
    task = Classification(request, corpus, folders.start, folders.teacher)
    return _tuned(request, task, folders, means, labels=corpus.labels, hidden=task.model.head.in_features,
                  max_tokens=corpus.card.max_tokens)  # fmt: skip


def _whole(request: TrainRequest, folders: Folders, means: Means) -> Fitted:
    """A model that is a Hugging Face folder as it is."""
    task: Any = MODELS[request.structure](request, folders, means)
    return _tuned(request, task, folders, means, labels=getattr(task, "labels", ()), max_tokens=pretrained.positions(task.model),
                  hidden=task.model.config.hidden_size)  # fmt: skip


def _frozen_linear(request: TrainRequest, folders: Folders, means: Means) -> Fitted:
    corpus = _corpus(request, folders)
    means.observer.progress(0.0, "load", "encoder")
    frozen = FrozenLinear(request, corpus, folders.start, folders.work, means.observer, folders.checkpoint)
    model, logits = frozen.run()
    count = sum(p.numel() for p in model.parameters())
    return Fitted(lambda folder: encoder.write(model, folder, corpus, folders.start), _scores(corpus, logits.__getitem__), count,
                  time.monotonic() - frozen.started, corpus.labels, model.head.in_features, frozen.tokens_per_s,
                  max_tokens=corpus.card.max_tokens)  # fmt: skip


def _tfidf_linear(request: TrainRequest, folders: Folders, means: Means) -> Fitted:
    corpus, observer = _corpus(request, folders), means.observer
    began = time.monotonic()
    model = tfidf.fit(request, corpus, lambda done, of: observer.progress(0.9 * done / of, "fit", f"fit {done + 1}/{of}"))
    observer.progress(0.9, "evaluate")
    found = _scores(corpus, lambda split: model.logits(corpus.splits[split]))
    return Fitted(model.write, found, model.parameters, time.monotonic() - began, corpus.labels, max_tokens=corpus.card.max_tokens)


MODELS: dict[str, Callable[[TrainRequest, Folders, Means], Task]] = {
    "causal-lm": lambda r, f, m: Causal(
        r, f.dataset, f.base, splits_of(r), (f.shared or f.work) / "ids", m.processes, f.teacher),
    "seq2seq-lm": lambda r, f, _: Translation(r, f.dataset, f.start, splits_of(r)),
    "token-classification": lambda r, f, _: Tagging(r, f.dataset, f.start, splits_of(r)),
    "sentence-embedding": lambda r, f, _: Sentences(r, f.dataset, f.start, splits_of(r)),
}
STRUCTURES: dict[str, Callable[[TrainRequest, Folders, Means], Fitted]] = {
    "encoder": _encoder, "frozen-linear": _frozen_linear, "tfidf-linear": _tfidf_linear, **dict.fromkeys(MODELS, _whole),
}  # fmt: skip
TASKS: dict[str, TaskName] = {"causal-lm": "text-generation", "seq2seq-lm": "text2text-generation",
                              "token-classification": "token-classification",
                              "sentence-embedding": "sentence-similarity"}  # fmt: skip


def _scores(corpus: Corpus, logits: Callable[[str], Any]) -> dict[str, Scores]:
    return {name: scores.classifier(name, corpus.labels, documents.labels, logits(name))
            for name, documents in corpus.splits.items() if name != "train"}  # fmt: skip


def _describe(request: TrainRequest, dataset: str, fitted: Fitted, warnings: tuple[str, ...]) -> ModelCard:
    settings = settings_of(request) | ({"best_epoch": fitted.epoch} if fitted.epoch else {})
    return ModelCard(
        name=f"{dataset}-{request.structure}", task=TASKS.get(request.structure, "text-classification"),
        structure=request.structure, labels=fitted.labels, max_tokens=fitted.max_tokens, algorithm=request.algorithm,
        parameters=fitted.parameters, dataset=request.dataset, base=request.base, request=settings,
        scores=fitted.scores, trained_s=round(fitted.elapsed_s, 2), hidden=fitted.hidden, warnings=warnings,
        problem=request.problem, adapter=pretrained.is_adapter(request), notes=fitted.notes, epsilon=round(fitted.epsilon, 4),
        delta=request.privacy.delta if request.privacy else 0.0)  # fmt: skip
