"""From a request and folders to a model folder: reads, trains, evaluates, writes. No bus, no store."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kernelm_contracts.texts import check_private, score
from kernelm_contracts.trainer import ModelCard, Scores, TrainRequest
from kernelm_trainer import card, encoder, tfidf
from kernelm_trainer.corpus import Corpus, read_corpus
from kernelm_trainer.demand import check_request, settings_of
from kernelm_trainer.finetune import FineTuning
from kernelm_trainer.frozen import FrozenLinear
from kernelm_trainer.observer import Observer


@dataclass(frozen=True)
class Folders:
    """Where a training reads and writes."""

    dataset: Path
    work: Path  # its own, empty
    base: Path | None = None
    checkpoint: Path | None = None  # the one to resume from


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
    hidden: int = 0
    tokens_per_s: float = 0.0
    epoch: int = 0  # the one that was kept


def train(request: TrainRequest, folders: Folders, observer: Observer) -> Outcome:
    """Train what `request` says; the model lies in `folders.work / "model"` then.

    Raises ClientFault for a request, dataset, base or checkpoint that cannot be used, PluginFault for a training that
    fails, and whatever `observer` raises to end it.
    """
    check_request(request)
    observer.progress(0.0, "load", "dataset")
    splits = ("train", "validation", "test") if request.report_test else ("train", "validation")
    corpus = read_corpus(folders.dataset, request.structure != "tfidf-linear", splits)
    warning = check_private(request, corpus.card)
    if warning:
        observer.progress(0.0, "load", f"warning: {warning}")
    fitted = STRUCTURES[request.structure](request, corpus, folders, observer)
    observer.progress(1.0, "write", "model")
    folder = folders.work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fitted.write(folder)
    described = _describe(request, corpus, fitted, (warning,) if warning else ())
    card.write(folder, described)
    return Outcome(folder, described, fitted.tokens_per_s)


def _encoder(request: TrainRequest, corpus: Corpus, folders: Folders, observer: Observer) -> Fitted:
    assert folders.base is not None
    base = folders.base
    observer.progress(0.0, "load", "encoder")
    tuning = FineTuning(request, corpus, base, folders.work, observer, folders.checkpoint)
    tuned = tuning.run()
    scores = {"validation": tuned.validation}
    if request.report_test:
        scores["test"] = tuning.evaluate(corpus.splits["test"])
    return Fitted(lambda folder: encoder.write(tuned.model, folder, corpus, base), scores, _count(tuned.model),
                  tuned.elapsed_s, tuned.model.head.in_features, tuned.tokens_per_s, tuned.epoch)  # fmt: skip


def _frozen_linear(request: TrainRequest, corpus: Corpus, folders: Folders, observer: Observer) -> Fitted:
    assert folders.base is not None
    base = folders.base
    observer.progress(0.0, "load", "encoder")
    frozen = FrozenLinear(request, corpus, base, folders.work, observer, folders.checkpoint)
    model, logits = frozen.run()
    return Fitted(lambda folder: encoder.write(model, folder, corpus, base), _scores(corpus, logits.__getitem__),
                  _count(model), time.monotonic() - frozen.started, model.head.in_features, frozen.tokens_per_s)  # fmt: skip


def _tfidf_linear(request: TrainRequest, corpus: Corpus, folders: Folders, observer: Observer) -> Fitted:
    began = time.monotonic()
    model = tfidf.fit(request, corpus, lambda done, of: observer.progress(0.9 * done / of, "fit", f"fit {done + 1}/{of}"))
    observer.progress(0.9, "evaluate")
    scores = _scores(corpus, lambda split: model.logits(corpus.splits[split]))
    return Fitted(model.write, scores, model.parameters, time.monotonic() - began)


STRUCTURES: dict[str, Callable[[TrainRequest, Corpus, Folders, Observer], Fitted]] = {
    "encoder": _encoder, "frozen-linear": _frozen_linear, "tfidf-linear": _tfidf_linear,
}  # fmt: skip


def _scores(corpus: Corpus, logits: Callable[[str], "object"]) -> dict[str, Scores]:
    return {name: score(name, corpus.labels, documents.labels, logits(name))
            for name, documents in corpus.splits.items() if name != "train"}  # fmt: skip


def _count(model: encoder.Classifier) -> int:
    return sum(p.numel() for p in model.parameters())


def _describe(request: TrainRequest, corpus: Corpus, fitted: Fitted, warnings: tuple[str, ...]) -> ModelCard:
    settings = settings_of(request) | ({"best_epoch": fitted.epoch} if fitted.epoch else {})
    return ModelCard(
        name=f"{corpus.card.name}-{request.structure}", task="text-classification", structure=request.structure,
        labels=corpus.labels, max_tokens=corpus.card.max_tokens, algorithm=request.algorithm,
        parameters=fitted.parameters, dataset=request.dataset, base=request.base, request=settings,
        scores=fitted.scores, trained_s=round(fitted.elapsed_s, 2), hidden=fitted.hidden, warnings=warnings)  # fmt: skip
